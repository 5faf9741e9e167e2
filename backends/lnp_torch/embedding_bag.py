"""Bags of embeddings in pieces that can be differentiated in every way: PyTorch's operation has one backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class InPieces(TorchFunctionMode):
    """Bags of embeddings are computed by looking up rows and reducing them, bag by bag."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _bags(*args, **kwargs) if func is F.embedding_bag else func(*args, **kwargs)


def _bags(
    input, weight, offsets=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
) -> Tensor:  # fmt: skip
    """F.embedding_bag."""
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    rows = F.embedding(input.flatten(), weight, None, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten()[:, None]
    starts = range(0, input.numel(), input.shape[1]) if input.ndim == 2 else offsets.tolist()
    ends = [*starts[1:], *([] if include_last_offset else [input.numel()])]
    indices, found = input.flatten(), []
    for start, end in zip(starts, ends, strict=include_last_offset is False):
        bag = rows[start:end]
        found.append(_reduced(bag if padding_idx is None else bag[indices[start:end] != padding_idx], mode))
    return torch.stack(found)


def _reduced(bag: Tensor, mode: str) -> Tensor:
    """What a bag's rows (S, q) are reduced to, (q,); zero where there are none."""
    if mode == "sum" or not len(bag):
        return bag.sum(0)
    return bag.mean(0) if mode == "mean" else bag.max(0).values
