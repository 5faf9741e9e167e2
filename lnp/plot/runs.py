"""Runs against each other: position against loss, reach against size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.plot import style
from lnp.plot.laws import draw_law, draw_reach
from lnp.plot.lines import LABELS
from lnp.runs.curves import POSITION, Curve, compute, reach, size, smooth
from lnp.runs.curves import curve as curve_of
from lnp.runs.open_runs import Runs, RunSources, open_runs
from lnp.runs.power_law import power_law
from lnp.runs.spectral_reach import Reach
from lnp.tracking.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def position_against_loss(runs: RunSources, ax: Axes | None = None, *, legend: bool = True, fit: bool = False) -> Axes:
    """Spectral position over loss, both averaged over three windows; training goes from right to left, to the dot.

    With `fit` also the power law through the windows of all runs, of which those within two standard errors of zero
    count as upper limits (`lnp.power_law`).
    """
    named = open_runs(runs)
    ax = style.axes(ax)
    for (name, run), line in zip(named.items(), style.lines(named), strict=True):
        column = POSITION if POSITION in run else "chi_pos"
        step, position = smooth(curve_of(run, column))
        loss_step, loss = smooth(curve_of(run, "loss"))
        if not (len(step) and len(loss_step)):
            continue
        loss = style.positive(np.interp(step, loss_step, loss))
        shown = np.isfinite(loss) & np.isfinite(style.positive(position))
        if shown.any():
            ax.set(xscale="log", yscale="log")
            ax.plot(loss, style.positive(position), label=name, linewidth=1.5, **line)
            ax.plot(loss[shown][-1], position[shown][-1], "o", color=line["color"], markersize=5, gid=style.END)
    ax.invert_xaxis()
    if fit:
        _draw_fit(ax, named, lambda run, step: np.interp(step, *_of(curve_of(run, "loss"))), None)
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, "loss", LABELS[POSITION])
    if legend:
        style.legend(ax, len(named) + fit)
    return ax


def against_compute(
    runs: RunSources, column: str = POSITION, ax: Axes | None = None, *, legend: bool = True, fit: bool = False
) -> Axes:
    """A column, averaged over three windows, over the compute of training in floating-point operations, 6 N D.

    N is the tag `parameters`, D the step times the tag `tokens_per_step` (tokens, or samples, in a training step). With
    `fit` also a power law through the windows of all runs, as in `position_against_loss`.

    Raises
    ------
    ValueError
        If no run has both tags.
    """
    named = open_runs(runs)
    _sizes(named, compute)
    ax = style.axes(ax)
    ax.set(xscale="log", yscale="log")
    for (name, run), line in zip(named.items(), style.lines(named), strict=True):
        step, mean = smooth(curve_of(run, column))
        if len(step):
            ax.plot(style.positive(_per_step(run) * step), style.positive(mean), label=name, linewidth=1.5, **line)
    if fit:
        _draw_fit(ax, named, lambda run, step: _per_step(run) * step, column)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, COMPUTE, LABELS.get(column, column))
    if legend:
        style.legend(ax, len(named) + fit)
    return ax


def reach_against_size(runs: RunSources, ax: Axes | None = None, *, names: bool = True, fit: bool = False) -> Axes:
    """Spectral reach of each run, with its standard error, over its number of trained parameters, the tag `parameters`.

    Upper limits are triangles that point down, with an arrow. With `fit` also the power law through them.

    Raises
    ------
    ValueError
        If no run says how many parameters it has.
    """
    named = open_runs(runs)
    return _reach_against(named, _sizes(named, size), "trained parameters", ax, names, fit)


def reach_against_compute(runs: RunSources, ax: Axes | None = None, *, names: bool = True, fit: bool = False) -> Axes:
    """Spectral reach of each run over the compute of the whole run in floating-point operations, 6 N D.

    N is the tag `parameters`, D the last step times the tag `tokens_per_step` (tokens, or samples, in a training step).

    Raises
    ------
    ValueError
        If no run has the tags.
    """
    named = open_runs(runs)
    return _reach_against(named, _sizes(named, compute), COMPUTE, ax, names, fit)


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


def _reach_against(named: Runs, sizes: list[float], label: str, ax: Axes | None, names: bool, fit: bool) -> Axes:
    """A point with its error for each run, or its upper limit, and the power law through those that are not frozen."""
    ax = style.axes(ax)
    ax.set_xscale("log")
    points: list[tuple[float, Reach]] = []
    places = set[float]()
    for (name, run), at, line in zip(named.items(), sizes, style.lines(named), strict=True):
        found = reach(run)
        value = found.chi_pos if found.resolved else found.limit
        if not (value > 0 and at > 0):  # the axis has no place for it
            continue
        ax.set_yscale("log")
        places.add(at)
        points += [] if "linestyle" in line else [(at, found)]
        hollow: dict[str, Any] = {"markerfacecolor": "white"} if "linestyle" in line else {}
        draw_reach(ax, at, found, color=line["color"], **hollow)
        if names:
            ax.annotate(name, (at, value), xytext=(6, 4), textcoords="offset points", fontsize="small")
    if fit:
        _draw_law(ax, points)
    ax.margins(x=0.15, y=0.15)
    if len(places) == 1:  # margins of one place are none, of which matplotlib 3.11 warns
        ax.set_autoscalex_on(False)
        place = places.pop()
        ax.set_xlim(place / 2, 2 * place)
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, label, r"spectral reach  (lowest $\chi_\mathrm{pos}$)")
    if fit:
        ax.legend(**style.LEGEND)
    return ax


def _draw_fit(ax: Axes, named: Runs, at: Callable[[History, np.ndarray], np.ndarray], column: str | None) -> None:
    """The power law through the windows of all runs, whose place on the axis `at(run, steps)` tells."""
    points: list[tuple[float, Reach]] = []
    for run in named.values():
        found = curve_of(run, column or (POSITION if POSITION in run else "chi_pos"))
        for x, mean, error in zip(at(run, found.step), found.mean, found.stderr, strict=True):
            known = np.isfinite([x, mean]).all() and x > 0 and (mean > 0 or error > 0)
            points += [(float(x), Reach(float(mean), float(error), 0.0, 1))] if known else []
    _draw_law(ax, points)


def _draw_law(ax: Axes, points: list[tuple[float, Reach]]) -> None:
    """The power law through points of different sizes, where there are two or more."""
    with_errors = all(np.isfinite(found.stderr) and found.stderr > 0 for _, found in points)
    # without errors there are no upper limits, so that values have to be above zero
    points = [(size, found) for size, found in points if with_errors or found.chi_pos > 0]
    sizes = [size for size, _ in points]
    if len(set(sizes)) < 2:
        raise ValueError(f"fit=True received {len(set(sizes))} points to fit. Expected two or more that differ.")
    values: list[Any] = [found if with_errors else found.chi_pos for _, found in points]
    draw_law(ax, power_law(sizes, values), min(sizes), max(sizes), color="black")


def _per_step(run: History) -> float:
    """Floating-point operations of a training step, 6 N D / steps."""
    return compute(run) / max(run["step"][-1], 1)


def _of(found: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means, to interpolate between."""
    return found.step, found.mean
