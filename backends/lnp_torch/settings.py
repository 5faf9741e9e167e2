"""What beside parameters and inputs decides which function a model computes: settings, and gates that may open later."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import nn

from lnp_torch.complex import real
from lnp_torch.models import Program

FEW = 16
"""Numbers in a buffer, or in a parameter that is not trained, up to which their values are looked at."""
EXACT = 16
"""Integers up to which each is a setting of its own (an axis, a shift); of larger ones the magnitude counts."""


def about(value: Any) -> Any:
    """A setting, as far as it decides whether samples interact: small integers, the magnitude of other numbers."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int | float):
        exact = value == 0 or (isinstance(value, int) and abs(value) <= EXACT)
        return value if exact or not math.isfinite(value) else (value > 0, math.frexp(value)[1])
    return None


def settings(program: Program) -> tuple:
    """What else a module computes with, if it is a number or a few: a gate in a buffer may open later.

    Running statistics are no settings. A device is read only where a value may have changed since the last time.
    """
    owner = program.owner
    if not isinstance(owner, nn.Module):
        return ()
    own = dict(owner.named_parameters())
    trained = {id(own[name]) for name in program.parameters}
    held = [
        tensor
        for module in program.modules
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for tensor in (*module._buffers.values(), *module._parameters.values())
        if tensor is not None and 0 < tensor.numel() <= FEW and id(tensor) not in trained
    ]
    seen = tuple((id(tensor), tensor._version) for tensor in held)
    before = _SETTINGS.get(owner)
    if before is None or before[0] != seen:
        values = torch.cat([real(t.detach()).flatten().double() for t in held]).tolist() if held else []
        before = _SETTINGS[owner] = seen, tuple(about(value) for value in values)
    return before[1]


_SETTINGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
