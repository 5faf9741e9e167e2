"""What the studies share: how figures look and where they go, schedules, and endless data."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import threadpoolctl

mpl.use("Agg")
import matplotlib.pyplot as plt

FIGURES = Path(__file__).parent / "figures"
START = time.perf_counter()
threadpoolctl.threadpool_limits(1)  # threads of products this small wait for each other more than they compute
COLORS = plt.get_cmap("viridis")

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.4,
        "figure.constrained_layout.use": True,
    }
)


def shades(count: int) -> list:
    """Colours from small to large."""
    return [COLORS(x) for x in np.linspace(0.9, 0.05, count)]


def save(figure: plt.Figure, name: str) -> None:
    """Write the figure, and say where and after how long."""
    FIGURES.mkdir(exist_ok=True)
    path = FIGURES / f"{name}.png"
    figure.savefig(path)
    print(f"wrote {path} after {time.perf_counter() - START:.0f} s")


def schedule(steps: int, points: int) -> list[int]:
    """Steps to measure at: 0, and from 1 to `steps` evenly in the logarithm."""
    return [0, *sorted({int(x) for x in np.geomspace(1, steps, points).round()})]


def positive(axis: plt.Axes, x: list, y: list, errors: list, **style) -> None:
    """A curve with error bars on logarithmic axes; what is not an error above zero is a triangle at its upper end."""
    x, y, e = (np.asarray(values, dtype=float) for values in (x, y, errors))
    seen = y > e
    axis.errorbar(x[seen], y[seen], e[seen], marker=".", **style)
    axis.plot(x[~seen], (np.maximum(y, 0) + e)[~seen], "v", ms=4, alpha=0.6, color=style.get("color"))
