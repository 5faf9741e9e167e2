"""The core's random signs, on the device of a batch's outputs."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import numpy as np
import torch
from array_api_compat import torch as xp

from lnp.estimators.signs import Signs, layout, seed_words


def signs_of(seed: Any, flat: torch.Tensor, parts: list[torch.Tensor]) -> Signs:
    """The signs for outputs (N, K), which were these parts."""
    found = layout([part.shape for part in parts], channels_first=True)
    words, shape = seed_words(operator.index(seed)), (flat.shape[0], flat.shape[1])
    return Signs(xp, words, shape, *found, flat.dtype, partial(_on, flat.device))


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A small array on the device, without waiting for what runs there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
