"""The demo's figure: loss, network scale and spectral position over the steps, and reach against size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lnp.demo.summary import curve, networks, reach, table

PANELS = (
    ("loss", "loss", "linear"),
    ("chi_net", r"network scale  $\chi_\mathrm{net}$", "log"),
    ("population/chi_pos", r"spectral position  $\chi_\mathrm{pos}$", "log"),
)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figure as PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The figure needs matplotlib, which is not installed. Run: pip install 'lnp[demo]'"
        ) from error
    figure = Figure(figsize=(9.5, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    styles = _styles(rows)
    for letter, ax, (column, label, scale) in zip("abc", axes, PANELS, strict=False):
        for network, style in styles.items():
            _line(ax, rows, network, column, style)
        ax.set(xscale="symlog", yscale=scale, xlabel="training step", ylabel=label, xlim=(0, None))
        ax.set_title(letter, loc="left", fontweight="bold")
    _reach(axes[3], rows, styles)
    axes[0].legend(title="hidden layer", frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=160)


def _styles(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Darker is wider; frozen features are dashed, in another colour."""
    from matplotlib import colormaps

    names = networks(rows)
    free = [n for n in names if "frozen" not in n]
    shades = colormaps["viridis"](np.linspace(0.75, 0.05, len(free)))
    styles: dict[str, dict[str, Any]] = {n: {"color": shade} for n, shade in zip(free, shades, strict=True)}
    return styles | {n: {"color": "tab:red", "linestyle": "--"} for n in names if n not in styles}


def _line(ax: Any, rows: list[dict[str, Any]], network: str, column: str, style: dict[str, Any]) -> None:
    line = curve(rows, network, column)
    ax.plot(line.steps, line.mean, label=network, linewidth=1.8, **style)
    low, high = line.mean - line.stderr, line.mean + line.stderr
    ax.fill_between(line.steps, np.maximum(low, 0.02 * line.mean), high, color=style["color"], alpha=0.2, linewidth=0)


def _reach(ax: Any, rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for network, style in styles.items():
        value, size = reach(rows, network), table(rows, network, "parameters")[0, 0]
        marker = {"marker": "s", "fillstyle": "none"} if "linestyle" in style else {"marker": "o"}
        ax.errorbar(
            size,
            value.mean,
            yerr=value.stderr,
            color=style["color"],
            capsize=3,
            markersize=7,
            linestyle="none",
            **marker,
        )
        ax.annotate(network, (size, value.mean), xytext=(9, 3), textcoords="offset points", fontsize=9)
    ax.set(
        xscale="log", yscale="log", xlabel="trained parameters", ylabel=r"spectral reach  (lowest $\chi_\mathrm{pos}$)"
    )
    ax.margins(x=0.3)
    ax.set_title("d", loc="left", fontweight="bold")
