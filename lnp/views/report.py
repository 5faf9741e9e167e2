"""`lnp report`: runs on one page for a browser, which needs no network and opens from the disk."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from lnp.optional import import_optional
from lnp.printable import printable
from lnp.runs.open_runs import Runs, RunSources, open_runs
from lnp.runs.table import ABOUT, HEADER, compare, number
from lnp.tracking.history import History
from lnp.views import figures

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
"""What the browser is to refuse: whatever is not in the page."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --page: #fff; --soft: #6a7280; --rule: #d9dde3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --page: #14171b; --soft: #98a1ad; --rule: #333a43 } }
body { margin: 0 auto; max-width: 1500px; padding: 1rem; color: var(--ink); background: var(--page);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .3rem 0 } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem }
p, li { max-width: 75ch; overflow-wrap: anywhere } .soft, figcaption { color: var(--soft); font-size: .85rem }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
button[aria-pressed=false] { opacity: .35; text-decoration: line-through }
.mark { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: .5rem 1rem }
figure { margin: 0; min-width: 0 } figcaption { padding: 0 .5rem }
"""
SCRIPT = """
for (const button of document.querySelectorAll("button[data-run]")) button.onclick = () => {
  const shown = button.getAttribute("aria-pressed") !== "true"
  button.setAttribute("aria-pressed", shown)
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const own = plot.data.map((trace, i) => trace.meta === button.dataset.run ? i : -1).filter(i => i >= 0)
    if (own.length) Plotly.restyle(plot, {visible: shown}, own)
  }
}
"""
CITE = (
    'Nikolaou, Scheunemann, Krippendorf, Tovey, Holm, "Spectral Reach", arXiv 2605.31244. Measured with lnp {version}.'
)
HOW = "Press a run to hide it and to show it. In a figure, drag to zoom, and press twice to go back."
MEANING = (
    "The speed at which the loss falls, -dL/dt, is the product of the loss scale (how large the mistake is), the "
    "network scale (how strongly outputs respond to parameters) and the spectral position: 1 where learning happens "
    "on the dominant mode of the neural tangent kernel, toward 0 in its tail."
)


def write_report(runs: RunSources, path: Path, title: str | None = None) -> None:
    """Write the page of one run or several, as `lnp compare` takes them.

    Raises
    ------
    ImportError
        Without Plotly.
    ValueError
        For runs without measurements.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(runs, title), encoding="utf-8")


def page(runs: RunSources, title: str | None = None) -> str:
    """The page as HTML."""
    plotly = import_optional("plotly.io", "lnp report", install="'lnp[report]'", library="plotly")
    import lnp

    named = {name: run for name, run in open_runs(runs).items() if len(run)}
    if not named:
        raise ValueError("no measurements to show. Expected files that trackers wrote.")
    shown = figures.colours(named)
    name = title or (next(iter(named)) if len(named) == 1 else f"{len(named)} runs")
    drawn, script = [], True
    for figure, caption in figures.all_of(named, shown):
        options = {"responsive": True, "displayModeBar": False}
        part = plotly.to_html(figure, full_html=False, include_plotlyjs=script, config=options)
        drawn.append(f"<figure>{part}<figcaption>{html.escape(caption)}</figcaption></figure>")
        script = False  # the library is in the page once
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(name)}</title><style>{STYLE}</style></head><body>
<h1>{_text(name)}</h1><p class="soft">{MEANING}</p>
<h2>Runs</h2><div class="wide">{_table(named, shown)}</div>
<p class="soft">{HOW} {_text(ABOUT)}</p>
<h2>Figures</h2><div class="figures">{"".join(drawn)}</div>
<h2>How it was measured</h2><ul>{"".join(_measured(run, named[run]) for run in named)}</ul>
<h2>Notes</h2>{_notes(named)}
<h2>To cite</h2><p>{_text(CITE.format(version=lnp.__version__))}</p>
<script>{SCRIPT}</script></body></html>
"""


def _text(text: str) -> str:
    return html.escape(printable(text, keep="\n"))


def _table(runs: Runs, shown: figures.Colours) -> str:
    """The table that `lnp compare` prints, with a button for each run."""
    rows = []
    for cells in compare(runs):
        meta = html.escape(html.escape(cells[0]))  # what the figures' traces are found by is escaped once itself
        button = (
            f'<button aria-pressed="true" data-run="{meta}"><span class="mark" style="background:{shown[cells[0]]}">'
            f"</span>{_text(cells[0])}</button>"
        )
        rows.append("".join(f"<td>{cell}</td>" for cell in (button, *map(_text, cells[1:]))))
    head = "".join(f"<th>{_text(name)}</th>" for name in HEADER)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _measured(name: str, run: History) -> str:
    """One line on the batch, the estimator and the cost."""
    seconds = [value for value in run.numbers("seconds") if math.isfinite(value)]
    parts = [f"{len(run)} measurements, steps {int(run['step'][0]):,} to {int(run['step'][-1]):,}"]
    shape = _last(run, "samples"), _last(run, "outputs")
    parts += [f"{shape[0]} samples x {shape[1]} outputs"] if None not in shape else []
    parts += [f"trace: {_last(run, 'estimator')}"] if _last(run, "estimator") else []
    parts += [f"loss: {_last(run, 'loss_name')}"] if _last(run, "loss_name") else []
    parts += [f"{number(sum(seconds))} s of measuring"] if seconds else []
    return f"<li><b>{_text(name)}</b>: {_text('; '.join(parts))}</li>"


def _notes(runs: Runs) -> str:
    """The notes of all runs, each with the step from which on it holds."""
    found = [
        f"<li><b>{_text(name)}</b>, from step {int(step):,}: {_text(note)}</li>"
        for name, run in runs.items()
        for step, note in zip(run["step"].tolist(), run.get("notes").tolist(), strict=True)
        if isinstance(note, str) and note
    ]
    return f"<ul>{''.join(found)}</ul>" if found else "<p>None.</p>"


def _last(run: History, column: str) -> Any:
    """The last value of a column; None without one."""
    return run.get(column).tolist()[-1] if column in run else None
