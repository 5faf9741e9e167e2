"""Two runs, one question: by which factor does the loss of one fall faster than that of the other?

    rate = chi_loss * chi_net * chi_pos

so that the ratio of two rates is the product of three ratios, and the one that is far from 1 is the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lnp.runs.curves import curve
from lnp.runs.open_runs import RunSources, open_runs
from lnp.runs.spectral_reach import RESOLVED
from lnp.runs.table import aligned, integer, number, with_error
from lnp.tracking.history import History

ENDS = ("run", "window at", "rate", "chi_loss", "chi_net", "chi_pos")
RATES = {
    "net/rate": "the net rate, as the loss on the tracker's own batch really fell",
    "population/rate": "the population's rate for gradient descent, without the noise of the batch",
    "rate": "the batch's rate for gradient descent, which has its noise in it",
}
"""{column: what it is}; the factors stand beside each, and chi_pos is what makes their product the rate."""


@dataclass(frozen=True)
class End:
    """Factors of a run's last window with a rate: `chi_pos` is rate / (chi_loss * chi_net), so that they multiply."""

    step: float
    rate: float
    rate_stderr: float
    chi_loss: float
    chi_net: float

    @property
    def chi_pos(self) -> float:
        scales = self.chi_loss * self.chi_net
        return self.rate / scales if scales else math.nan

    @property
    def is_resolved(self) -> bool:
        """Whether the rate is known to be above zero, by two standard errors; never for nan."""
        return self.rate > RESOLVED * self.rate_stderr


def ends(runs: RunSources) -> dict[str, dict[str, End]]:
    """{column of a rate: {name: the run's end}}, of the rates that all runs have. The batch's stands for the
    population's where a run does not have that. Runs without rows or without one of the scales are left out.

    Examples
    --------
    >>> import lnp
    >>> run = lnp.History([{"step": 9, "rate": 6.0, "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 3.0}])
    >>> ends({"a": run})["rate"]["a"].chi_pos
    3.0
    """
    named = {name: run for name, run in open_runs(runs).items() if _end(run, "rate") is not None}
    found = {column: {name: _end(run, column) for name, run in named.items()} for column in RATES}
    known = {column: {name: end for name, end in of.items() if end} for column, of in found.items()}
    whole = {column: of for column, of in known.items() if of and len(of) == len(named)}
    return {column: of for column, of in whole.items() if column != "rate" or "population/rate" not in whole}


def to_text(runs: RunSources) -> str:
    """The factors at the end of each run, and each run's divided by those of the first."""
    return "\n\n".join(_section(column, found) for column, found in ends(runs).items())


def _section(column: str, found: dict[str, End]) -> str:
    """The factors of one kind of rate."""
    rows = [
        (
            name,
            integer(end.step),
            with_error(end.rate, end.rate_stderr),
            *map(number, (end.chi_loss, end.chi_net, end.chi_pos)),
        )
        for name, end in found.items()
    ]
    (first, one), *others = found.items()
    compared = [f"{name} / {first}:  {_ratio(end, one)}" for name, end in others]
    return "\n".join([f"Last window of each run, by {RATES[column]}:", *aligned(ENDS, rows), *compared])


def _end(run: History, rate: str) -> End | None:
    """The end of a run; None where a factor is missing."""
    # the net rate is of the tracker's own batch, whose scales have names of their own beside a training batch's
    own = "measured/" if rate == "net/rate" and "measured/chi_net" in run else ""
    found, loss, net = (curve(run, name) for name in (rate, f"{own}chi_loss", f"{own}chi_net"))
    if not (len(found.mean) and len(loss.mean) and len(net.mean)):
        return None
    step, error = float(found.step[-1]), float(found.stderr[-1])
    # later rows may lack the rate: its factors are those of its own window
    scales = (of.mean[int(np.argmin(np.abs(of.step - step)))] for of in (loss, net))
    return End(step, float(found.mean[-1]), error if error > 0 else 0.0, *map(float, scales))


def _ratio(end: End, one: End) -> str:
    """The ratio of two rates as the product of three ratios, as text."""
    if not (end.is_resolved and one.is_resolved and one.chi_loss and one.chi_net):
        return "no ratio, a rate is within two standard errors of zero"
    ratio = end.rate / one.rate
    error = ratio * math.hypot(end.rate_stderr / end.rate, one.rate_stderr / one.rate)
    parts = [f"{name} {number(getattr(end, name) / getattr(one, name))}" for name in ("chi_loss", "chi_net", "chi_pos")]
    return f"rate {with_error(ratio, error)} = {' x '.join(parts)}"
