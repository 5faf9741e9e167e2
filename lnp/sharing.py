"""A training step that a tracker measures on its own passes, where its backend can watch one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from lnp import backends
from lnp.decomposition import Decomposition

OPTIONS = ("loss", "parameters", "loss_terms", "estimator", "rtol", "max_probes", "by_layer", "population", "seed")
"""Of `lnp.decompose`, those that a shared step can follow: the others ask for passes of their own."""


class Shared(contextlib.AbstractContextManager):
    """A training step, watched where a measurement is due; made by `Tracker.shared`.

    Attributes
    ----------
    decomposition:
        Of the step's batch, once `backward` has been called; None where nothing is measured.
    """

    def __init__(
        self, step: Any = None, options: Mapping[str, Any] | None = None, keep: Callable | None = None
    ) -> None:
        self._step, self._options, self._keep = step, dict(options or {}), keep
        self.decomposition: Decomposition | None = None

    def __enter__(self) -> Shared:
        if self._step is not None:
            self._step.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._step is not None:
            self._step.__exit__(*exception)

    def backward(self, loss: Any, targets: Any = None, criterion: Any = None, **given: Any) -> Decomposition | None:
        """The loss's own backward pass; where a measurement is due, with the decomposition, which the tracker keeps.

        Parameters
        ----------
        loss, targets, criterion, given:
            As for the `backward` of `lnp_torch.shared`; targets, criterion and what follows say what the loss was
            computed with, and are not looked at where nothing is due.
        """
        if self._step is None or self._keep is None:
            loss.backward()
            return None
        started = time.perf_counter()
        options = {**self._options, **given}
        stated = options.pop("loss", None)
        criterion = stated if criterion is None else criterion
        self.decomposition = d = self._step.backward(loss, targets, criterion, **options)
        self._keep(d, time.perf_counter() - started - self._step.seconds)
        return d


def watched(model: Any, options: Mapping[str, Any], keep: Callable, own_batches: bool) -> Shared:
    """A step that the model's backend watches, to be measured with a tracker's options, and where the result goes:
    keep(decomposition, seconds).

    Raises
    ------
    TypeError
        For a model whose backend has none, and for batches and options that a shared step cannot follow.
    """
    if own_batches:
        raise TypeError(
            "This tracker has batches of its own, while a shared step is measured on the batch that it trains on. "
            "Expected a tracker without batch=. Call observe(step, model, batch)."
        )
    backend = backends.find(model)
    if not hasattr(backend, "shared"):
        raise TypeError(
            f"The steps of a model of type {type(model).__name__} cannot be watched: its backend has no shared(model). "
            "Expected a torch.nn.Module. Elsewhere take the gradient and the decomposition from the backend's "
            "value_and_grad, and hand the latter to tracker.record(step, decomposition)."
        )
    others = sorted(set(options) - set(OPTIONS))
    if others:
        raise TypeError(
            f"This tracker has the options {', '.join(others)}. Expected for a shared step, which is measured on the "
            f"passes that it makes itself, some of {', '.join(OPTIONS)}. Call observe(step, model, batch)."
        )
    rest = {name: value for name, value in options.items() if name != "parameters"}
    return Shared(backend.shared(model, options.get("parameters")), rest, keep)
