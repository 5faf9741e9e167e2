"""What the core asks of a backend: a module, or any object with these functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lnp.contract.linearization import Linearization
from lnp.contract.options import Options


class Backend(Protocol):
    """The entry points of a backend.

    It may offer some verbs more, which the tracker and `lnp.step_taken` look for:

        snapshot(model)                the model as it is now, to be compared with what it becomes
        difference(before, after)      {parameter name: what an update added}
        replayed(before)               context in which the network draws the numbers that the step drew
        shared(model, parameters)      context that measures inside of a training step
        untouched()                    context that keeps the framework's random states while a loader is read
        alone()                        context around what one process of several does by itself
        refusal(model)                 why the model cannot be measured, or None; computes and sends nothing
        process_number()               this process among those that the framework computes with as one, or None
        needs_all(model)               whether other processes hold parts of the model, and have to measure it too
    """

    def accepts(self, model: Any) -> bool:
        """Whether the model is one of this backend's."""

    def evaluate(self, computation: Callable, model: Any, batches: tuple, options: Options, **operands: Any) -> Any:
        """What the computation makes of the model, linearised on each batch.

        It calls `computation(*linearizations, **operands)`, compiled where the framework compiles, and leaves no trace
        on the model. It raises the errors of the records' `violations`, and returns what the computation returned with
        every array of shape () as a number, brought to the host in one transfer; inside a compiled function, where
        arrays have no value yet, it returns them as they are. Where a record's `coupled` turns out to be true, it
        measures again without taking the samples apart, with a note.

        Operands are `learning_rate`, a number, and `update`, what the user passed for a vector in parameter space.
        """

    def linearize(self, model: Any, batch: Any, options: Options) -> Linearization:
        """The record of one batch itself, for eager work."""
