"""What decides, beside trained parameters and inputs, which function a model computes: settings, and gates."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import nn

from lnp_torch.complex import real
from lnp_torch.model import Program

FEW = 16
"""Numbers in a buffer, or in a parameter that is not trained, up to which their values are looked at."""
EXACT = 16
"""Integers up to which each is a setting of its own (an axis, a shift); of larger ones the magnitude counts."""


def about(value: Any) -> Any:
    """A setting, as far as it decides whether samples interact: small integers, sign and magnitude of other numbers.

    >>> about(0), about(True), about(0.0) == about(1e-3), about(0.5) == about(0.7)
    (0, True, False, True)
    """
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int):
        return value if abs(value) <= EXACT else (value > 0, value.bit_length())
    if isinstance(value, float):
        return (value > 0, value < 0, math.frexp(value)[1] if math.isfinite(value) else str(value))
    return None


def settings(program: Program) -> tuple:
    """What else a module computes with, if it is a number or a few: a gate in a buffer may open later.

    Running statistics are no settings. A device is read only where a value may have changed since the last time.
    """
    owner = program.owner
    if not isinstance(owner, nn.Module):
        return ()
    held = [
        tensor
        for module in program.modules
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for tensor in (*module._buffers.values(), *module._parameters.values())
        if tensor is not None and 0 < tensor.numel() <= FEW and id(tensor) not in program.trained
        if tensor.layout == torch.strided
    ]
    seen = tuple((id(tensor), tensor._version) for tensor in held)
    before = _SETTINGS.get(owner)
    if before is None or before[0] != seen:
        flat = [real(t.detach()).flatten().to(program.device, torch.float32) for t in held]
        values = torch.cat(flat).tolist() if flat else []
        before = _SETTINGS[owner] = seen, tuple(about(value) for value in values)
    return before[1]


_SETTINGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
