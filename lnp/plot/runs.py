"""Runs against each other: position against loss, reach against size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.plot import style
from lnp.plot.lines import LABELS
from lnp.runs.curves import POSITION, compute, reach, size, smooth
from lnp.runs.curves import curve as curve_of
from lnp.runs.open_runs import Runs, RunSources, open_runs
from lnp.runs.spectral_reach import Reach
from lnp.tracking.history import History

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


def against_compute(runs: RunSources, column: str = POSITION, ax: Axes | None = None, *, legend: bool = True) -> Axes:
    """A column, averaged over three windows, over the compute of training in floating-point operations, 6 N D.

    N is the tag `parameters`, D the step times the tag `tokens_per_step` (tokens, or samples, in a training step).

    Raises
    ------
    ValueError
        If no run has both tags.
    """
    named = open_runs(runs)
    _sizes(named, compute)
    ax = style.axes(ax)
    ax.set(xscale="log", yscale="log")
    for (name, run), colour in zip(named.items(), style.colours(named), strict=True):
        step, mean = smooth(curve_of(run, column))
        if len(step):
            per_step = compute(run) / max(run["step"][-1], 1)
            ax.plot(style.positive(per_step * step), style.positive(mean), color=colour, label=name, linewidth=1.5)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, COMPUTE, LABELS.get(column, column))
    if legend:
        style.legend(ax, len(named))
    return ax


def reach_against_size(runs: RunSources, ax: Axes | None = None, *, names: bool = True) -> Axes:
    """Spectral reach of each run, with its standard error, over its number of trained parameters, the tag `parameters`.

    Upper limits are triangles that point down, with an arrow.

    Raises
    ------
    ValueError
        If no run says how many parameters it has.
    """
    named = open_runs(runs)
    return _reach_against(named, _sizes(named, size), "trained parameters", ax, names)


def reach_against_compute(runs: RunSources, ax: Axes | None = None, *, names: bool = True) -> Axes:
    """Spectral reach of each run over the compute of the whole run in floating-point operations, 6 N D.

    N is the tag `parameters`, D the last step times the tag `tokens_per_step` (tokens, or samples, in a training step).

    Raises
    ------
    ValueError
        If no run has the tags.
    """
    named = open_runs(runs)
    return _reach_against(named, _sizes(named, compute), COMPUTE, ax, names)


COMPUTE = "compute  $6ND$  (floating-point operations)"
MISSING = (
    "No run says how many parameters it has{more}. Expected Tracker(..., tags={{'parameters': n{tags}}}) in the runs' "
    "scripts."
)


def _sizes(named: Runs, of: Callable[[History], float]) -> list[float]:
    """The size or the compute of each run; a ValueError if none has one."""
    sizes = [of(run) for run in named.values()]
    if not np.isfinite(sizes).any():
        more = (" and how many tokens a step takes", ", 'tokens_per_step': t") if of is compute else ("", "")
        raise ValueError(MISSING.format(more=more[0], tags=more[1]))
    return sizes


def _reach_against(named: Runs, sizes: list[float], label: str, ax: Axes | None, names: bool) -> Axes:
    """A point with its error for each run, or its upper limit."""
    ax = style.axes(ax)
    ax.set_xscale("log")
    for (name, run), at, colour in zip(named.items(), sizes, style.colours(named), strict=True):
        found = reach(run)
        value = found.chi_pos if found.resolved else found.limit
        if not (value > 0 and at > 0):  # the axis has no place for it
            continue
        ax.set_yscale("log")
        draw_reach(ax, at, found, color=colour)
        if names:
            ax.annotate(name, (at, value), xytext=(6, 4), textcoords="offset points", fontsize="small")
    ax.margins(x=0.15, y=0.15)
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, label, r"spectral reach  (lowest $\chi_\mathrm{pos}$)")
    return ax


def draw_reach(ax: Axes, at: float, found: Reach, **options: Any) -> None:
    """A reach with its standard error on a logarithmic axis, or its upper limit as a triangle with an arrow."""
    if found.resolved:
        up = float(np.nan_to_num(found.stderr))
        errors: Any = [[min(up, 0.9 * found.chi_pos)], [up]]
        ax.errorbar(at, found.chi_pos, errors, **{"fmt": "o", "markersize": 6, "capsize": 2} | options)
    else:
        down = 0.35 * found.limit
        limit = {"fmt": "v", "markersize": 6, "capsize": 2, "uplims": True}
        ax.errorbar(at, found.limit, [[down], [0.0]], **limit | options)
