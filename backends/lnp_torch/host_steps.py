"""The loss as a host of training loops computes it, run on the copy of a model that is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

DIFFERS = (
    "The loss of this step is {trained:.6g}, where {measured:.6g} was measured: the measurement is not of what is "
    "minimised. Expected the same. {advice}"
)
OWN = "own"
APART = 1e-2
"""Relative difference up to which two losses are taken for the same."""


@dataclass(frozen=True)
class HostStep:
    """`forward=` for `lnp.decompose`: what the host's own code computes from a batch, {"loss": ..., "outputs": ...}.

    The outputs are what the modules that this code calls return. The batch is given as {"batch": ...}, one of the
    tracker's own as `as_inputs` makes it.

    Attributes
    ----------
    compute:
        (model, batch, outputs, own) -> loss; it may add to the list of outputs. `own` says that the batch is none that
        the host trains on.
    host:
        Tells hosts apart: what is known of one's samples is found by it at the next step.
    """

    compute: Callable[[nn.Module, Any, list[Any], bool], Any] = field(compare=False)
    host: int

    def as_inputs(self, batch: Any) -> dict[str, Any]:
        """A batch of the tracker's own, in the form in which the host's loader gives them, as inputs."""
        return {OWN: batch}

    def __call__(self, model: nn.Module, inputs: Any) -> dict[str, Any]:
        outputs: list[Any] = []
        with calls_of(model, outputs):
            own = OWN in inputs
            loss = self.compute(model, inputs[OWN if own else "batch"], outputs, own)
        if not isinstance(loss, torch.Tensor):
            raise ValueError(f"The host's own step gave a {type(loss).__name__} for this batch. Expected a loss.")
        return {"loss": loss, "outputs": outputs}


@contextlib.contextmanager
def calls_of(model: nn.Module, returned: list[Any]) -> Iterator[None]:
    """Collects what a copy's modules return to code that is none of theirs: the outermost of nested calls."""
    depth = 0

    def begin(module: nn.Module, args: tuple) -> None:
        nonlocal depth
        depth += 1

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            returned.append(output)

    hooked = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(begin) for module in hooked]
    handles += [module.register_forward_hook(end) for module in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_same(trained: Any, measured: float, advice: str) -> None:
    """Raise ValueError if a step's own loss is not the one that was measured."""
    value = float(trained)
    if not abs(value - measured) <= APART * max(abs(value), abs(measured)):
        raise ValueError(DIFFERS.format(trained=value, measured=measured, advice=advice))
