"""Quantities along one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lnp.parameter_texts import parameters_of
from lnp.plot import style
from lnp.runs.curves import MOST_POINTS, NET_POSITION, NOISE_SCALE, POSITION, Curve
from lnp.runs.curves import curve as curve_of
from lnp.runs.open_runs import Runs, RunSources, open_runs
from lnp.runs.seeds import mean_over_seeds
from lnp.tracking.columns import expected
from lnp.tracking.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "loss": "loss",
    "rate": "rate  $-dL/dt$",
    "chi_loss": r"loss scale  $\chi_\mathrm{loss}$",
    "chi_net": r"network scale  $\chi_\mathrm{net}$",
    "chi_pos": r"spectral position  $\chi_\mathrm{pos}$ (batch)",
    "preference": r"preference  $\chi_\mathrm{pos} N K$",
    POSITION: r"spectral position  $\chi_\mathrm{pos}$",
    NET_POSITION: r"net position  $\chi_\mathrm{pos}$",
    "net/rate": "net rate  (fall of the loss per learning rate)",
    NOISE_SCALE: "gradient noise scale  (samples)",
}
STEP = "training step"
ROOM = 10.0
"""How far beyond the positions that are shown the position without preference may lie, to be shown as well."""
Colour = Any
"""A colour as Matplotlib takes them."""


def curve(
    runs: RunSources,
    column: str,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    legend: bool = True,
    **line: Any,
) -> Axes:
    """A column of the history over the steps, on a logarithmic axis if it is positive.

    Parameters
    ----------
    runs:
        One run or several: histories, files, or folders of them.
    ax:
        Where to draw; default: new axes.
    column:
        Its name in the history.
    label:
        The label in the legend; default: the runs' names.
    line:
        Passed on to `Axes.plot`, such as color= or linestyle=.

    Raises
    ------
    KeyError
        If no run has the column.
    """
    named = open_runs(runs)
    if not any(column in run for run in named.values()):
        columns = next(iter(named.values())).columns if named else ()
        raise KeyError(f"{column!r} is not a column of the runs. {expected(columns, column)}")
    ax = style.axes(ax)
    curves = {name: curve_of(run, column) for name, run in named.items()}
    logarithmic = ax.get_yscale() == "log" or any((c.mean[np.isfinite(c.mean)] > 0).any() for c in curves.values())
    for (name, run), own in zip(named.items(), style.lines(named), strict=True):
        _draw_line(ax, curves[name], logarithmic, len(named) == 1, {"label": label or name, **own, **line})
        if len(named) == 1:
            _draw_measurements(ax, run, column, curves[name], line.get("color", own["color"]), logarithmic)
    _finish(ax, column, logarithmic)
    if legend:
        style.legend(ax, len(named))
    return ax


def over_seeds(
    runs: Mapping[str, Sequence[History]], column: str, ax: Axes | None = None, *, legend: bool = True
) -> Axes:
    """Means over seeds of a column over the steps, with bands of one standard error over the seeds.

    Parameters
    ----------
    runs:
        {name: runs that differ in their seeds alone}. Runs with the tag `frozen` are dashed.
    column:
        Its name in the histories.

    Raises
    ------
    ValueError
        For runs of one name that were measured at different steps.
    """
    firsts = {name: seeds[0] for name, seeds in runs.items()}
    curves = {name: mean_over_seeds(seeds, column) for name, seeds in runs.items()}
    ax = style.axes(ax)
    logarithmic = any((c.mean[np.isfinite(c.mean)] > 0).any() for c in curves.values())
    for (name, found), own in zip(curves.items(), style.lines(firsts), strict=True):
        _draw_line(ax, found, logarithmic, True, {"label": name, **own})
    _finish(ax, column, logarithmic)
    if legend:
        style.legend(ax, len(runs))
    return ax


def _finish(ax: Axes, column: str, logarithmic: bool) -> None:
    """Scales and labels of a quantity over the steps."""
    if logarithmic:
        ax.set_yscale("log")
    _make_room(ax)
    style.step_axis(ax)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, STEP, LABELS.get(column, column))


@parameters_of(curve)
def loss(runs: RunSources, ax: Axes | None = None, **options: Any) -> Axes:
    """The loss over the steps.

    Parameters
    ----------
    runs, ax, options:
        As for `curve`.
    """
    return curve(runs, "loss", ax, **options)


@parameters_of(curve)
def chi_loss(runs: RunSources, ax: Axes | None = None, **options: Any) -> Axes:
    """The loss scale over the steps.

    Parameters
    ----------
    runs, ax, options:
        As for `curve`.
    """
    return curve(runs, "chi_loss", ax, **options)


@parameters_of(curve)
def chi_net(runs: RunSources, ax: Axes | None = None, **options: Any) -> Axes:
    """The network scale over the steps.

    Parameters
    ----------
    runs, ax, options:
        As for `curve`.
    """
    return curve(runs, "chi_net", ax, **options)


@parameters_of(curve)
def chi_pos(runs: RunSources, ax: Axes | None = None, **options: Any) -> Axes:
    """The spectral position over the steps: of the population where it is known, and of the batch for a single run.

    For a single run also its net position, where the tracker had a batch of its own.

    Parameters
    ----------
    runs, ax, options:
        As for `curve`.
    """
    named = open_runs(runs)
    alone = next(iter(named.values())) if len(named) == 1 else None
    if alone is not None and NET_POSITION in alone and np.isfinite(curve_of(alone, NET_POSITION).mean).any():
        ax = _position(named, ax, **options)
        ax = curve(named, NET_POSITION, ax, color=style.NET, label="net, of the fall of the loss")
        ax.set_ylabel(LABELS[POSITION])
        if options.get("legend", True):
            style.legend(ax, 2)
        return ax
    return _position(named, ax, **options)


def _position(named: Runs, ax: Axes | None = None, **options: Any) -> Axes:
    """The first-order positions: see `chi_pos`."""
    if not all(POSITION in run for run in named.values()):
        own = {"label": "of the batch"} if len(named) == 1 else {}
        ax = curve(named, "chi_pos", ax, **own | options)
        if len(named) == 1:
            _mark_no_preference(ax, next(iter(named.values())))
        return ax
    if len(named) == 1:
        ax = curve(named, "chi_pos", ax, color=style.BATCH, linestyle="--", label="of the batch")
        ax = curve(named, POSITION, ax, **{"label": "of the population"} | options)
        _mark_no_preference(ax, next(iter(named.values())))
        if options.get("legend", True):
            style.legend(ax, 2)
        return ax
    return curve(named, POSITION, ax, **options)


def _mark_no_preference(ax: Axes, run: History) -> None:
    """A line at 1 / (N K), the position of a batch's gradient without preference, where it is near what is shown."""
    terms, (low, high) = run.numbers("samples")[-1] * run.numbers("outputs")[-1], ax.get_ylim()
    value = 1 / terms if terms > 0 else np.nan
    if low / ROOM < value < high * ROOM:
        _mark_level(ax, value, "no preference (batch)", side="left")  # at the right the positions come down to it


