r"""How fast a loss really falls between two measurements of the same samples, and the position that goes with that.

With eta_s the learning rate of step s, and d_n what sample n's part of the loss has lost between the steps a and b,

    fall     = L(a) - L(b) = sum_n d_n
    net rate = fall / sum_{a <= s < b} eta_s
    net position = net rate / (chi_loss chi_net)

with chi_loss chi_net the geometric mean of the two ends. The standard error is that of the mean of paired differences,
over the N samples, of which each has the share s_n in the mean (1 / N, if all weigh the same):

    error of the fall = sqrt(N / (N - 1) sum_n (d_n - s_n fall)^2)

Under gradient flow the net rate is the mean of the rate on the way. The rate of a network that hovers around its path,
by the noise of its updates, is larger, since most of what it promises is undone by the next steps.

For any optimizer, an update Delta_s promises the fall p_s = -<grad L, Delta_s>. With the means over those updates that
were measured in the windows of a and b,

    predicted fall = (b - a) (mean p_a + mean p_b) / 2,   per predicted = fall / predicted fall

Source: docs/theory.md, "Net rate".
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lnp.results.decomposition import Decomposition
from lnp.tracking.learning_rate import SKIPPED, LearningRates, Mark

FAR = 10.0
"""How many times larger than the net rate a first-order rate is mostly noise."""
FASTER = 3.0
"""How many times faster than to first order a loss does not fall by gradient descent."""
SURE = 2.0
"""Standard errors beyond which two rates differ."""
NOISE = (
    "the first-order rate is more than ten times the net rate: it is mostly the optimizer's noise, and so is chi_pos; "
    "read net/chi_pos"
)
TOO_FAST = (
    "the loss falls more than three times as fast as the first-order rate says: is the learning rate that of gradient "
    "descent? With momentum m it is learning_rate / (1 - m), with Adam pass options={'preconditioner': ...}; otherwise "
    "net/chi_pos is not a position"
)
NO_ERROR = "net rate without standard error: the loss is not known to be a sum over the samples of the batch"
NOT_AGAIN = (
    "no net rate: the tracker's batch= makes its batches anew, and a fall is that of the same samples twice; pass one "
    "batch, or a list of batches"
)
RESCALED = "net/rate is per unit of the optimizer's learning rate, and there is no net/chi_pos: {}"


@dataclass(frozen=True)
class Ends:
    """What one end of a span has to say.

    Attributes
    ----------
    mark:
        Where the run was.
    loss, rate, rate_stderr:
        L, and the first-order rate: the population's where it is known.
    scales, relative:
        chi_loss chi_net, and its relative standard error.
    parts, shares:
        What each sample adds to the loss, and its share; None where that is not known.
    predicted:
        The fall of the loss by the update that was made there, to first order; None where that was not measured.
    """

    mark: Mark
    loss: float
    rate: float
    rate_stderr: float
    scales: float
    relative: float
    parts: list[float] | None
    shares: list[float] | None
    predicted: float | None = None


def fall(before: Ends, after: Ends) -> tuple[float, float]:
    """(L(a) - L(b), its standard error over the samples), nan for an error that cannot be had."""
    if before.parts is None or after.parts is None or after.shares is None or len(before.parts) != len(after.parts):
        return before.loss - after.loss, math.nan
    lost = np.asarray(before.parts) - np.asarray(after.parts)
    total, samples = float(lost.sum()), len(lost)
    spread = float(np.sum((lost - np.asarray(after.shares) * total) ** 2))
    return total, math.sqrt(samples / (samples - 1) * spread) if samples > 1 else math.nan


def position(rate: float, stderr: float, before: Ends, after: Ends) -> tuple[float, float]:
    """(rate / (chi_loss chi_net), its standard error to first order), with the geometric mean of both ends' scales."""
    scales = math.sqrt(before.scales) * math.sqrt(after.scales)
    if not 0 < scales < math.inf:
        return math.nan, math.nan
    found = rate / scales
    return found, math.hypot(stderr / scales, found * math.hypot(before.relative, after.relative) / 2)


def compared(rate: float, stderr: float, before: Ends, after: Ends) -> str:
    """The note on a net rate that is not what the first-order rate leads to expect, or ""."""
    least, most = sorted((before, after), key=lambda end: end.rate)
    if least.rate - FAR * rate > SURE * math.hypot(least.rate_stderr, FAR * stderr):
        return NOISE
    return TOO_FAST if rate - FASTER * most.rate > SURE * math.hypot(stderr, FASTER * most.rate_stderr) else ""


def between(before: Ends, after: Ends, rates: LearningRates, rescaled: bool) -> tuple[dict[str, float], list[str]]:
    """(Columns, notes) of the row at the later of two ends of the same samples; `rescaled` says that its rate is that
    of the optimizer's own kernel.
    """
    lost, stderr = fall(before, after)
    found = {
        "net/steps": after.mark.step - before.mark.step,
        "net/loss_fall": lost,
        "net/loss_fall_stderr": stderr,
    }
    notes = [NO_ERROR] if math.isnan(stderr) else []
    total = rates.sum_since(before.mark, after.mark.step)
    if total is None:
        return found, [*notes, f"no net rate: {rates.reason or SKIPPED}"]
    rate, error = lost / total, stderr / total
    found |= {"net/learning_rate_sum": total, "net/rate": rate, "net/rate_stderr": error}
    if rates.reason and not rescaled:
        return found, [*notes, RESCALED.format(rates.reason)]
    found["net/chi_pos"], found["net/chi_pos_stderr"] = position(rate, error, before, after)
    note = compared(rate, error, before, after)
    return found, [*notes, note] if note else notes


