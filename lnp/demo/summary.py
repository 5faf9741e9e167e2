"""What a ladder of runs shows: averages over seeds, spectral reach, and whether the paper's effects are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lnp.demo.run import Ladder
from lnp.runs import curves
from lnp.runs.seeds import mean_over_seeds
from lnp.runs.spectral_reach import Reach, reach_of_runs
from lnp.tracking.history import History


@dataclass(frozen=True)
class Value:
    """A number with its standard error over seeds; nan for a single seed."""

    mean: float
    stderr: float


def last_value(runs: Sequence[History], column: str) -> Value:
    """A column at the last step."""
    return _value([curves.curve(run, column).mean[-1] for run in runs])


def growth(runs: Sequence[History], column: str) -> Value:
    """Last value of a column divided by its first."""
    lines = [curves.curve(run, column).mean for run in runs]
    return _value([line[-1] / line[0] for line in lines])


def reach(runs: Sequence[History]) -> Reach:
    """The spectral reach that `lnp compare` shows for each run, averaged over seeds."""
    return reach_of_runs([curves.reach(run) for run in runs])


def findings(ladder: Ladder) -> list[str]:
    """A sentence on each of the paper's three claims, whether the runs show it or not."""
    free = {network: runs for network, runs in ladder.items() if not is_frozen(runs)}
    frozen = [runs for runs in ladder.values() if is_frozen(runs)]
    return [_position_falls(free), _reach_grows(free), *(_frozen_stalls(runs, free) for runs in frozen)]


def is_frozen(runs: Sequence[History]) -> bool:
    """Whether the network's features are frozen."""
    return bool(runs[0]["frozen"][0])


def _position_falls(free: Ladder) -> str:
    """Whether learning moves into the tail: the reach is less than half of the position at the start, in every run."""
    reaches = {n: reach(runs) for n, runs in free.items()}
    falls = {
        n: (found.chi_pos if found.resolved else found.limit) / mean_over_seeds(free[n], curves.POSITION).mean[0]
        for n, found in reaches.items()
    }
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


def _reach_grows(free: Ladder) -> str:
    """Whether larger networks reach further: beyond two standard errors at every step of the ladder."""
    reaches = {n: reach(runs) for n, runs in free.items()}
    steps = [(a.chi_pos - b.chi_pos, np.hypot(a.stderr, b.stderr)) for a, b in pairwise(reaches.values())]
    shown = ", ".join(f"{r} ({n})" for n, r in reaches.items())
    clear = all(gap > 2 * error for gap, error in steps)
    ordered = all(gap > 0 for gap, _ in steps)
    verdict = (
        "Larger networks reach further into the tail" if clear
        else "Larger networks reach further, but not beyond two standard errors at every step" if ordered
        else "Larger networks do not reach further in this run"
    )  # fmt: skip
    return f"{verdict}: {shown}."


def _frozen_stalls(runs: Sequence[History], free: Ladder) -> str:
    """Whether a network with frozen features stalls above the one of the same width with trained features."""
    width = runs[0]["width"][0]
    twin = next((own for own in free.values() if own[0]["width"][0] == width), None)
    if twin is None:
        return f"No network of {width} units with trained features to compare the frozen ones with."
    own, other = reach(runs), reach(twin)
    losses = [last_value(network, "loss").mean for network in (runs, twin)]
    stalls = own.chi_pos - other.chi_pos > 2 * np.hypot(own.stderr, other.stderr)
    return (
        f"{'Frozen features stall' if stalls else 'Frozen features do not stall in this run'}: reach {own} "
        f"against {other}, loss {losses[0]:.3g} against {losses[1]:.3g}; "
        f"chi_net grows by {growth(runs, 'chi_net').mean:.2f} against {growth(twin, 'chi_net').mean:.2f}."
    )


def _value(values: Sequence[float]) -> Value:
    stderr = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Value(float(np.mean(values)), float(stderr))