def _mark_level(ax: Axes, value: float, text: str, side: Literal["left", "right"] = "right") -> None:
    """A dotted line across the axes, with what it is at one end."""
    ax.axhline(value, color=style.BATCH, linewidth=1, linestyle=":")
    at, place = (float(side == "right"), value), ("axes fraction", "data")
    ax.annotate(text, at, xycoords=place, ha=side, va="bottom", fontsize="small", color="#555")


@parameters_of(curve)
def noise_scale(runs: RunSources, ax: Axes | None = None, **options: Any) -> Axes:
    """The gradient noise scale over the steps; for a single run with the size of the batch beside it.

    Where the population's rate is within two standard errors of zero, a triangle that points up is a lower limit.

    Parameters
    ----------
    runs, ax, options:
        As for `curve`.
    """
    named = open_runs(runs)
    ax = curve(named, NOISE_SCALE, ax, **options)
    samples = next(iter(named.values())).get("samples")
    if len(named) == 1 and len(samples):
        _mark_level(ax, samples[-1], f"batch of {samples[-1]:.0f}")
    return ax


def _draw_line(ax: Axes, averaged: Curve, logarithmic: bool, single: bool, line: dict[str, Any]) -> None:
    """One run's curve with its band, and marks where a value has no place on the axis."""
    few = {"marker": "o", "markersize": 2.2} if len(averaged.step) < 60 else {}
    visible = (style.positive if logarithmic else style.finite)(averaged.mean)
    if np.isfinite(visible).any():
        (drawn,) = ax.plot(averaged.step, visible, **{"linewidth": 1.8 if single else 1.4} | few | line)
        if line.get("linestyle") == "--" and line["color"] == style.FROZEN:
            drawn.set_gid(style.FROZEN_LINE)
        _draw_band(ax, averaged, line["color"], single, logarithmic)
    if logarithmic:
        _mark_outside(ax, averaged.step[averaged.mean <= 0], 0.02, "v", line["color"], style.OUTSIDE)
    unknown = averaged.mean == np.inf
    limited = unknown & np.isfinite(averaged.low) & (averaged.low > 0)
    if limited.any():  # lower limits, as triangles that point up
        marks = {"alpha": 0.6, "markersize": 4, "gid": style.LIMIT}
        ax.plot(averaged.step[limited], averaged.low[limited], "^", color=line["color"], **marks)
    _mark_outside(ax, averaged.step[unknown & ~limited], 0.98, "^", line["color"], style.ABOVE)