def per_predicted(before: Ends, after: Ends, at_start: Sequence[float], at_end: Sequence[float]) -> dict[str, float]:
    """Columns that hold a fall against what the updates of both ends' windows promise; none where one has no update.

    Where the promise is below two of its standard errors, the fall per unit of it is not known, and left out.
    """
    if not (at_start and at_end):
        return {}
    steps, updates = after.mark.step - before.mark.step, [*at_start, *at_end]
    promise = steps * (np.mean(at_start) + np.mean(at_end)) / 2
    stderr = steps * np.std(updates, ddof=1) / math.sqrt(len(updates))
    found = {"net/predicted_fall": float(promise), "net/predicted_fall_stderr": float(stderr)}
    if not promise > SURE * stderr:
        return found
    lost, error = fall(before, after)
    share = lost / promise
    return found | {
        "net/per_predicted": float(share),
        "net/per_predicted_stderr": float(math.hypot(error, share * stderr) / promise),
    }


class NetRates:
    """Falls of the loss between measurements of the same batch, from one window of a schedule to the next: each between
    measurements at the same place of both, so that their mean is the fall of the windows' means.
    """

    def __init__(self, rates: LearningRates) -> None:
        self.rates = rates
        self._seen: dict[Hashable, _Windows] = {}

    def values(
        self, window: int | None, step: int, key: Hashable, d: Decomposition, rescaled: bool
    ) -> tuple[dict[str, float], list[str]]:
        """(Columns, notes) of a row whose batch has this key, None for one that never comes again; `rescaled` says that
        the rate is that of the optimizer's own kernel.
        """
        if key is None:
            return {}, [NOT_AGAIN]
        after = end_of(self.rates.mark(step), d)
        before = self._seen.setdefault(str(key), _Windows()).pair(step if window is None else window, after)
        if before is None or before.mark.step >= step:
            return {}, []
        return between(before, after, self.rates, rescaled)

    def arrived(self, step: int, key: Hashable, predicted: float) -> dict[str, float]:
        """Columns of a row whose update makes the loss on its batch fall by `predicted`, to first order."""
        windows = self._seen.get(str(key))
        return {} if windows is None else windows.arrived(step, predicted)

    def go_back(self, step: int) -> None:
        """Forget what was measured at this step and later."""
        for windows in self._seen.values():
            windows.go_back(step)

    def state_dict(self) -> dict[str, Any]:
        """Sums and losses for a checkpoint, in plain lists."""
        return {"rates": self.rates.state_dict(), "seen": {key: seen.rows() for key, seen in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.rates.load_state_dict(state["rates"])
        self._seen = {key: _Windows.of(rows) for key, rows in state["seen"].items()}


class _Windows:
    """The measurements of one batch in the current window and the one before."""

    def __init__(self) -> None:
        self._window: int | None = None
        self._window_before: int | None = None
        self._now: list[Ends] = []
        self._before: list[Ends] = []

    @classmethod
    def of(cls, rows: Mapping[str, Any]) -> _Windows:
        """From what `rows` has returned."""
        made = cls()
        made._window, made._window_before = rows["window"], rows.get("window_before")
        made._now, made._before = (
            [Ends(**{**end, "mark": Mark(*end["mark"])}) for end in rows[name]] for name in ("now", "before")
        )
        return made

    def rows(self) -> dict[str, Any]:
        """Numbers, texts and lists of them."""

        def listed(ends: list[Ends]) -> list[dict[str, Any]]:
            return [{**asdict(end), "mark": list(end.mark)} for end in ends]

        windows = {"window": self._window, "window_before": self._window_before}
        return {**windows, "now": listed(self._now), "before": listed(self._before)}

    def pair(self, window: int, after: Ends) -> Ends | None:
        """Keep a measurement, and return that of the same place in the window before; None where there is none."""
        if window != self._window:
            self._window, self._window_before = window, self._window
            self._now, self._before = [], self._now
        place = len(self._now)
        self._now.append(after)
        return self._at(place)

    def arrived(self, step: int, predicted: float) -> dict[str, float]:
        """Columns of the latest measurement, once its update is known."""
        if not self._now or self._now[-1].mark.step != step:
            return {}
        after = self._now[-1] = replace(self._now[-1], predicted=predicted)
        before = self._at(len(self._now) - 1)
        return {} if before is None else per_predicted(before, after, _predicted(self._before), _predicted(self._now))

    def _at(self, place: int) -> Ends | None:
        """The measurement at this place of the window before."""
        return self._before[min(place, len(self._before) - 1)] if self._before else None

    def go_back(self, step: int) -> None:
        self._now, self._before = ([end for end in ends if end.mark.step < step] for ends in (self._now, self._before))
        if not self._now:
            self._window, self._window_before = self._window_before, None
            self._now, self._before = self._before, []


def _predicted(ends: list[Ends]) -> list[float]:
    return [end.predicted for end in ends if end.predicted is not None]


def end_of(mark: Mark, d: Decomposition) -> Ends:
    """What a decomposition says at one end of a span."""
    first = d if d.population is None else d.population
    stderr = 0.0 if d.population is None else d.population.rate_stderr
    parts, shares = (None, None) if d.sample_losses is None else map(_numbers, d.sample_losses)
    if parts is not None and not all(map(math.isfinite, parts)):
        parts, shares = None, None
    relative = d.chi_net_stderr / d.chi_net if d.chi_net and math.isfinite(d.chi_net_stderr) else 0.0
    return Ends(mark, d.loss, first.rate, stderr, max(d.chi_loss * d.chi_net, 0.0), relative, parts, shares)


def _numbers(values: Any) -> list[float]:
    """An array of any framework as Python's numbers."""
    return [float(value) for value in (values if hasattr(values, "tolist") else np.asarray(values)).tolist()]
