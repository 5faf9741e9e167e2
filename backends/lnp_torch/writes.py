"""Writes to memory that a measurement shares with the user are seen before they happen.

A copy of a model has its parameters' own memory: there may be gigabytes of them. Nearly no forward pass writes to
parameters; those that do (embeddings with `max_norm`, the momentum of a teacher) do it by operations that a function
mode sees. The measurement then starts again, with memory of its own for what is written to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HARMLESS = frozenset({"requires_grad_", "detach_", "retain_grad", "rename_", "share_memory_"})
MAX_NORM = {F.embedding: 3, F.embedding_bag: 4}
"""{function that shrinks rows of its second argument in place: position of `max_norm`}."""
HANDED_OUT = frozenset({Tensor.data.__get__, Tensor.numpy, Tensor.__array__})
"""Memory that can be written to unseen."""
DESCRIBES = frozenset(
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda", "is_sparse", "is_quantized")
)
"""What only tells of a tensor: two thirds of all calls in a Keras layer, which modes hand on at once."""
SEQUENCES = (tuple, list)
RUNNING = {
    **dict.fromkeys((F.batch_norm, F.instance_norm), 1),
    **dict.fromkeys((torch.batch_norm, torch.instance_norm, torch.native_batch_norm), 3),
}
"""{function that updates running statistics, which their version does not tell: position of the first of them}."""


def writes_unseen(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call may write to a tensor whose version does not tell of it."""
    position = RUNNING.get(func)
    if position is None:
        return func in HANDED_OUT
    return kwargs.get("running_mean", args[position] if len(args) > position else None) is not None


class WrittenTo(BaseException):
    """The user's memory would be written to now; not an Exception, for models catch those.

    Attributes
    ----------
    tensor:
        What is in that memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__("a forward pass writes to memory that is shared with the user")
        self.tensor = tensor


class Guard:
    """Tensors whose memory must not be written to."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._memory = {key: tensor for tensor in tensors for key in _memory(tensor)}

    def check(self, func: Callable, args: tuple, kwargs: dict) -> None:
        """Raise `WrittenTo` if the call is about to write to one of them."""
        found = self.written(func, args, kwargs)
        if found is not None:
            raise WrittenTo(found)

    def written(self, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        """The one that the call is about to write to."""
        keys = (key for target in _targets(func, args, kwargs) for key in _memory(target))
        return next((self._memory[key] for key in keys if key in self._memory), None)


def _targets(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call writes to."""
    found = tensors(args[0]) if args and writes(func) else []
    if "out" in kwargs:
        found += tensors(kwargs["out"])
    position = MAX_NORM.get(func)
    if position is not None and kwargs.get("max_norm", args[position] if len(args) > position else None) is not None:
        found += tensors(args[1] if len(args) > 1 else kwargs["weight"])
    return found


@functools.lru_cache(maxsize=4096)
def writes(func: Callable) -> bool:
    """Whether a function of PyTorch's writes to its first argument, by its name: they all end with an underscore."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name[2] == "i" and name[3:-2] in _OPERATORS)
    return name.endswith("_") and name not in HARMLESS


_OPERATORS = frozenset(
    {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift", "div"}
)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries. Runs for each operation of a pass."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, SEQUENCES):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def _memory(tensor: Tensor) -> tuple[int, ...]:
    try:
        return (tensor.untyped_storage().data_ptr(),) if tensor.numel() else ()
    except (RuntimeError, NotImplementedError):  # inside of a transformation, or of a layout without storage
        return ()
