"""Complex tensors as real ones: a complex number is two real ones, as it is to PyTorch's optimisers."""

from __future__ import annotations

from typing import Any

import torch


def continuous(leaf: Any) -> bool:
    """Whether it is a tensor of real or complex numbers."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts of a complex tensor along a last axis; a real tensor as it is.

    Not by `view_as_real`, whose derivative takes only gradients with even offsets in memory.
    """
    return torch.stack([tensor.real, tensor.imag], dim=-1) if tensor.is_complex() else tensor


def like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values in the form of `real(tensor)` as a tensor of its own kind."""
    return torch.complex(*values.unbind(-1)) if tensor.is_complex() else values
