"""The demo's figure: loss, network scale and spectral position over the steps, and reach against size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnp import plot
from lnp.demo.run import Ladder
from lnp.demo.summary import is_frozen, reach
from lnp.plot import style
from lnp.plot.laws import draw_reach
from lnp.runs.curves import POSITION, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = ("loss", "chi_net", POSITION)


def draw(ladder: Ladder, path: Path) -> None:
    """Write the figure as PNG: means over seeds with their standard errors."""
    figure = style.figure(9.5, 6.6)
    axes = figure.subplots(2, 2).ravel()
    for ax, column in zip(axes, PANELS, strict=False):
        plot.over_seeds(ladder, column, ax, legend=False)
    _draw_reach(axes[3], ladder)
    axes[0].legend(title="hidden layer", frameon=False)
    for letter, ax in zip("abcd", axes, strict=True):
        ax.set_title(letter, loc="left", fontweight="bold")
    figure.savefig(path, dpi=160)


def _draw_reach(ax: Axes, ladder: Ladder) -> None:
    """Spectral reach against size, one point with its error for each network."""
    ax.set(xscale="log", yscale="log")
    lines = style.lines({network: runs[0] for network, runs in ladder.items()})
    for (network, runs), line in zip(ladder.items(), lines, strict=True):
        found = reach(runs)
        marker: dict[str, Any] = {"fillstyle": "none"} if is_frozen(runs) else {}
        draw_reach(ax, size(runs[0]), found, color=line["color"], capsize=3, markersize=7, **marker)
        at = (size(runs[0]), found.chi_pos if found.resolved else found.limit)
        ax.annotate(network, at, xytext=(9, 3), textcoords="offset points", fontsize=9)
    ax.margins(x=0.3, y=0.15)
    style.log_ticks(ax.xaxis)
    style.log_ticks(ax.yaxis)
    style.tidy(ax, "trained parameters", r"spectral reach  (lowest $\chi_\mathrm{pos}$)")
