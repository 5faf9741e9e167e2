"""A training step that a tracker measures on its own passes, where its backend can watch one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from lnp.contract import registry
from lnp.results.decomposition import Decomposition
from lnp.tracking.failures import ROWS, Failures
from lnp.tracking.turns import alone, refuse

OPTIONS = ("loss", "parameters", "loss_terms", "estimator", "rtol", "max_probes", "by_layer", "population", "seed")
"""Of `lnp.decompose`, those that a shared step can follow: the others ask for passes of their own."""
FORGOTTEN = (
    "A shared step was watched, and its shared.backward() was never called. Expected shared.backward(loss, targets, "
    "criterion) in the place of loss.backward()."
)


class Shared(contextlib.AbstractContextManager):
    """A training step, watched where a measurement is due; made by `Tracker.shared`.

    Attributes
    ----------
    decomposition:
        Of the step's batch, once `backward` has been called; None where nothing is measured.
    """

    def __init__(self, watch: _Watch | None = None) -> None:
        self._watch = watch
        self.decomposition: Decomposition | None = None

    def __enter__(self) -> Shared:
        if self._watch is not None and not self._watch.enter():
            self._watch = None
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._watch is not None and not self._watch.leave(*exception):
            self._watch = None

    def backward(self, loss: Any, targets: Any = None, criterion: Any = None, **given: Any) -> Decomposition | None:
        """The loss's own backward pass; where a measurement is due, with the decomposition, which the tracker keeps.

        Parameters
        ----------
        loss, targets, criterion, given:
            As for the `backward` of `lnp_torch.shared`; targets, criterion and what follows say what the loss was
            computed with, and are not looked at where nothing is due.
        """
        watch, self._watch = self._watch, None  # the next call is another pass, and the loss's own
        d = None if watch is None else watch.backward(loss, targets, criterion, given)
        if d is not None:
            self.decomposition = d
        elif watch is None or not watch.step.stepped:
            loss.backward()
        return d


class _Watch:
    """What a shared step does beside the training step.

    Attributes
    ----------
    step:
        Of the backend. `stepped` says whether the step's own backward pass has begun: until then the gradients are
        untouched, and the loss's own pass can stand in. `seconds` is what that pass took, and 0 until it has returned.
    """

    def __init__(
        self, step: Any, options: Mapping[str, Any], keep: Callable, attempt: Callable, await_: Callable,
        alone: Callable,
    ) -> None:  # fmt: skip
        self.step, self._options = step, options
        self._keep, self._attempt, self._await, self._alone = keep, attempt, await_, alone

    def enter(self) -> bool:
        """Whether the step is watched from now on."""
        with self._attempt():
            self.step.__enter__()
            return True
        return False

    def leave(self, *exception: Any) -> bool:
        """Whether the step, which is watched no longer, can be measured."""
        failing = exception[0] is not None
        with self._attempt(always=failing):
            self.step.__exit__(*exception)
            self._await(not failing)
            return True
        return False

    def backward(self, loss: Any, targets: Any, criterion: Any, given: Mapping[str, Any]) -> Decomposition | None:
        """The step's own backward pass and its decomposition; None where measuring fails.

        An error of the step's own pass is the user's: gradients are half accumulated, and no other pass can mend that.
        """
        self._await(False)
        started = time.perf_counter()
        options = {**self._options, **given}
        stated = options.pop("loss", None)
        broken = None
        with self._attempt():
            try:
                with self._alone():
                    d = self.step.backward(loss, targets, stated if criterion is None else criterion, **options)
            except Exception as error:
                if not (self.step.stepped and not self.step.seconds):
                    raise
                broken = error
            else:
                self._keep(d, time.perf_counter() - started - self.step.seconds)
                return d
        if broken is not None:
            raise broken
        return None


class SharedSteps:
    """Makes the shared steps of one tracker, and tells of one whose backward pass was not shared.

    Raises
    ------
    TypeError
        By `check`, once: for a model whose backend watches no steps, and for batches and options that a shared step
        cannot follow.
    """

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._checked = False
        self._awaited: int | None = None

    def check(self, model: Any, options: Mapping[str, Any], own_batches: bool) -> None:
        """Refuse what never can be shared, at the first step, whether it is due or not."""
        if self._checked:
            return
        if own_batches:
            raise TypeError(
                "This tracker has batches of its own, while a shared step is measured on the batch that it trains on. "
                "Expected a tracker without batch=. Call observe(step, model, batch)."
            )
        if not hasattr(registry.find(model), "shared"):
            raise TypeError(
                f"The steps of a model of type {type(model).__name__} cannot be watched: its backend has no "
                "shared(model). Expected a torch.nn.Module. Elsewhere take the gradient and the decomposition from the "
                "backend's value_and_grad, and hand the latter to tracker.record(step, decomposition)."
            )
        others = sorted(set(options) - set(OPTIONS))
        if others:
            raise TypeError(
                f"This tracker has the options {', '.join(others)}. Expected for a shared step, which is measured on "
                f"the passes that it makes itself, some of {', '.join(OPTIONS)}. Call observe(step, model, batch)."
            )
        self._checked = True

    def watched(self, step: int, model: Any, options: Mapping[str, Any], keep: Callable, attempt: Callable) -> Shared:
        """A step that the model's backend watches: attempt() is around what may fail, keep(decomposition, seconds)
        gets the result.
        """
        refuse(model)
        rest = {name: value for name, value in options.items() if name != "parameters"}
        made = registry.find(model).shared(model, options.get("parameters"))
        # the tracker holds the number alone: a step holds its activations
        await_ = lambda comes: setattr(self, "_awaited", step if comes else None)
        return Shared(_Watch(made, rest, keep, attempt, await_, lambda: alone(model)))

    def remind(self) -> None:
        """Tell of a step that ran another backward pass than the one that measures."""
        step, self._awaited = self._awaited, None
        if step is not None:
            self._failures.tell(FORGOTTEN, step, ROWS)
