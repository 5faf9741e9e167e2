"""What all figures share: axes, colours, legends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.optional import import_optional
from lnp.runs.curves import is_frozen, size
from lnp.runs.open_runs import Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SINGLE = "#1f5a99"
"""The colour of a run that is alone in its figure."""
BATCH = "#8a8a8a"
"""The colour of what belongs to the batch, beside the population's."""
NET = "#c4572a"
"""The colour of the net position, beside those of first order."""
FROZEN = "#d62728"
"""The colour of runs with frozen features, which are dashed."""
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": "small"}
"""How legends look."""
OWN = "lnp"
"""Figures that lnp has made for one axes, and may write below."""
ERROR, WINDOW, SINGLES, END = "one standard error", "window", "single measurement", "end of the run"
LIMIT, UPPER = "lower limit", "upper limit"
OUTSIDE, ABOVE = "at the foot: not above zero", "at the top: not resolved"
FROZEN_LINE = "frozen features"
MARKS: dict[str, dict[str, Any]] = {
    WINDOW: {"linewidth": 3},
    SINGLES: {"marker": ".", "alpha": 0.6},
    ERROR: {"linewidth": 7, "alpha": 0.25},
    END: {"marker": "o", "markersize": 5},
    LIMIT: {"marker": "^", "markersize": 4},
    UPPER: {"marker": "v", "markersize": 6},
    OUTSIDE: {"marker": "v", "markersize": 4},
    ABOVE: {"marker": "^", "markersize": 4},
    FROZEN_LINE: {"color": FROZEN, "linestyle": "--", "linewidth": 1.4},
}
"""{what marks mean, which artists have as their group id: how they are shown beside it}."""


def axes(ax: Axes | None = None, height: float = 4.0) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    made = figure(6.0, height)
    made.set_gid(OWN)
    return made.subplots()


def figure(width: float, height: float) -> Figure:
    """A figure of this size in inches. In a notebook and with a window it is pyplot's, so that it is shown."""
    pyplot = import_optional("matplotlib.pyplot", "lnp.plot", install="'lnp[plot]'", library="matplotlib")
    return pyplot.figure(figsize=(width, height), layout="constrained")


def tidy(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, no frame above and to the right, a faint grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    if ax.figure.get_gid() == OWN:
        explain(ax.figure)


def explain(drawn: Any) -> None:
    """A line below a figure that says what each kind of marks in it means, as many as there are."""
    from matplotlib.lines import Line2D

    found = {artist.get_gid() for artist in drawn.findobj(lambda one: one.get_gid() in MARKS)}
    for old in list(drawn.legends):
        old.remove()
    plain = {"color": "#555555", "linewidth": 0}
    shown = [(Line2D([], [], **plain | options), mark) for mark, options in MARKS.items() if mark in found]
    if shown:
        columns = max(int(drawn.get_figwidth() / 1.95), 1)
        drawn.legend(*zip(*shown, strict=True), ncols=columns, loc="outside lower center", **LEGEND)


def step_axis(ax: Axes) -> None:
    """Steps: linear up to 1, so that 0 has a place, and logarithmic above."""
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    ax.set_xlim(left=-0.15)  # room for the mark at step 0
    from matplotlib.ticker import FixedLocator, FuncFormatter

    first, last = ax.dataLim.x0, ax.dataLim.x1
    top = max(last, 1.0) if np.isfinite(last) else 1.0
    decades = int(np.floor(np.log10(top)))
    every = 1 + decades // 6
    ticks = [0, *(10.0**k for k in range(0, decades + 1, every))]
    if 2 < first < last:  # saved checkpoints often begin late
        ax.set_xlim(left=first / 1.15)
        if last < 100 * first:
            ticks = [m * 10**k for k in range(decades + 1) for m in (1, 2, 5)]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    if 2 < first < last < 100 * first:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,g}"))
    minor = [m * 10.0**k for k in range(decades + 1) for m in range(2, 10)]
    ax.xaxis.set_minor_locator(FixedLocator(minor))


def log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis that do not run into each other where it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() != "log" or not 0 < low < high:
        return
    decades = np.log10(high / low)
    axis.set_minor_formatter(NullFormatter())
    if decades < 1.5:
        axis.set_major_locator(MaxNLocator(4) if decades < 0.7 else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def lines(runs: Runs) -> list[dict[str, Any]]:
    """Colour and kind of the line for each run: runs with the tag `frozen` are dashed, in a colour of their own."""
    free = {name: run for name, run in runs.items() if not is_frozen(run)}
    given = dict(zip(free, colours(free), strict=True)) if free else {}
    dashed = {"color": FROZEN, "linestyle": "--"}
    return [{"color": given[name]} if name in free else dashed for name in runs]


def colours(runs: Runs) -> list[Any]:
    """A colour for each run: by size, darker is larger, where sizes differ; otherwise distinct ones."""
    from matplotlib import colormaps

    count = len(runs)
    if count == 1:
        return [SINGLE]
    sizes = np.array([size(run) for run in runs.values()])
    if np.isfinite(sizes).all() and len(set(sizes)) > 1:
        rank = np.searchsorted(np.unique(sizes), sizes) / max(len(np.unique(sizes)) - 1, 1)
        return [colormaps["viridis"](0.85 * (1 - r)) for r in rank]
    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](x) for x in np.linspace(0.05, 0.95, count)]


def legend(ax: Axes, entries: int) -> None:
    """The runs' names, inside the axes where they are few, beside them where they are many."""
    if entries < 2 or not ax.get_legend_handles_labels()[0]:
        return
    if entries <= 4:
        ax.legend(**LEGEND)
    else:
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), **LEGEND)


def positive(values: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis: nan where they have no place on it."""
    with np.errstate(invalid="ignore"):
        return np.where((values > 0) & np.isfinite(values), values, np.nan)


def finite(values: np.ndarray) -> np.ndarray:
    """Values for a linear axis: nan where they have no place on it."""
    return np.where(np.isfinite(values), values, np.nan)
