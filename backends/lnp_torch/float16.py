"""float16 knows no numbers below 6e-8, while the loss gradients of many terms are smaller: they would pass as zero.

Products with J and J^T are linear, so that the vector can be brought to a scale of one first and the result be brought
back, in float32. The scale is a power of two, which costs no rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lnp_torch.outputs import widened

Vector = list[torch.Tensor]


def at_scale_one(linear: Callable[[Vector], Vector], vector: Vector, through: Iterable[torch.Tensor]) -> Vector:
    """linear(vector); in float32 and at a scale of one where float16 is among the tensors that it goes through."""
    scale = scale_to_one(vector, through)
    if scale is None:
        return linear(vector)
    return [widened(part) / scale for part in linear([widened(part) * scale for part in vector])]


def scale_to_one(vector: Vector, through: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """What brings the vector to a scale of one, shape (); None where no float16 asks for it."""
    return _power_of_two(vector) if _half(list(through)) else None


def _half(tensors: Vector) -> bool:
    device = tensors[0].device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(tensor.dtype == torch.float16 for tensor in tensors)


def _power_of_two(vector: Vector) -> torch.Tensor:
    """What brings the largest entry to between 1/2 and 1, shape ()."""
    largest = torch.stack([part.abs().max().float() for part in vector if part.numel()]).max()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)  # zero has exponent 0; a scale must not overflow
    return torch.ldexp(torch.ones_like(largest), -exponent)
