"""How far a run has gone between two of its steps: the sum of the learning rates of the updates between them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lnp.contract import registry
from lnp.tracking.failures import describe

LearningRate = Any
"""A number, a function step -> number, an optimizer of PyTorch, or None."""
SKIPPED = "the learning rate of every step between two measurements is not known; pass it to each observe()"


class Mark(NamedTuple):
    """Where a run was at a step: the sum of the learning rates since the step from which on each one is known."""

    step: int
    since: int
    total: float


class LearningRates:
    """Sums learning rates of updates, one for each step. A step that is passed over begins a new sum.

    Parameters
    ----------
    source:
        What tells the learning rate where `add` does not: a number, a function step -> number, an optimizer of PyTorch,
        or None.

    Attributes
    ----------
    reason:
        Why the last step was none of gradient descent with this learning rate, or "".

    Raises
    ------
    TypeError
        For a source that is none of these.

    Examples
    --------
    >>> rates = LearningRates()
    >>> start = rates.mark(0)
    >>> for step in range(4):
    ...     rates.add(step, 0.5)
    >>> rates.sum_since(start, 4)
    2.0
    """

    def __init__(self, source: LearningRate = None) -> None:
        self._number = float(source) if isinstance(source, int | float) else None
        self._optimizer = source if hasattr(source, "param_groups") else None
        self._function = source if callable(source) and self._optimizer is None else None
        if source is not None and self._number is None and self._function is None and self._optimizer is None:
            raise TypeError(
                f"learning_rate is of type {type(source).__name__}. Expected a number, a function step -> learning "
                "rate, or an optimizer of PyTorch. With another library's optimizer pass the number to observe()."
            )
        self.reason = ""
        self._since, self._next, self._total = 0, -1, 0.0

    @property
    def reads(self) -> bool:
        """Whether an optimizer is read at every step."""
        return self._optimizer is not None

    def add(self, step: int, rate: Any = None, reason: str = "") -> None:
        """The learning rate of the update of this step, or an optimizer that tells it; None where it is not known. The
        same step again is no other.
        """
        if self._number is not None or self._function is not None:
            return
        rate = rate if self._optimizer is None else self._optimizer
        try:
            if hasattr(rate, "param_groups"):
                rate, reason = _step_size()(rate)
            rate = None if rate is None else float(rate)
        except Exception as error:  # of an optimizer, or whatever a caller notes in the column of this name
            rate, reason = None, describe(error)
        self.reason = reason
        if rate is None or step == self._next - 1:
            return
        if step != self._next:
            self._since, self._total = step, 0.0
        self._total += rate
        self._next = step + 1

    def mark(self, step: int) -> Mark:
        """Where the run is before the update of this step."""
        return Mark(step, self._since, self._total) if step == self._next else Mark(step, step, 0.0)

    def sum_since(self, start: Mark, step: int) -> float | None:
        """The sum over the updates from a mark up to this step; None where one of them is not known, or nothing was
        learnt.
        """
        if self._number is not None:
            total = self._number * (step - start.step)
        elif self._function is not None:
            total = math.fsum(float(self._function(one)) for one in range(start.step, step))
        elif step == self._next and start.since == self._since:
            total = self._total - start.total
        else:
            return None
        return total if 0 < total < math.inf else None

    def state_dict(self) -> dict[str, Any]:
        """The sum, for a checkpoint."""
        return {"since": self._since, "next": self._next, "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._since, self._next, self._total = state["since"], state["next"], state["total"]


@functools.cache
def _step_size() -> Callable[[Any], tuple[float | None, str]]:
    """What reads an optimizer, which only PyTorch's backend knows how to."""
    return registry.load("torch").step_size  # type: ignore[attr-defined]
