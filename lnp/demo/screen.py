"""What the demo shows in the terminal: a progress bar, a table, the findings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lnp.demo import summary
from lnp.demo.figure import draw
from lnp.demo.run import Ladder, Settings, choose_framework, run, write_csv
from lnp.optional import import_optional
from lnp.printable import printable
from lnp.progress import bar
from lnp.results.rounding import rounded
from lnp.runs.curves import POSITION, size

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    ("loss", "loss", 1.0),
    ("chi_loss", "chi_loss", 1.0),
    ("chi_net", "chi_net", 1.0),
    ("chi_pos\n(batch)", "chi_pos", 1e6),
    ("chi_pos", POSITION, 1e6),
)
"""Heading, column of the history, factor."""


def show(settings: Settings, out: Path) -> None:
    """Run the demo, print what was found, and write figure and history to `out`."""
    for module in ("rich", "matplotlib"):  # both are needed only after the work
        import_optional(module, "lnp demo", install="'lnp[demo]'")
    from rich.console import Console
    from rich.text import Text

    console = Console()
    settings = replace(settings, framework=choose_framework(settings.framework))
    console.print(
        f"Digits, shifted and noisy; one hidden layer; {settings.steps} steps of gradient descent on "
        f"{settings.batch} images each; {settings.seeds} seeds; {settings.framework}."
    )
    started = time.perf_counter()
    total = settings.seeds * len(settings.runs) * len(settings.measurements)
    with bar("training and measuring", total) as advance:
        ladder = run(settings, out / "runs", advance)
    history = out / "history.csv"
    figure = out / "reach.png"
    write_csv(ladder, history)
    draw(ladder, figure)
    console.print(_table(ladder, settings))
    for finding in summary.findings(ladder):
        console.print(finding, highlight=False)
    seconds = time.perf_counter() - started
    told = (
        f"\n{total} measurements in {seconds:.0f} s. Figure: {printable(figure)}, history: {printable(history)}",
        f"Run by run: lnp compare {printable(out / 'runs')}",
    )
    for line in told:  # paths as they are: brackets are no markup, and long lines are not broken
        console.print(Text(line), soft_wrap=True)


def _table(ladder: Ladder, settings: Settings) -> Table:
    """A line for each network: its size, its last values and its reach, averaged over seeds."""
    from rich import box
    from rich.table import Table

    title = f"After {settings.steps} steps: mean over seeds ± standard error; chi_pos and reach in 1e-6"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("hidden", no_wrap=True)
    for heading in ("size", *(heading for heading, _, _ in COLUMNS), "reach"):
        table.add_column(heading, justify="right", no_wrap=True)
    for network, runs in ladder.items():
        cells = [_cell(summary.last_value(runs, column), factor) for _, column, factor in COLUMNS]
        found = summary.reach(runs)
        value = summary.Value(found.chi_pos, found.stderr)
        cells.append(_cell(value, 1e6) if found.resolved else f"< {1e6 * found.limit:.3g}")
        table.add_row(network.removesuffix(" units"), f"{size(runs[0]):.0f}", *cells)
    return table


def _cell(value: summary.Value, factor: float) -> str:
    """Mean ± error, where there is one, without the spaces that a narrow table has no room for."""
    mean, error = factor * value.mean, factor * value.stderr
    return "±".join(filter(None, rounded(mean, error))) if error > 0 else f"{mean:.3g}"
