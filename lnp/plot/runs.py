"""Runs against each other: position against loss, reach against size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lnp.plot import style
from lnp.plot.lines import LABELS
from lnp.runs.curves import POSITION, reach, size, smooth
from lnp.runs.curves import curve as curve_of
from lnp.runs.open_runs import RunSources, open_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def position_against_loss(runs: RunSources, ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """Spectral position over loss, both averaged over three windows; training goes from right to left, to the dot."""
    named = open_runs(runs)
    ax = style.axes(ax)
    for (name, run), colour in zip(named.items(), style.colours(named), strict=True):
        column = POSITION if POSITION in run else "chi_pos"
        step, position = smooth(curve_of(run, column))
        loss_step, loss = smooth(curve_of(run, "loss"))
        if not (len(step) and len(loss_step)):
            continue
        loss = style.positive(np.interp(step, loss_step, loss))
        shown = np.isfinite(loss) & np.isfinite(style.positive(position))
        if shown.any():
            ax.set(xscale="log", yscale="log")
            ax.plot(loss, style.positive(position), color=colour, label=name, linewidth=1.5)
            ax.plot(loss[shown][-1], position[shown][-1], "o", color=colour, markersize=5)
    ax.invert_xaxis()
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, "loss", LABELS[POSITION])
    if legend:
        style.legend(ax, len(named))
    return ax


def reach_against_size(runs: RunSources, ax: Axes | None = None, *, names: bool = True) -> Axes:
    """Spectral reach of each run, with its standard error, over its number of trained parameters, the tag `parameters`.

    Raises
    ------
    ValueError
        If no run says how many parameters it has.
    """
    named = open_runs(runs)
    sizes = [size(run) for run in named.values()]
    if not np.isfinite(sizes).any():
        raise ValueError(
            "No run says how many parameters it has. Expected Tracker(..., tags={'parameters': n}) in the runs' "
            "scripts."
        )
    ax = style.axes(ax)
    ax.set_xscale("log")
    for (name, run), parameters, colour in zip(named.items(), sizes, style.colours(named), strict=True):
        lowest, error, _ = reach(run)
        if not lowest > 0:  # the axis has no place for it
            continue
        ax.set_yscale("log")
        down = np.nan_to_num(min(error, 0.9 * lowest))
        ax.errorbar(
            parameters, lowest, [[down], [np.nan_to_num(error)]], fmt="o", color=colour, markersize=6, capsize=2
        )
        if names:
            ax.annotate(name, (parameters, lowest), xytext=(6, 4), textcoords="offset points", fontsize="small")
    ax.margins(x=0.15, y=0.15)
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, "trained parameters", r"spectral reach  (lowest $\chi_\mathrm{pos}$)")
    return ax
