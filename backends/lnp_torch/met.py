"""Gradients that are met one by one as they come out of a backward pass, and not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from lnp_torch.outputs import widened

Meet = Callable[[str, torch.Tensor], None]
"""Called with a parameter's name and its gradient, which is not kept."""


@contextlib.contextmanager
def met_one_by_one(parameters: Mapping[str, torch.Tensor], meet: Meet, scale: Any = None) -> Iterator[None]:
    """Backward passes inside, of `scale` times what is meant, hand each parameter's gradient to `meet`, and have zeros
    without memory in its place.
    """

    def met(name: str, gradient: torch.Tensor) -> torch.Tensor:
        whole = gradient.to_dense() if gradient.is_sparse else gradient
        meet(name, whole if scale is None else widened(whole) / scale)
        if gradient.is_sparse:
            return torch.sparse_coo_tensor(size=gradient.shape, dtype=gradient.dtype, device=gradient.device)
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    hooks = [p.register_hook(partial(met, name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def dropped(leaves: list[torch.Tensor]) -> Iterator[None]:
    """Gradients of the leaves, which are nobody else's, are not kept."""

    def drop(leaf: torch.Tensor) -> None:
        leaf.grad = None

    hooks = [leaf.register_post_accumulate_grad_hook(drop) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
