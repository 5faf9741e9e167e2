"""Power laws through points, with what the fit says of itself in the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.plot import style
from lnp.results.rounding import with_error
from lnp.runs.power_law import PowerLaw
from lnp.runs.power_law import power_law as fitted
from lnp.runs.spectral_reach import Reach
from lnp.runs.table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def power_law(
    sizes: Sequence[float],
    values: Sequence[float | Reach],
    stderrs: Sequence[float] | None = None,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: Any = style.SINGLE,
    offset: bool = False,
    legend: bool = True,
) -> Axes:
    """Points with their errors and the power law through them, `lnp.power_law`, with a band of one standard error.

    The legend has the exponent, and chi^2 per degree of freedom: about 1 where the points lie on the law. Values that
    are `lnp.Reach` and not resolved are upper limits, triangles with an arrow.

    Parameters
    ----------
    sizes:
        Parameters, or compute (6 N D); positive.
    values, stderrs:
        Positive numbers with their standard errors, or `lnp.Reach` objects, which have their own.
    label, color:
        Of the points.
    offset:
        Whether the law has a constant that no size gets below. Needs SciPy, as do limits.
    legend:
        Draw a legend, with the law's exponent.

    Raises
    ------
    ValueError
        For fewer sizes than the law needs, lists of different lengths, and values that have no logarithm.
    ImportError
        If SciPy is needed and not installed.
    """
    law = fitted(sizes, values, stderrs, offset=offset)
    ax = style.axes(ax)
    ax.set(xscale="log", yscale="log")
    errors = [math.nan] * len(sizes) if stderrs is None else stderrs
    points = [v if isinstance(v, Reach) else Reach(v, e, math.nan, 1) for v, e in zip(values, errors, strict=True)]
    for index, (size, point) in enumerate(zip(sizes, points, strict=True)):
        known = point.resolved or not math.isfinite(point.stderr)
        draw_reach(ax, size, point, known, color=color, label=label if index == 0 else None)
    draw_law(ax, law, min(sizes), max(sizes), color=color, told=legend)
    style.tidy(ax, "size", "")
    if legend:
        ax.legend(**style.LEGEND)
    return ax


def draw_law(ax: Axes, law: PowerLaw, low: float, high: float, *, color: Any, told: bool = True) -> None:
    """The law from one size to another with its band; where it is told, its exponent is in the legend."""
    grid = np.geomspace(low, high, 60)
    value, error = np.transpose([law.predict(size) for size in grid])
    words = f"power law, exponent {with_error(law.exponent, law.exponent_stderr)}"
    if math.isfinite(law.chi_square_per_degree):
        words += f"\n$\\chi^2$ per degree {number(law.chi_square_per_degree)}"
    ax.plot(grid, value, color=color, linewidth=1, linestyle="-.", label=words if told else None)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(error) & (error < 10 * value)  # further out the band would be all that is seen
    if known.any():
        lower = np.maximum(value - error, value / 10)
        band = ax.fill_between(grid, lower, value + error, where=known, color=color, alpha=0.12, linewidth=0)
        band.set_gid(style.ERROR)


def draw_reach(ax: Axes, at: float, found: Reach, known: bool | None = None, **options: Any) -> None:
    """A reach with its standard error on a logarithmic axis, or its upper limit as a triangle with an arrow."""
    if found.resolved if known is None else known:
        error = float(np.nan_to_num(found.stderr))
        drawn = ax.errorbar(at, found.chi_pos, error, **{"fmt": "o", "markersize": 6, "capsize": 2} | options)
    else:
        limit = {"fmt": "v", "markersize": 6, "capsize": 2, "uplims": True}
        drawn = ax.errorbar(at, found.limit, 0.35 * found.limit, **limit | options)
        drawn.lines[0].set_gid(style.UPPER)
