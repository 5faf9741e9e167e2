"""Histories to draw, and what is found in a figure of them."""

from __future__ import annotations

import numpy as np

from lnp.tracking.history import History

WIDTH = 3
"""Measurements in a window."""


def run(seed=0, rows=60, layers=True, population=True, size=100, **replaced):
    """A run whose loss falls as 1 / (1 + step), with three layers."""
    generator = np.random.default_rng(seed)
    history = History()
    for step in range(rows):
        x = 1 / (1 + step)
        row = {"step": step, "loss": 2 * x, "rate": x * x, "chi_loss": x, "chi_net": 3.0 + step, "samples": 32}
        row |= {"chi_pos": 0.1 * x + 1e-3, "chi_net_stderr": 0.1, "chi_pos_stderr": 1e-4, "seconds": 0.01}
        row["window"] = WIDTH * (step // WIDTH)
        if population:
            values = {"chi_pos": 0.1 * x * generator.normal(1, 0.2), "rate": x * x, "noise_scale": 5.0 + step}
            row |= {f"population/{name}": value for name, value in values.items()}
        for index in range(3 if layers else 0):
            row |= {f"layer/{index}/{name}": (1 + index) * x for name in ("rate", "chi_net", "chi_pos")}
        history.append(row | ({"parameters": size} if size else {}) | replaced)
    return history


def steps(values, column="value", **others):
    """A run of one column, one value a step, of which each is a window of its own."""
    return History({"step": step, column: value, **others} for step, value in enumerate(values))


def means(values):
    """The mean of each window."""
    return np.asarray(values, dtype=float).reshape(-1, WIDTH).mean(axis=1)


def named(ax, label):
    """The one line with this label."""
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line


def marks(ax, meaning):
    """All artists that mean this in what is said below a figure."""
    return [artist for artist in (*ax.get_lines(), *ax.collections) if artist.get_gid() == meaning]


def points(line):
    """[(x, y)] of a line."""
    return list(zip(*(np.asarray(part).tolist() for part in line.get_data()), strict=True))


def edges(band):
    """{x: (lowest, highest)} of a band."""
    found = {}
    for path in band.get_paths():
        for x, y in path.vertices.tolist():
            low, high = found.get(x, (y, y))
            found[x] = min(low, y), max(high, y)
    return found


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    """The names in the legend; None without one."""
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else None


def below(ax):
    """What is said below a figure."""
    return [text.get_text() for legend in ax.figure.legends for text in legend.get_texts()]
