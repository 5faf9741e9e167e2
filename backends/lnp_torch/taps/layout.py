"""Where the samples are in the arrays that go into an operation and come out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lnp_torch.taps.routed import Rows

ROWS = 2**24
"""Numbers in the gradients of all samples by such rows, up to which they are formed."""


class Unread(Exception):
    """An array in which the samples are not found along the first axis."""


@dataclass(frozen=True)
class Layout:
    """Where the samples are in the arrays of a site: (N, S, ...) and (N * S, ..., p), or (S, N, ...) and (S * N, ...).

    Attributes
    ----------
    samples:
        N.
    time_major:
        Whether they are on the second axis.
    rerouted:
        Whether rows may have moved before: whose row it is cannot be told by its number, if all are in one axis.
    rows:
        Whose they are, where rows that have moved were followed.
    """

    samples: int
    time_major: bool = False
    rerouted: bool = False
    rows: Rows | None = None

    def first(self, array: Tensor, inner: int) -> Tensor:
        """The array as (N, ..., inner axes).

        Raises
        ------
        Unread
            If the samples are not there.
        """
        samples, outer = self.samples, array.ndim - inner
        if outer < 1 or (self.rows is not None and len(array) != self.rows.count):
            raise Unread
        if self.rows is not None:
            return self.rows.by_sample(array)
        in_one_axis = outer == 1 or (not self.time_major and array.shape[0] != samples)  # windows of a sample, say
        # (N, S, p) is told by its axes, whatever a parameter was broadcast along
        rows_alone = in_one_axis and (self.time_major or array.ndim < 3 or array.shape[0] != samples)
        if in_one_axis and array.shape[0] % samples == 0 and (self.time_major or array.shape[0] != samples):
            array = array.unflatten(0, (-1, samples) if self.time_major else (samples, -1))
        axis = 1 if self.time_major else 0
        if axis >= array.ndim - inner or array.shape[axis] != samples or (rows_alone and self.rerouted):
            raise Unread
        return array.movedim(axis, 0)

    def samples_of(self, row: Tensor) -> Tensor:
        """The number of each row's sample, (R,), where all rows lie in one axis; `row` is 0..R-1."""
        if self.rows is not None and len(row) == self.rows.count:
            return self.rows.sample_of(row)
        if self.rows is not None or self.rerouted or self.time_major or len(row) % self.samples:
            raise Unread
        return row // (len(row) // self.samples)

    def positions(self, array: Tensor) -> Tensor:
        """(N, S, p)."""
        return self.first(array, 1).reshape(self.samples, -1, array.shape[-1])

    def reduced(self, gradient: Tensor, shape: tuple) -> Tensor:
        """Summed over the axes along which a parameter of this shape was broadcast, but the samples: (N, *shape)."""
        if self._has_own_rows(gradient, shape):
            rows = self.reduced(gradient, shape[1:])
            each = torch.zeros(self.samples, *shape, dtype=rows.dtype, device=rows.device)
            each.diagonal(dim1=0, dim2=1).copy_(rows.movedim(0, -1))
            return each
        if shape and gradient.ndim == len(shape) and shape[0] == 1:
            shape = shape[1:]
        gradient = self.first(gradient, len(shape))
        lead = gradient.ndim - 1 - len(shape)
        axes = [*range(1, 1 + lead), *(1 + lead + i for i, size in enumerate(shape) if size == 1)]
        summed = gradient.sum(axes, keepdim=True) if axes else gradient
        return summed.reshape(self.samples, *shape)

    def _has_own_rows(self, gradient: Tensor, shape: tuple) -> bool:
        """Whether what was broadcast has a row for each sample, as a first state of zeros has times a weight."""
        rows = bool(shape) and 1 < self.samples == shape[0] == gradient.shape[0] and gradient.ndim == len(shape)
        return rows and self.rows is None and not self.time_major and self.samples**2 * math.prod(shape[1:]) <= ROWS

    def channels(self, d: Tensor, count: int) -> Tensor:
        """(N, C, ...) summed over all that follows, and over the channels if they share one parameter."""
        if self.time_major or d.ndim < 2:
            raise Unread
        flat = self.first(d.reshape(*d.shape[:2], -1).sum(2), 1).reshape(self.samples, -1, d.shape[1]).sum(1)
        return flat if count != 1 else flat.sum(1, keepdim=True)
