"""One forward pass fixes what is random or depends on the batch; later passes, on part of the batch, repeat it.

Dropout keeps its masks, and whatever else PyTorch's functions draw is repeated. Batch normalisation in training mode
keeps this batch's statistics (mean and biased variance), if that gives what the network computes by itself; running
statistics are afterwards what the first pass made of them, for a network may read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from array_api_compat import torch as xp
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnp.contract.linearization import coupling_tolerance
from lnp.per_sample.differences import frozen_agrees
from lnp_torch.constants import Constants
from lnp_torch.draws import (
    ATTENTION,
    DROPOUTS,
    FILLED,
    HOOKS,
    MADE,
    OPENS,
    Expected,
    Record,
    device_of,
    dropout_arguments,
    open_attention,
)
from lnp_torch.model import Program, captured, replaced
from lnp_torch.outputs import widened
from lnp_torch.state_guard import set_generator_state
from lnp_torch.writes import DESCRIBES, tensors, writes_unseen


class Frozen(TorchFunctionMode):
    """Records masks and statistics on the first pass, in the order of the calls, and replays them.

    Parameters
    ----------
    statistics:
        Whether batch normalisation is frozen too.
    program:
        Whose passes these are: what it shares with the user must not be written to.
    record:
        The values of an earlier pass to replay, or None to record.
    own:
        Numbers of the batch normalisations that are left as they are, see `Passes.own_statistics`.
    attention:
        Whether attention that draws its dropout inside a fused kernel is computed with a mask outside of it, which
        rounds differently.

    Attributes
    ----------
    record:
        What was recorded.
    hooked:
        Whether hooks were put on activations: they run in the backward pass.
    agree:
        Flags of shape (): whether batch normalisation with statistics that are held computes what it is without.
    """

    def __init__(
        self,
        statistics: bool,
        program: Program,
        record: Record | None = None,
        attention: bool = True,
        own: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self._statistics, self._fused, self._program = statistics, attention, program
        self._replay = None if record is None else iter(record)
        self._expected = Expected(program.device) if record is None else None
        self._constants = Constants(program.replica) if record is None else None
        self.record: Record = []
        self.hooked = False
        self.agree: list[torch.Tensor] = []
        self._own, self._normalisations = own, 0

    @property
    def explained(self) -> bool:
        """Whether all that PyTorch's generators drew in a pass that records is recorded."""
        return self._expected is None or self._expected.all_explained()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if captured(args, kwargs):
            args, kwargs = replaced(args, kwargs)
        if func in DESCRIBES:
            return func(*args, **kwargs)
        self.hooked |= func in HOOKS
        if writes_unseen(func, args, kwargs):
            self._program.replica.clones.touched = True
        self._program.guard.check(func, args, kwargs)
        out = self._called(func, args, kwargs)
        if self._constants is not None:
            self._constants.follow(tensors((args, kwargs)), tensors(out))
        return out

    def _called(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What the function returns, with what is drawn and held as in the first pass."""
        if func in DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func in MADE or func in FILLED:
            return self._draw(func, args, kwargs)
        if func is F.batch_norm and self._statistics:
            return self._batch_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._fused and _dropout_p(args, kwargs) > 0:
            return self._attention(*args, **kwargs)
        if func is ATTENTION and OPENS:
            with self:  # so that its parts are seen
                return open_attention(*args, **kwargs)
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

    def _drawn(self, kind: str, device: torch.device, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A recorded draw, and the random state after it: what else a network draws is then the same in every pass."""
        if self._expected is not None:
            self._expected.before(device)
        value = self._fixed(kind, draw)
        after = self._fixed("state", lambda: self._expected.after(device))  # type: ignore[union-attr]
        if self._replay is not None:
            set_generator_state(device, after)
        return value

    def _mask(self, like: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return self._drawn("mask", like.device, lambda: draw(torch.ones_like(like)))

    def _dropout(self, func, *args, inplace=False, **kwargs):
        """The input times the recorded mask."""
        input, p, training = dropout_arguments(*args[:3], **kwargs)
        inplace = inplace or args[3:] == (True,)
        if not training or p == 0:
            return input
        mask = self._mask(input, lambda ones: func(ones, p, True))
        return input.mul_(mask) if inplace else input * mask

    def _draw(self, func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """Random numbers of a function of PyTorch's, in a tensor of their own or in one that is given."""
        value = self._drawn("draw", device_of(args, kwargs), lambda: func(*args, **kwargs).detach().clone())
        if func in FILLED:
            return args[0] if self._replay is None else args[0].copy_(value)
        return value.clone()  # the network may write to it

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        """Batch normalisation with the statistics of the first pass.

        Statistics of what is computed from parameters alone (weight standardisation), or of single samples (instance
        normalisation), are no batch's.
        """

        def as_it_is(input: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

        self._normalisations += training
        if not training or self._fixed("no batch's", lambda: self._no_batch_s(input)):
            return as_it_is(input)
        running = [t for t in (running_mean, running_var) if t is not None]
        mean, variance, *after = self._fixed("statistics", lambda: _statistics(input))
        out = _normalised(input, mean, variance, weight, bias, eps)
        with torch.no_grad():
            if self._replay is None:
                own = as_it_is(input.detach())  # which updates the running statistics
                tolerance = coupling_tolerance(xp, input.dtype)
                self.agree.append(frozen_agrees(xp, out.detach().flatten(1), own.flatten(1), tolerance))
                after = [t.clone() for t in running]
                self.record[-1] = ("statistics", (mean, variance, *after))
            for t, value in zip(running, after, strict=True):
                t.copy_(value)
        return out

    def _no_batch_s(self, input: torch.Tensor) -> bool:
        """Whether statistics of a tensor of the first pass are no batch's."""
        assert self._constants is not None, "it is asked in the first pass"
        return self._normalisations - 1 in self._own or input in self._constants

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


def _dropout_p(args: tuple, kwargs: dict) -> float:
    return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)


def _statistics(input: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean and biased variance over all axes but the second, in float32 or better."""
    return torch.var_mean(widened(input), dim=[axis for axis in range(input.ndim) if axis != 1], correction=0)[::-1]


def _normalised(input, mean, variance, weight, bias, eps) -> torch.Tensor:
    """Batch normalisation with given statistics; its kernels take those of a weight of narrower type in that type."""
    if weight is None or weight.dtype == mean.dtype:
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)
    shape = (1, -1, *[1] * (input.ndim - 2))
    out = F.batch_norm(input, mean, variance, None, None, False, 0.0, eps) * weight.view(shape)
    return out if bias is None else out + bias.view(shape)
