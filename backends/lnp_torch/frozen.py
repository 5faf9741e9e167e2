"""One forward pass fixes what is random or depends on the batch; later passes, on part of the batch, repeat it.

Dropout keeps its masks. Batch normalisation in training mode keeps this batch's statistics (mean and biased
variance), and updates none.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnp_torch.isolation import generator_state, set_generator_state
from lnp_torch.models import captured, replaced

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout)
ATTENTION = F.multi_head_attention_forward


class Frozen(TorchFunctionMode):
    """Records masks and statistics on the first pass, in the order of the calls, and replays them.

    Parameters
    ----------
    statistics:
        Whether batch normalisation is frozen too.
    record:
        The values of an earlier pass to replay, or None to record.
    attention:
        Whether attention that draws its dropout inside a fused kernel is computed with a mask outside of it, which
        rounds differently.
    """

    def __init__(self, statistics: bool, record: list | None = None, attention: bool = True) -> None:
        super().__init__()
        self._statistics, self._fused = statistics, attention
        self._replay = None if record is None else iter(record)
        self.record: list[tuple[str, Any]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if captured(args, kwargs):
            args, kwargs = replaced(args, kwargs)
        if func in DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is F.batch_norm and self._statistics:
            return self._batch_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._fused and _dropout_p(args, kwargs) > 0:
            return self._attention(*args, **kwargs)
        if func is ATTENTION:
            with self:  # so that its parts are seen
                return _open_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _fixed(self, kind: str, draw: Callable[[], Any]) -> Any:
        """The recorded value of this call, or a new one."""
        if self._replay is None:
            with torch.no_grad():
                value = draw()
            self.record.append((kind, value))
            return value
        recorded, value = next(self._replay, ("nothing", None))
        if recorded != kind:
            raise RuntimeError(f"the network took another path: {kind} where the first pass had {recorded}")
        return value

    def _mask(self, like: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """A mask, and the random state after it: what else a network draws is then the same in every pass."""
        mask = self._fixed("mask", lambda: draw(torch.ones_like(like)))
        after = self._fixed("state", lambda: generator_state(like.device))
        if self._replay is not None:
            set_generator_state(like.device, after)
        return mask

    def _dropout(self, func, input, p=0.5, training=True, inplace=False, **kwargs):
        if not kwargs.get("train", training) or p == 0:
            return input
        mask = self._mask(input, lambda ones: func(ones, p, True))
        return input.mul_(mask) if inplace else input * mask

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        mean, variance = self._fixed("statistics", lambda: torch.var_mean(_wide(input), dim=axes, correction=0)[::-1])
        return F.batch_norm(input, mean, variance, weight, bias, False, momentum, eps)

    def _attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """softmax(q k^T scale + mask) v with a dropout mask on the weights: fused kernels draw theirs inside."""
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = torch.softmax(scores, dim=-1)
        mask = self._mask(weights, lambda ones: F.dropout(ones, dropout_p, True))
        return (weights * mask) @ value


def rows(record: list[tuple[str, Any]], samples: int, part: slice | torch.Tensor) -> list[tuple[str, Any]]:
    """The recorded values for some of the samples. Masks may have several rows per sample, as attention heads do."""
    return [(kind, _mask_rows(value, samples, part) if kind == "mask" else value) for kind, value in record]


def _mask_rows(mask: torch.Tensor, samples: int, part: slice | torch.Tensor) -> torch.Tensor:
    if mask.ndim == 0 or mask.shape[0] % samples:
        return mask
    return mask.unflatten(0, (samples, -1))[part].flatten(0, 1)


def _dropout_p(args: tuple, kwargs: dict) -> float:
    return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)


def _wide(input: torch.Tensor) -> torch.Tensor:
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


_open_attention = types.FunctionType(
    ATTENTION.__code__,
    {**ATTENTION.__globals__, "has_torch_function": lambda tensors: False},
    ATTENTION.__name__,
    ATTENTION.__defaults__,
    ATTENTION.__closure__,
)
"""Multi-head attention whose parts the mode sees: the original hands itself over as a whole, with its dropout."""
