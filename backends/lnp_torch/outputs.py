"""From what a model returns to the (N, K) arrays that the core sees, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lnp.contract.trees import leaves, map_leaves
from lnp.contract.validation import check_outputs


def continuous(leaf: Any) -> bool:
    """Whether it is a tensor of real or complex numbers."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts of a complex tensor along a last axis; a real tensor as it is.

    Not by `view_as_real`, whose derivative takes only gradients with even offsets in memory.
    """
    return torch.stack([tensor.real, tensor.imag], dim=-1) if tensor.is_complex() else tensor


def like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values in the form of `real(tensor)` as a tensor of its own kind: a complex number is two real ones."""
    return torch.complex(*values.unbind(-1)) if tensor.is_complex() else values


@dataclass(frozen=True)
class Outputs:
    """What a model returned. Measured are those of its floating-point and complex leaves that the loss comes from.

    Attributes
    ----------
    tree:
        What the model returned, whole.
    measured:
        Places of the measured ones among these leaves; None for all of them.
    """

    tree: Any
    measured: tuple[int, ...] | None = None

    @property
    def candidates(self) -> list[torch.Tensor]:
        """All leaves of real or complex numbers."""
        return [leaf for leaf in leaves(self.tree) if continuous(leaf)]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The leaves that are measured, sample axis first."""
        found = self.candidates
        return found if self.measured is None else [found[place] for place in self.measured]

    @property
    def parts(self) -> list[torch.Tensor]:
        """The leaves that are measured, as real numbers."""
        return [real(leaf) for leaf in self.leaves]

    @property
    def samples(self) -> int:
        """N; a loss that the model has computed itself has no rows."""
        return next((len(leaf) for leaf in self.leaves if leaf.ndim), 0)

    def flat(self) -> torch.Tensor:
        """(N, K) in float32 or better."""
        return flatten(self.parts)

    def with_parts(self, parts: list[torch.Tensor]) -> Any:
        """The structure with others in the place of what is measured."""
        values = dict(zip(range(len(parts)) if self.measured is None else self.measured, parts, strict=True))
        places = itertools.count()

        def replaced(leaf: Any) -> Any:
            if not continuous(leaf):
                return leaf
            place = next(places)
            return like(leaf, values[place]) if place in values else leaf

        return map_leaves(replaced, self.tree)

    @property
    def own_loss(self) -> torch.Tensor | None:
        """The loss that the model has computed itself: named `loss`, or the first of a tuple; None without one.

        So Hugging Face's Trainer takes it, and it is all that is read by name.
        """
        tree = self.tree
        if isinstance(tree, Mapping):
            found = tree.get("loss")
        elif isinstance(tree, tuple) and not hasattr(tree, "loss"):
            found = tree[0] if tree else None
        else:
            found = None if isinstance(tree, torch.Tensor) else getattr(tree, "loss", None)
        return found if isinstance(found, torch.Tensor) and continuous(found) and found.numel() == 1 else None


def flatten(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join (N, ...) tensors to (N, K), in float32 or better."""
    samples = check_outputs([part.shape for part in parts])
    dtype = wide(parts)
    rows = [part.reshape(samples, -1).to(dtype) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def split(v: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `flatten`: (N, K) to tensors of the parts' shapes and dtypes."""
    pieces = v.split([part[0].numel() for part in parts], dim=1)
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]


WIDE = (torch.float32, torch.float64)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or better."""
    return tensor if tensor.dtype in WIDE else tensor.float()


def wide(parts: list[torch.Tensor]) -> torch.dtype:
    """float64 if one of the parts is, float32 otherwise."""
    return torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32


CHUNK = 2**18
"""Numbers of a vector that are multiplied at a time."""
ON_A_DEVICE = 2**25
"""The same on a GPU, which would wait for the launches of small pieces."""


def square_norm(a: torch.Tensor) -> torch.Tensor:
    """||a||^2 in float32 or better."""
    if a.device.type == "cpu":  # whose norms add up one number after another
        return dot(a, a)
    # reads narrow numbers as they are, and writes none
    return torch.linalg.vector_norm(a, dtype=wide([a])).square()


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> in float32 or better, without a product of the vectors' size."""
    chunk = CHUNK if a.device.type == "cpu" else ON_A_DEVICE
    if a.numel() <= chunk:
        return (widened(a) * widened(b)).sum()
    pairs = zip(a.reshape(-1).split(chunk), b.reshape(-1).split(chunk), strict=True)
    return torch.stack([dot(one, other) for one, other in pairs]).sum()