def _make_room(ax: Axes) -> None:
    """Room around a quantity that does not change."""
    low, high = ax.dataLim.y0, ax.dataLim.y1
    if np.isfinite(low) and not high - low > 1e-9 * abs(low):
        ax.set_ylim((low / 2, low * 2) if ax.get_yscale() == "log" else (low - 1, low + 1))


def _draw_band(ax: Axes, averaged: Curve, colour: Colour, single: bool, logarithmic: bool) -> None:
    """One standard error to each side."""
    low, high = averaged.low, averaged.high
    if logarithmic:
        floor = 0.3 * np.nanmin(style.positive(averaged.mean))
        low = np.maximum(low, floor)
        high = np.where(high > floor, high, np.nan)
    shown = np.isfinite(high)  # and then the others are
    if shown.any():
        looks: dict[str, Any] = {"alpha": 0.22 if single else 0.08, "linewidth": 0}
        ax.fill_between(averaged.step, low, high, where=shown, color=colour, **looks).set_gid(style.ERROR)


def _draw_measurements(ax: Axes, run: History, column: str, averaged: Curve, colour: Colour, logarithmic: bool) -> None:
    """The single measurements as dots, and the windows that they were averaged over as bars."""
    visible = style.positive if logarithmic else style.finite
    wide = averaged.last > averaged.first
    if wide.any() and len(run) <= 10 * MOST_POINTS and column != NOISE_SCALE:
        dots: dict[str, Any] = {"color": colour, "alpha": 0.25, "markersize": 3, "markeredgewidth": 0}
        ax.plot(run["step"], visible(run.get(column)), ".", gid=style.SINGLES, **dots)
    if "window" in run and wide.any():
        bars = visible(averaged.mean)[wide], averaged.first[wide], averaged.last[wide]
        ax.hlines(*bars, color=colour, linewidth=3.0, alpha=0.9).set_gid(style.WINDOW)


def _mark_outside(ax: Axes, step: np.ndarray, height: float, marker: str, colour: Colour, meaning: str) -> None:
    """Marks at the axis's foot or top, for values that have no place on it."""
    if len(step):
        ax.plot(
            step, np.full(len(step), height), marker, color=colour, alpha=0.6, markersize=4, markeredgewidth=0,
            transform=ax.get_xaxis_transform(), clip_on=False, gid=meaning,
        )  # fmt: skip
