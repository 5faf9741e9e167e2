"""What the demo shows in the terminal: a progress bar, a table, the findings."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lnp.demo import summary
from lnp.demo.figure import draw
from lnp.demo.run import Settings, chosen, run, write_csv

COLUMNS = (
    ("loss", "loss"),
    ("chi_loss", "chi_loss"),
    ("chi_net", "chi_net"),
    ("chi_pos, batch", "chi_pos"),
    ("chi_pos", "population/chi_pos"),
)


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
        f"Digits, shifted and noisy; one hidden layer; {settings.steps} steps of gradient descent on {settings.batch} images each; "
        f"{settings.seeds} seeds; {settings.framework}."
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
    from rich.table import Table

    table = Table(title=f"After {settings.steps} steps: mean over seeds ± standard error", title_justify="left")
    table.add_column("hidden layer")
    table.add_column("parameters", justify="right")
    for heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    table.add_column("spectral reach", justify="right")
    for network in summary.networks(rows):
        size = int(summary.table(rows, network, "parameters")[0, 0])
        cells = [_cell(summary.final(rows, network, column)) for _, column in COLUMNS]
        table.add_row(network, f"{size:,}", *cells, _cell(summary.reach(rows, network)))
    return table


def _cell(value: summary.Value) -> str:
    error = "" if value.stderr != value.stderr else f" ± {value.stderr:.1g}"
    return f"{value.mean:.3g}{error}"
