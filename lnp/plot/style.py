"""What all figures share: axes, colours, legends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.optional import import_optional
from lnp.runs.curves import size
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


def axes(ax: Axes | None = None) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    return figure(6.0, 4.0).subplots()


def figure(width: float, height: float) -> Figure:
    """A figure of this size in inches. In a notebook and with a window it is pyplot's, so that it is shown."""
    pyplot = import_optional("matplotlib.pyplot", "lnp.plot", install="'lnp[plot]'", library="matplotlib")
    return pyplot.figure(figsize=(width, height), layout="constrained")


def tidy(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, no frame above and to the right, a faint grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)


def step_axis(ax: Axes) -> None:
    """Steps: linear up to 1, so that 0 has a place, and logarithmic above."""
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    ax.set_xlim(left=-0.15)  # room for the mark at step 0
    from matplotlib.ticker import FixedLocator

    top = max(ax.dataLim.x1, 1.0) if np.isfinite(ax.dataLim.x1) else 1.0
    decades = int(np.floor(np.log10(top)))
    every = 1 + decades // 6
    ax.xaxis.set_major_locator(FixedLocator([0, *(10.0**k for k in range(0, decades + 1, every))]))
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
        ax.legend(frameon=False, fontsize="small")
    else:
        ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))


def positive(values: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis: nan where they have no place on it."""
    with np.errstate(invalid="ignore"):
        return np.where((values > 0) & np.isfinite(values), values, np.nan)


def finite(values: np.ndarray) -> np.ndarray:
    """Values for a linear axis: nan where they have no place on it."""
    return np.where(np.isfinite(values), values, np.nan)
