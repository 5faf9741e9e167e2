"""Draws what a benchmark has written: `python benchmarks/figure.py torch` makes results/torch.png from its numbers.

Times of each model's cases as multiples of a training step's gradient, on top; how they grow with one size, below.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib
from report import RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

Row = dict[str, Any]
PEERS = "0.6"
COLUMNS = 3


def bars(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """{model: rows with a time}."""
    found: dict[str, list[Row]] = {}
    for heading, rows in tables.items():
        for row in rows:
            if "case" in row and isinstance(row.get("time"), int | float) and not heading.startswith("Growth"):
                found.setdefault(row.get("model") or heading.split(":")[0], []).append(row)
    return found


def lines(tables: dict[str, list[Row]]) -> dict[str, tuple[str, list[Row]]]:
    """{what grows: (the column that does, rows)}."""
    found = {}
    for heading, rows in tables.items():
        numbers = [name for name, value in rows[0].items() if isinstance(value, int | float)]
        if heading.startswith("Growth") and numbers:
            column = "size" if "size" in rows[0] else numbers[0]
            found[heading.removeprefix("Growth with ").split(":")[0]] = (column, rows)
    return found


def draw_bars(ax: Any, model: str, rows: list[Row]) -> None:
    """Horizontal bars on a logarithmic axis, the step's at 1."""
    names = [row["case"] for row in rows][::-1]
    times = [row["time"] for row in rows][::-1]
    colours = ["C0" if "lnp" in name else "k" if "step" in name else PEERS for name in names]
    ax.barh(names, times, color=colours)
    for place, time in enumerate(times):
        ax.text(time * 1.05, place, f"{time:.2f}" if time < 10 else f"{time:.0f}", va="center", fontsize=7)
    ax.axvline(1, color="k", lw=0.8)
    ax.set(xscale="log", xlabel="time / step")
    ax.set_title(model, fontsize=9, loc="right")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(right=max(times) ** 1.15 * 1.3)
    ax.tick_params(axis="y", labelsize=7)


def draw_lines(ax: Any, what: str, column: str, rows: list[Row]) -> None:
    """One line a case."""
    for name in dict.fromkeys(name for row in rows for name in row if "lnp" in name and "memory" not in name):
        points = [(row[column], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        ax.plot(*zip(*points, strict=True), "-o", ms=3, label=name)
    ax.set(xlabel=what, ylabel="time / step", ylim=(0, None))
    if isinstance(rows[0][column], int | float):
        ax.set_xscale("log")
        ax.set_xticks([row[column] for row in rows], [str(row[column]) for row in rows])
        ax.minorticks_off()


def panels(figure: Any, count: int) -> list[Any]:
    """As many axes, in rows."""
    axes = list(figure.subplots(-(-count // COLUMNS), COLUMNS, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]


def main(name: str) -> None:
    """Read, draw, write."""
    tables = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["tables"]
    above, below = bars(tables), lines(tables)
    heights = [-(-len(part) // COLUMNS) for part in (above, below) if part]
    fig = plt.figure(figsize=(4.6 * COLUMNS, 3.3 * sum(heights)), layout="constrained")
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, (model, rows) in zip(panels(parts[0], len(above)), above.items(), strict=True):
        draw_bars(ax, model, rows)
    if below:
        axes = panels(parts[-1], len(below))
        for ax, (what, (column, rows)) in zip(axes, below.items(), strict=True):
            draw_lines(ax, what, column, rows)
        axes[0].legend(fontsize=6, frameon=False)
    fig.savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
