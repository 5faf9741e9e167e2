"""Random signs for probes, the same ones from the same seed on the same kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


def signs_of(seed: Any, like: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """index -> (N, K) random signs."""
    table = 1 - 2 * (torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1)
    table = table.to(like.dtype)  # the eight signs that each byte stands for

    def signs(index: int) -> torch.Tensor:
        state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(like.device).manual_seed(int(state >> 1))
        if like.device.type == "cuda":  # draws numbers faster than it looks up their bits
            drawn = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=like.dtype)
            return drawn.mul_(2).sub_(1)
        count = like.numel() // 32 + 1
        words = torch.randint(-(2**31), 2**31, (count,), generator=generator, device=like.device, dtype=torch.int32)
        return F.embedding(words.view(torch.uint8).int(), table).view(-1)[: like.numel()].view(like.shape)

    return signs
