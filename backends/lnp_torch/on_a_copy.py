"""Runs a measurement on a copy of the model, which is made for it alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lnp.contract.options import Options
from lnp_torch.model import Program, Snapshot, program
from lnp_torch.state_guard import finished, no_gradients, undisturbed
from lnp_torch.writes import WrittenTo

Result = TypeVar("Result")


def on_a_copy(model: Any, options: Options, run: Callable[[Program], Result]) -> tuple[Result, Program]:
    """(run(program), the program). Begins again with memory of its own for what the model turns out to write to.

    Which parameters that are is remembered as long as the model lives.
    """
    written = _written(model)
    while True:
        prepared = program(model, options.forward, options.parameters, options.loss, written)
        try:
            with undisturbed([prepared.device]), no_gradients(prepared.parameters):
                return run(prepared), prepared
        except WrittenTo as found:
            if id(found.tensor) in written:  # has memory of its own already: beginning again would never end
                raise RuntimeError("The forward pass writes to memory that cannot be copied for it.") from found
            written |= {id(found.tensor)}
            _remember(model, written)
        finally:
            finished(prepared.replica.restore)


def _owner(model: Any) -> Any:
    model = model.model if isinstance(model, Snapshot) else model
    return model if isinstance(model, nn.Module) else model[0]


def _written(model: Any) -> frozenset[int]:
    try:
        return _WRITTEN.get(_owner(model), frozenset())
    except TypeError:  # what cannot be referred to weakly
        return frozenset()


def _remember(model: Any, written: frozenset[int]) -> None:
    try:
        _WRITTEN[_owner(model)] = written
    except TypeError:
        return


_WRITTEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""{model: ids of the tensors that its forward pass writes to}."""
