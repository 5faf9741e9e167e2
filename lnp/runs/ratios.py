"""Two runs, one question: by which factor does the loss of one fall faster than that of the other?

    rate = chi_loss * chi_net * chi_pos

so that the ratio of two rates is the product of three ratios, and the one that is far from 1 is the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lnp.runs.curves import POSITION, curve
from lnp.runs.open_runs import RunSources, open_runs
from lnp.runs.spectral_reach import RESOLVED
from lnp.runs.table import aligned, integer, number, with_error
from lnp.tracking.history import History

RATE = "population/rate"
ENDS = ("run", "window at", "rate", "chi_loss", "chi_net", "chi_pos")
OF_THE_POPULATION = (
    "The last window of each run; rate and chi_pos are the population's, without the noise of the batch."
)
OF_THE_BATCH = "The last window of each run; rate and chi_pos are the batch's, and have its noise in them."


@dataclass(frozen=True)
class End:
    """The factors in the last window of a run: `chi_pos` is rate / (chi_loss * chi_net), so that they multiply."""

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


def ends(runs: RunSources) -> tuple[dict[str, End], bool]:
    """{name: the run's end}, and whether rate and position are the population's, which all runs have to know. Runs
    without one of the factors are left out.

    Examples
    --------
    >>> import lnp
    >>> run = lnp.History([{"step": 9, "rate": 6.0, "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 3.0}])
    >>> found, of_population = ends({"a": run})
    >>> found["a"].chi_pos, of_population
    (3.0, False)
    """
    named = {name: run for name, run in open_runs(runs).items() if len(run)}
    of_population = all(len(curve(run, column).mean) for run in named.values() for column in (RATE, POSITION))
    found = {name: _end(run, RATE if of_population else "rate") for name, run in named.items()}
    return {name: end for name, end in found.items() if end is not None}, of_population


def to_text(runs: RunSources) -> str:
    """The factors at the end of each run, and each run's divided by those of the first."""
    found, of_population = ends(runs)
    if not found:
        return ""
    rows = [
        (
            name,
            integer(e.step),
            with_error(e.rate, e.rate_stderr),
            number(e.chi_loss),
            number(e.chi_net),
            number(e.chi_pos),
        )
        for name, e in found.items()
    ]
    (first, one), *others = found.items()
    compared = [f"{name} / {first}:  {_ratio(end, one)}" for name, end in others]
    return "\n".join([*aligned(ENDS, rows), "", OF_THE_POPULATION if of_population else OF_THE_BATCH, *compared])


def _end(run: History, rate: str) -> End | None:
    """The end of a run; None where a factor is missing."""
    found, loss, net = (curve(run, name) for name in (rate, "chi_loss", "chi_net"))
    if not (len(found.mean) and len(loss.mean) and len(net.mean)):
        return None
    error = float(found.stderr[-1])
    values = (found.step[-1], found.mean[-1], error if error > 0 else 0.0, loss.mean[-1], net.mean[-1])
    return End(*map(float, values))


def _ratio(end: End, one: End) -> str:
    """The ratio of two rates as the product of three ratios, as text."""
    if not (end.is_resolved and one.is_resolved and one.chi_loss and one.chi_net):
        return "no ratio, a rate is within two standard errors of zero"
    ratio = end.rate / one.rate
    error = ratio * math.hypot(end.rate_stderr / end.rate, one.rate_stderr / one.rate)
    parts = [f"{name} {number(getattr(end, name) / getattr(one, name))}" for name in ("chi_loss", "chi_net", "chi_pos")]
    return f"rate {with_error(ratio, error)} = {' x '.join(parts)}"
