"""What the studies share: how figures look and where they go, schedules, and data without end."""

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


def film_strip(axis: plt.Axes, spectra: dict, decades: int = 6, bins: int = 24) -> None:
    """The share of the loss decrease against the eigenvalue, one frame for each {step: Spectrum}, from top to bottom.

    Eigenvalues are in units of the kernel's trace, so that the mean of the loss gradient's share, the line, is chi_pos,
    the triangle. Eigenvalues below the axis are counted in its first bin.
    """
    edges = np.logspace(-decades, 0, bins + 1)
    widths = np.diff(edges)
    for frame, (label, s) in enumerate(spectra.items()):
        base = -1.15 * frame
        at = np.clip(s.eigenvalues / s.trace, edges[0], edges[-1] * 0.999)
        weights, shares = (np.histogram(at, edges, weights=part)[0] for part in (s.weights, s.shares))
        axis.bar(edges[:-1], shares, widths, base, align="edge", color="C0", label="share of the loss decrease")
        axis.step([*edges, edges[-1]], [base, *(base + weights), base], "C1", where="pre", label="share of $||g||^2$")
        axis.plot(s.chi_pos, base, "k^", ms=5, clip_on=False, label="$\\chi_{pos}$")
        axis.text(edges[0] * 2.2, base + 0.55, f"step {label}:  $\\chi_{{pos}}$ = {s.chi_pos:.2g}", fontsize=8)
        axis.axhline(base, color="0.7", lw=0.6)
        if frame == 0:
            axis.legend(loc="upper right", ncols=3)
    axis.set(xscale="log", yticks=[], ylim=(-1.15 * (len(spectra) - 1) - 0.05, 1.75))
    axis.set(xlabel="eigenvalue / trace", title="where in the spectrum the loss falls")
    axis.spines["left"].set_visible(False)
