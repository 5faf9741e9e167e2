"""A model as it was before an update, to be measured after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lnp_torch.model import Parameters, Snapshot, program
from lnp_torch.state_guard import RandomState, same_randomness


def snapshot(model: Any) -> Snapshot:
    """The model as it is now, with the random state from which the step will draw its dropout masks."""
    with torch.inference_mode(False):  # what is made there can take no part in a derivative
        copies = {name: p.detach().clone().requires_grad_() for name, p in _trained(model).items()}
    return Snapshot(model, copies, RandomState([next(iter(copies.values())).device]))


def difference(before: Snapshot, after: Any) -> dict[str, torch.Tensor]:
    """What the update added to each parameter."""
    now = _trained(after)
    if now.keys() != before.parameters.keys():
        raise ValueError(
            f"The model has other trained parameters than before: {sorted(now.keys() ^ before.parameters.keys())}. "
            "Expected the same model, before and after one update."
        )
    with torch.inference_mode(False):
        return {name: now[name].detach() - p.detach() for name, p in before.parameters.items()}


def _trained(model: Any) -> Parameters:
    made = program(model, None, None)
    made.replica.clear()
    return made.parameters


@contextlib.contextmanager
def replayed(before: Snapshot) -> Iterator[None]:
    """Draw the numbers that the step drew."""
    with same_randomness(before.randomness):
        yield
