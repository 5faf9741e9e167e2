"""What the demo shows in the terminal: a progress bar, a table, the findings."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lnp.demo import summary
from lnp.demo.figure import draw
from lnp.demo.run import Settings, chosen, run, write_csv

COLUMNS = (
    ("loss", "loss", 1.0),
    ("chi_loss", "chi_loss", 1.0),
    ("chi_net", "chi_net", 1.0),
    ("chi_pos\nbatch, e-6", "chi_pos", 1e6),
    ("chi_pos\ne-6", "population/chi_pos", 1e6),
)
"""Heading, column of the history, factor."""


def show(settings: Settings, out: Path) -> None:
    """Run the demo, print what was found, and write figure and history to `out`."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError("lnp demo needs rich, which is not installed. Run: pip install 'lnp[demo]'") from error
    console = Console()
    settings = replace(settings, framework=chosen(settings.framework))
    console.print(
        f"Digits, shifted and noisy; one hidden layer; {settings.steps} steps of gradient descent on "
        f"{settings.batch} images each; {settings.seeds} seeds; {settings.framework}."
    )
    started = time.perf_counter()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        total = settings.seeds * len(settings.runs) * len(settings.schedule)
        task = bar.add_task("training and measuring", total=total)
        rows = run(settings, lambda text: bar.advance(task))
    history, figure = out / "history.csv", out / "reach.png"
    write_csv(rows, history)
    draw(rows, figure)
    console.print(_table(rows, settings))
    for finding in summary.findings(rows):
        console.print(finding, highlight=False)
    seconds = time.perf_counter() - started
    console.print(f"\n{total} measurements in {seconds:.0f} s. Figure: {figure}, history: {history}", highlight=False)


def _table(rows: list[dict[str, Any]], settings: Settings) -> Any:
    from rich import box
    from rich.table import Table

    title = f"After {settings.steps} steps, mean over seeds ± standard error"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("hidden\nlayer", no_wrap=True)
    for heading in ("para-\nmeters", *(heading for heading, _, _ in COLUMNS), "reach\ne-6"):
        table.add_column(heading, justify="right", no_wrap=True)
    for network in summary.networks(rows):
        size = int(summary.table(rows, network, "parameters")[0, 0])
        cells = [_cell(summary.final(rows, network, column), factor) for _, column, factor in COLUMNS]
        table.add_row(network.removesuffix(" units"), f"{size}", *cells, _cell(summary.reach(rows, network), 1e6))
    return table


def _cell(value: summary.Value, factor: float) -> str:
    """Mean ± error, with as many decimals as the error has."""
    mean, error = factor * value.mean, factor * value.stderr
    if not error > 0:
        return f"{mean:.3g}"
    decimals = max(0, -math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"
