"""What a ladder of runs shows: averages over seeds, spectral reach, and whether the paper's effects are there."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

WINDOW = 3
"""Measurements that are averaged before the lowest position is taken, so that a lucky one does not count."""


@dataclass(frozen=True)
class Curve:
    """A quantity along a run: mean over seeds and its standard error, (points,) each."""

    steps: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray


@dataclass(frozen=True)
class Value:
    """A number with its standard error over seeds; nan for a single seed."""

    mean: float
    stderr: float


def networks(rows: list[dict[str, Any]]) -> list[str]:
    """The runs' names in the order they were made."""
    return list(dict.fromkeys(row["network"] for row in rows))


def table(rows: list[dict[str, Any]], network: str, column: str) -> np.ndarray:
    """(seeds, points) values of a column."""
    own = [row for row in rows if row["network"] == network]
    seeds = sorted({row["seed"] for row in own})
    return np.array([[row[column] for row in own if row["seed"] == seed] for seed in seeds], dtype=float)


def curve(rows: list[dict[str, Any]], network: str, column: str) -> Curve:
    """A column along the run."""
    values = table(rows, network, column)
    return Curve(table(rows, network, "step")[0], values.mean(axis=0), _stderr(values))


def final(rows: list[dict[str, Any]], network: str, column: str) -> Value:
    """A column at the last step."""
    last = table(rows, network, column)[:, -1]
    return Value(float(last.mean()), float(_stderr(last)))


def reach(rows: list[dict[str, Any]], network: str) -> Value:
    """Spectral reach: the lowest population position, averaged over a window of measurements, that a run attains."""
    lowest = np.array([_smoothed(positions).min() for positions in table(rows, network, "population/chi_pos")])
    return Value(float(lowest.mean()), float(_stderr(lowest)))


def growth(rows: list[dict[str, Any]], network: str, column: str) -> Value:
    """Last value of a column divided by its first."""
    values = table(rows, network, column)
    ratios = values[:, -1] / values[:, 0]
    return Value(float(ratios.mean()), float(_stderr(ratios)))


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """What was found about the paper's three claims, in words, either way."""
    free = [n for n in networks(rows) if not _is_frozen(rows, n)]
    frozen = [n for n in networks(rows) if _is_frozen(rows, n)]
    return [_falls(rows, free), _ladder(rows, free), *(_stall(rows, n, free) for n in frozen)]


def _falls(rows: list[dict[str, Any]], free: list[str]) -> str:
    falls = {n: reach(rows, n).mean / curve(rows, n, "population/chi_pos").mean[0] for n in free}
    verdict = (
        "Learning moves into the tail"
        if all(f < 0.5 for f in falls.values())
        else "Learning does not move into the tail"
    )
    return (
        f"{verdict}: chi_pos falls to "
        + ", ".join(f"{f:.2g} ({n})" for n, f in falls.items())
        + " of its value at the start."
    )


def _ladder(rows: list[dict[str, Any]], free: list[str]) -> str:
    reaches = [reach(rows, n) for n in free]
    steps = [(a.mean - b.mean, np.hypot(a.stderr, b.stderr)) for a, b in pairwise(reaches)]
    shown = ", ".join(f"{r.mean:.2g} ± {r.stderr:.1g} ({n})" for n, r in zip(free, reaches, strict=True))
    clear = all(gap > 2 * error for gap, error in steps)
    ordered = all(gap > 0 for gap, _ in steps)
    verdict = (
        "Larger networks reach further into the tail" if clear
        else "Larger networks reach further, but not beyond two standard errors at every step" if ordered
        else "Larger networks do not reach further in this run"
    )  # fmt: skip
    return f"{verdict}: {shown}."


def _stall(rows: list[dict[str, Any]], network: str, free: list[str]) -> str:
    width = next(row["width"] for row in rows if row["network"] == network)
    twins = [n for n in free if next(row["width"] for row in rows if row["network"] == n) == width]
    if not twins:
        return f"No network of {width} units with trained features to compare the frozen ones with."
    here, there = reach(rows, network), reach(rows, twins[0])
    stalls = here.mean - there.mean > 2 * np.hypot(here.stderr, there.stderr)
    return (
        f"{'Frozen features stall' if stalls else 'Frozen features do not stall in this run'}: reach {here.mean:.2g} "
        f"against {there.mean:.2g}, loss {final(rows, network, 'loss').mean:.3g} against "
        f"{final(rows, twins[0], 'loss').mean:.3g}; chi_net grows by {growth(rows, network, 'chi_net').mean:.2f} "
        f"against {growth(rows, twins[0], 'chi_net').mean:.2f}."
    )


def _is_frozen(rows: list[dict[str, Any]], network: str) -> bool:
    return next(row["frozen"] for row in rows if row["network"] == network)


def _smoothed(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")


def _stderr(values: np.ndarray) -> np.ndarray:
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return values.std(axis=0, ddof=1) / np.sqrt(len(values))
