"""A run's story, or that of several, on one page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.plot import style
from lnp.plot.layers import layers
from lnp.plot.lines import chi_loss, chi_net, chi_pos, curve, loss, noise_scale
from lnp.plot.runs import position_against_loss, reach_against_size
from lnp.runs.curves import NET_POSITION, size, summary
from lnp.runs.open_runs import Runs, RunSources, open_runs
from lnp.runs.table import integer, net_position, number, reached
from lnp.tracking.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = (11.7, 8.3)
"""A4, landscape, in inches."""
MOST_LINES = 14


def dashboard(runs: RunSources, title: str | None = None) -> Figure:
    """Loss and the three factors over the steps, noise scale, position against loss; and below, for one run, its layers
    and its numbers, for several, reach against size and a table. Returns the figure.
    """
    named = open_runs(runs)
    figure = style.figure(*PAGE)
    axes = figure.subplots(3, 3)
    loss(named, axes[0, 0], legend=False)
    chi_loss(named, axes[0, 1], legend=False)
    chi_net(named, axes[0, 2], legend=False)
    chi_pos(named, axes[1, 0], legend=len(named) == 1)
    if any("population/noise_scale" in run for run in named.values()):
        noise_scale(named, axes[1, 1], legend=False)
    else:
        curve(named, "rate", axes[1, 1], legend=False)
    position_against_loss(named, axes[1, 2], legend=False)
    if len(named) == 1:
        _draw_one(next(iter(named.values())), axes[2])
    else:
        _draw_several(named, axes[2])
    for letter, ax in zip("abcdefghi", axes.flat, strict=True):
        if ax.axison:
            ax.set_title(letter, loc="left", fontweight="bold", fontsize="medium")
    style.explain(figure)
    figure.suptitle(title if title is not None else next(iter(named)) if len(named) == 1 else f"{len(named)} runs")
    return figure


def _draw_one(run: History, axes: np.ndarray) -> None:
    """The lowest row of the page of one run, three axes: its layers, if it has any, and its numbers."""
    if run.layers:
        layers(run, "chi_pos", axes[0])
        layers(run, "rate_share", axes[1], names=False)
    else:
        curve(run, "rate", axes[0])
        if "seconds" in run:
            curve(run, "seconds", axes[1])
        else:
            axes[1].axis("off")
        axes[1].set_ylabel("seconds per measurement")
    _draw_lines(axes[2], story(run))


def _draw_several(named: Runs, axes: np.ndarray) -> None:
    """The lowest row of the page of several runs, three axes: reach against size, and a table."""
    if any(math.isfinite(size(run)) for run in named.values()):
        reach_against_size(named, axes[0], names=len(named) <= 6)
    else:
        curve(named, "rate", axes[0], legend=False)
    axes[1].axis("off")
    axes[2].axis("off")
    summaries = [summary(run) for run in named.values()]
    header = ("run", "size", "loss", "reach", "at step")
    cells = [
        (name, number(s.parameters), number(s.loss), reached(s.reach), integer(s.reach.step))
        for name, s in zip(named, summaries, strict=True)
    ]
    _draw_table(axes[1], header, cells, [line["color"] for line in style.lines(named)])


def story(run: History) -> list[tuple[str, str]]:
    """(name, value) lines about a run in numbers and words."""
    s = summary(run)
    lines = [
        ("measurements", f"{s.rows}, up to step {s.last_step}"),
        *([("trained parameters", number(s.parameters))] if math.isfinite(s.parameters) else []),
        ("loss", f"{number(s.first_loss)} to {number(s.loss)}"),
        ("spectral reach", reached(s.reach)),
        ("reached at step", integer(s.reach.step)),
        *([("net position", net_position(run))] if NET_POSITION in run else []),
    ]
    names = {"chi_loss": "loss scale", "chi_net": "network scale", "chi_pos": "position"}
    lines += [
        (names[name], f"within 25% from step {integer(at)}" if math.isfinite(at) else "still moving at the end")
        for name, at in s.stalled.items()
        if s.rows > 1
    ]
    seconds = run.get("seconds")
    seconds = seconds[np.isfinite(seconds)]
    if len(seconds):  # the first one compiles and warms up
        each = f", then {number(seconds[1:].mean())} s each" if len(seconds) > 1 else ""
        lines.append(("measuring took", f"{number(seconds[0])} s{each}"))
    return [*lines, *([("notes", "in the column notes")] if "notes" in run else [])]


def _draw_lines(ax: Axes, lines: list[tuple[str, str]]) -> None:
    """(name, value) lines as text in place of the axes."""
    ax.axis("off")
    for index, (name, value) in enumerate(lines):
        y = 1.0 - 0.11 * index
        _write(ax, 0.0, y, name, color="#555555", fontsize="small")
        _write(ax, 0.47, y, value, fontsize="small")


def _draw_table(ax: Axes, header: tuple, cells: list[tuple], colours: list) -> None:
    """The runs' numbers with their colours, over two axes' width."""
    shown = cells[:MOST_LINES]
    columns = (0.06, 1.0, 1.25, 1.75, 2.0)
    height = 1 / (max(len(shown), 8) + 1.5)
    for x, text in zip(columns, header, strict=True):
        _write(ax, x, 1.0, text, color="#555555", ha="left" if x < 0.5 else "right")
    for index, (row, colour) in enumerate(zip(shown, colours[: len(shown)], strict=True)):
        y = 1.0 - (index + 1.2) * height
        (mark,) = ax.plot([0.0, 0.04], [y - 0.3 * height] * 2, color=colour, linewidth=2.5, transform=ax.transAxes)
        mark.set(clip_on=False, in_layout=False)
        for x, text in zip(columns, row, strict=True):
            _write(ax, x, y, text, ha="left" if x < 0.5 else "right", fontsize="small")
    if len(shown) < len(cells):
        _write(ax, 0.06, 0.0, f"and {len(cells) - len(shown)} more", fontsize="small")


def _write(ax: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Text that the other panels do not make room for."""
    ax.text(x, y, text, transform=ax.transAxes, va="top", **options).set_in_layout(False)
