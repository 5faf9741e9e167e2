"""The position over the batch size: the floor that a finite batch puts under it, and the population's without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lnp.batches.nested import NestedBatches
from lnp.estimators.population import INTERVAL
from lnp.plot import style
from lnp.plot.lines import LABELS, STEP, curve
from lnp.runs.curves import POSITION
from lnp.runs.open_runs import RunSources, open_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lnp.estimators.population import Population

TICKS = 10
"""Batch sizes that have a tick each."""


def nested_batches(nested: NestedBatches, ax: Axes | None = None) -> Axes:
    """The position of each batch over its size, from `lnp.decompose_nested`, with the population's as a line.

    The dashed line is what the population's values of the largest batch let expect of each size. The population's
    position has a band of one standard error; within two of zero it is an upper limit, a line with an arrow.
    """
    ax = style.axes(ax)
    ax.set(xscale="log", yscale="log")
    sizes = np.array(nested.batch_sizes, dtype=float)
    positions = np.array([d.chi_pos for d in nested.decompositions])
    errors = np.nan_to_num([d.chi_pos_stderr for d in nested.decompositions])
    ax.errorbar(sizes, style.positive(positions), errors, fmt="o", color=style.BATCH, capsize=2, label="of the batch")
    if nested.population is not None:
        smooth = np.geomspace(sizes[0], sizes[-1], 50)
        expected = np.array([nested.expected_chi_pos(size) for size in smooth])
        ax.plot(smooth, style.positive(expected), "--", color=style.BATCH, linewidth=1, label="expected")
        _draw_population(ax, nested.population, sizes)
    if len(sizes) <= TICKS:
        ax.minorticks_off()
        ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    style.log_ticks(ax.yaxis)
    style.tidy(ax, "samples in the batch", r"spectral position  $\chi_\mathrm{pos}$")
    ax.legend(**style.LEGEND)
    return ax


def nested_sizes(run: RunSources, ax: Axes | None = None) -> Axes:
    """The position over the steps for each batch size, of a run whose checkpoints were measured with `nested=`.

    Darker is larger; the whole batch is the darkest, and the population's position, which has no floor, is in colour.

    Raises
    ------
    ValueError
        For several runs, and for a run without nested batches.
    """
    named = open_runs(run)
    history = next(iter(named.values())) if len(named) == 1 else None
    sizes = sorted(int(size) for name in (history.columns if history else ()) if (size := _size_in(name)))
    if history is None or not sizes:
        what = f"{len(named)} runs" if history is None else "a run without nested batches"
        raise ValueError(f"nested_sizes() received {what}. Expected one run, measured with nested=True.")
    columns = {f"{size} samples": f"nested/{size}/chi_pos" for size in sizes}
    whole = history["samples"][-1] if "samples" in history else None
    columns["whole batch" if whole is None else f"{whole:.0f}, the whole batch"] = "chi_pos"
    ax = style.axes(ax)
    for index, (label, column) in enumerate(columns.items()):
        shade = str(0.75 - 0.65 * index / (len(columns) - 1))
        curve(named, column, ax, color=shade, label=label)
    if POSITION in history:
        curve(named, POSITION, ax, color=style.SINGLE, label="of the population")
    style.tidy(ax, STEP, LABELS[POSITION])
    style.legend(ax, len(columns))
    return ax


def _size_in(column: str) -> str:
    """The size in the name of a column of positions, "nested/8/chi_pos"; "" for other columns."""
    parts = column.split("/")
    return parts[1] if len(parts) == 3 and (parts[0], parts[2]) == ("nested", "chi_pos") else ""


def _draw_population(ax: Axes, population: Population, sizes: np.ndarray) -> None:
    """The population's position as a line with a band, or as an upper limit."""
    value, error = population.chi_pos, population.chi_pos_stderr
    colour = style.SINGLE
    if value > INTERVAL * error:
        ax.axhline(value, color=colour, linewidth=1.5, label="of the population")
        ax.axhspan(value - error, value + error, color=colour, alpha=0.15, linewidth=0)
    elif np.isfinite(error):
        limit = max(value, 0.0) + INTERVAL * error
        middle = float(np.sqrt(sizes[0] * sizes[-1]))
        ax.axhline(limit, color=colour, linewidth=1.5, linestyle=":", label="of the population, below")
        ax.plot(middle, limit, marker="v", markersize=6, color=colour)
