"""Whether a loss of the user's own is a mean over samples: found out once, by leaving samples out."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from array_api_compat import torch as xp

from lnp.contract.trees import leaves, map_leaves
from lnp.losses.kinds import TRIED, agrees, all_agree
from lnp_torch.outputs import Outputs, flatten, wide


def found_separable(function: Callable, run: Callable, outputs: Outputs, targets: Any) -> bool:
    """Whether the loss gradient of M samples alone is that among N, times N / M; remembered for each shape.

    `function` is the user's loss, by which it is remembered; `run` computes it without a trace.

    At the outputs of a few samples as they are, and at others, where nothing is small by chance. A loss that cannot be
    called with some of the samples is none.
    """
    described = tuple((tuple(leaf.shape), leaf.dtype) for leaf in outputs.parts)
    known = _known(function)
    if described not in known:
        known[described] = _found(run, outputs, targets)
    return known[described]


def _found(function: Callable, outputs: Outputs, targets: Any) -> bool:
    samples = len(outputs.parts[0])
    if any(isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) != samples for leaf in leaves(targets)):
        return False
    some = torch.linspace(0, samples - 1, min(samples, TRIED), device=outputs.parts[0].device).long()
    parts, targets = [part.detach()[some] for part in outputs.parts], _rows(targets, some)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(part.shape, generator=generator).to(part) for part in parts]
    elsewhere = [part + 3 * part.square().mean().sqrt() * n for part, n in zip(parts, noise, strict=True)]
    try:
        return all_agree([_agrees(function, outputs, made, targets) for made in (parts, elsewhere)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):  # whatever a loss says to a part of its batch
        return False


def _agrees(function: Callable, outputs: Outputs, parts: list[torch.Tensor], targets: Any) -> bool | None:
    whole = _gradient(function, outputs, parts, targets)

    def alone(some: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.as_tensor(some, device=whole.device)
        return whole[index], _gradient(function, outputs, [part[index] for part in parts], _rows(targets, index))

    return agrees(xp, whole, alone)


def _gradient(function: Callable, outputs: Outputs, parts: list[torch.Tensor], targets: Any) -> torch.Tensor:
    leaves = [part.to(wide([part])).requires_grad_() for part in parts]
    with torch.enable_grad():
        value = function(outputs.with_parts(leaves), targets)
    return flatten(list(torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)))


def _rows(targets: Any, index: torch.Tensor) -> Any:
    return map_leaves(lambda leaf: leaf[index] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf, targets)


def _known(function: Callable) -> dict:
    """What is known of a loss as long as it lives; nothing of what cannot be referred to weakly.

    A function that depends on nothing but its code is the same one when a loop makes it anew.
    """
    plain = isinstance(function, types.FunctionType) and not (
        function.__closure__ or function.__defaults__ or function.__kwdefaults__
    )
    try:
        return _KNOWN.setdefault(function.__code__ if plain else function, {})
    except TypeError:
        return {}


_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
