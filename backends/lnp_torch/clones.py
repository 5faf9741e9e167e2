"""Copies of the tensors that a model holds beside its parameters: buffers, attributes, what a closure refers to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

LARGE = 2**26
"""Bytes of a tensor from which on it is copied only if it is a buffer, or known to be written to: what is so large and
no buffer is mostly data that is only read."""


class Clones:
    """Tensors and what stands for them; what a pass wrote to is copied again before the next.

    Parameters
    ----------
    written:
        Ids of tensors that are copied whatever their size.

    Attributes
    ----------
    buffers:
        Ids of buffers.
    touched:
        Set where memory was handed out that can be written to unseen (`.data`, `.numpy()`).
    dtype:
        In which real floating-point tensors are handed out, or None for their own.
    """

    def __init__(self, written: frozenset[int] = frozenset()) -> None:
        self.written, self.buffers, self.touched = written, set[int](), False
        self.dtype: torch.dtype | None = None
        self._originals: dict[int, Tensor] = {}
        self._now: dict[int, tuple[Tensor, int]] = {}

    def add(self, x: Tensor) -> None:
        """Have something stand for a tensor."""
        self._originals[id(x)] = x

    def constant(self, x: Tensor) -> Tensor:
        """What stands for a tensor during the whole measurement."""
        return _clone(x)

    def shared(self) -> list[Tensor]:
        """The tensors whose memory the measurement shares."""
        return [x for x in self._originals.values() if not self._copied(x)]

    def fresh(self) -> dict[int, Tensor]:
        """{id: a tensor with the values that it had in the beginning}."""
        stale = [x for key, x in self._originals.items() if self._stale(key)]
        groups: dict[int, list[Tensor]] = {}
        for x in self._originals.values():
            groups.setdefault(_memory(x), []).append(x)
        again = {_memory(x) for x in stale}
        for memory in again:
            for x, clone in self._clones(groups[memory]):
                self._now[id(x)] = clone, clone._version
        self.touched = False
        return {key: cast(clone, self.dtype) for key, (clone, _) in self._now.items()}

    def _stale(self, key: int) -> bool:
        if key not in self._now:
            return True
        clone, version = self._now[key]
        return self.touched or clone._version != version or functorch.is_functorch_wrapped_tensor(clone)

    def _clones(self, same: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of tensors in the same memory, so that a view of a tensor is a view of its copy."""
        if not any(map(self._copied, same)):
            return [(x, _leaf(x, x.detach())) for x in same]
        if len(same) == 1:
            return [(same[0], _clone(same[0]))]
        memory = same[0].untyped_storage().clone()
        return [(x, _leaf(x, _placed(x, memory))) for x in same]

    def _copied(self, x: Tensor) -> bool:
        if id(x) in self.buffers or id(x) in self.written:
            return True
        return not isinstance(x, torch.nn.Parameter) and x.numel() * x.element_size() <= LARGE


def cast(x: Any, dtype: torch.dtype | None) -> Any:
    """A real floating-point tensor in another dtype; anything else as it is."""
    real = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().to(dtype) if real and dtype is not None else x


def _placed(x: Tensor, memory: torch.UntypedStorage) -> Tensor:
    """A tensor like this one at the same place of other memory."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(memory, x.storage_offset(), x.size(), x.stride())


def _clone(x: Tensor) -> Tensor:
    return _leaf(x, x.detach().clone())


def _leaf(x: Tensor, made: Tensor) -> Tensor:
    """What was made of a tensor, a leaf that requires a gradient where that one is."""
    return made.requires_grad_() if x.requires_grad and x.is_leaf else made


def _memory(x: Tensor) -> int:
    """What tells whether tensors share their memory: plain ones by their storage, others stand alone."""
    plain = type(x) is Tensor and x.layout == torch.strided and x.device.type != "meta"
    return x.untyped_storage().data_ptr() or id(x) if plain else id(x)
