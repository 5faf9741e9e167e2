"""A training step that a tracker measures on its own passes, where its backend can watch one."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lnp.arguments import Loss, Model
from lnp.contract import registry
from lnp.contract.linearization import Array
from lnp.results.decomposition import Decomposition
from lnp.tracking.failures import MISSING_ROW, Failures
from lnp.tracking.process import refuse, single_process

OPTIONS = ("loss", "parameters", "loss_terms", "estimator", "rtol", "max_probes", "by_layer", "population", "seed")
"""Of `lnp.decompose`, those that a shared step can follow: the others ask for passes of their own."""
FORGOTTEN = (
    "A shared step was watched, and its shared.backward() was never called. Expected shared.backward(loss, targets, "
    "criterion) in the place of loss.backward()."
)

Attempt = Callable[..., contextlib.AbstractContextManager[None]]
"""attempt(always=...) -> the context manager around what may fail beside the training step."""
Keep = Callable[[Decomposition, float], None]
"""keep(decomposition, seconds): what becomes of the result."""


class SharedStep(contextlib.AbstractContextManager):
    """A training step, watched where a measurement is due; made by `Tracker.shared`.

    Attributes
    ----------
    decomposition:
        The decomposition of the step's batch, once `backward` has been called; None where nothing is measured.
    """

    def __init__(self, measurement: _SharedMeasurement | None = None) -> None:
        self._measurement = measurement
        self.decomposition: Decomposition | None = None

    def __enter__(self) -> SharedStep:
        if self._measurement is not None and not self._measurement.start():
            self._measurement = None
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._measurement is not None and not self._measurement.stop(*exception):
            self._measurement = None

    def backward(self, loss: Array, targets: Any = None, criterion: Loss = None, **given: Any) -> Decomposition | None:
        """The loss's own backward pass; where a measurement is due, with the decomposition, which the tracker keeps.

        Parameters
        ----------
        loss, targets, criterion, given:
            As for the `backward` of `lnp_torch.shared`; targets, criterion and what follows say what the loss was
            computed with, and are not looked at where nothing is due.
        """
        measurement, self._measurement = self._measurement, None  # the next call is another pass, and the loss's own
        if measurement is None:
            loss.backward()
            return None
        decomposition = measurement.backward(loss, targets, criterion, given)
        if decomposition is not None:
            self.decomposition = decomposition
        elif not measurement.step.stepped:
            loss.backward()
        return decomposition


@dataclass
class _SharedMeasurement:
    """The measurement beside a training step, on its own passes.

    Attributes
    ----------
    step:
        The backend's step. `stepped` says whether the step's own backward pass has begun: until then the gradients are
        unchanged, and the loss's own pass can stand in. `seconds` is what that pass took, and 0 until it has returned.
    model:
        The model that is trained.
    options:
        Options of `lnp.decompose` for this step.
    keep, attempt:
        See `Keep` and `Attempt`.
    expect_backward:
        Says whether a call of `backward` is to come.
    """

    step: Any
    model: Model
    options: Mapping[str, Any]
    keep: Keep
    attempt: Attempt
    expect_backward: Callable[[bool], None]

    def start(self) -> bool:
        """Whether the step is watched from now on."""
        with self.attempt():
            self.step.__enter__()
            return True
        return False

    def stop(self, *exception: Any) -> bool:
        """Whether the step, which is watched no longer, can be measured."""
        failing = exception[0] is not None
        with self.attempt(always=failing):
            self.step.__exit__(*exception)
            self.expect_backward(not failing)
            return True
        return False

    def backward(self, loss: Array, targets: Any, criterion: Loss, given: Mapping[str, Any]) -> Decomposition | None:
        """The step's own backward pass and its decomposition; None where measuring fails.

        An error of the step's own pass is the user's: gradients are half accumulated, and no other pass can mend that.
        """
        self.expect_backward(False)
        started = time.perf_counter()
        options = {**self.options, **given}
        tracked_loss = options.pop("loss", None)
        users_error = None
        with self.attempt():
            try:
                with single_process(self.model):
                    decomposition = self.step.backward(
                        loss, targets, tracked_loss if criterion is None else criterion, **options
                    )
            except Exception as error:
                if not self.step.stepped or self.step.seconds:  # before or after the step's own pass
                    raise
                users_error = error
            else:
                self.keep(decomposition, time.perf_counter() - started - self.step.seconds)
                return decomposition
        if users_error is not None:
            raise users_error
        return None


class SharedSteps:
    """Makes the shared steps of one tracker, and reports one whose backward pass was not shared.

    Raises
    ------
    TypeError
        By `check`, once: for a model whose backend watches no steps, and for batches and options that a shared step
        cannot follow.
    """

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._checked = False
        self._awaited: int | None = None  # the number alone: the step itself holds its activations

    def check(self, model: Model, options: Mapping[str, Any], own_batches: bool) -> None:
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

    def make(self, step: int, model: Model, options: Mapping[str, Any], keep: Keep, attempt: Attempt) -> SharedStep:
        """The step that the model's backend watches."""
        refuse(model)
        backend: Any = registry.find(model)  # check() has found that it has the verb
        others = {name: value for name, value in options.items() if name != "parameters"}

        def expect_backward(comes: bool) -> None:
            self._awaited = step if comes else None

        watched = backend.shared(model, options.get("parameters"))
        attempt = functools.partial(attempt, step)
        return SharedStep(_SharedMeasurement(watched, model, others, keep, attempt, expect_backward))

    def remind(self) -> None:
        """Report a step that ran another backward pass than the one that measures."""
        step, self._awaited = self._awaited, None
        if step is not None:
            self._failures.report(FORGOTTEN, step, MISSING_ROW)
