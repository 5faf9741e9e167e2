"""Uses of a parameter, and how tensors are joined, repeated and rearranged before they meet the samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lnp.per_sample.uses import Kind
from lnp_torch.taps.layout import Layout, Unread


@dataclass(frozen=True)
class Use:
    """One parameter in one operation.

    Attributes
    ----------
    tensor:
        The parameter, or the view of it, that the operation received.
    kind:
        In which form its gradients are.
    factors:
        (cotangent of the output, layout) -> the arrays of `lnp.per_sample.uses.Factors` of that kind.
    transposed:
        Of an "outer" use: whether left runs over the tensor's columns.
    index:
        Of a "rows" use: which rows are looked up.
    matrix:
        Of an "outer" use of a tensor that is none: the matrix that the operation sees in it.
    """

    tensor: Tensor
    kind: Kind
    factors: Callable[[Tensor, Layout], tuple]
    transposed: bool = False
    index: Tensor | None = None
    matrix: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """The tensor as the operation sees it."""
        return self.tensor if self.matrix is None else self.matrix

    def products(self, out: Tensor) -> int:
        """Multiplications that made the output, if there are many."""
        if self.kind not in ("outer", "convolution", "experts"):
            return 0
        per_output = self.seen.numel() // self.seen.shape[1 if self.transposed else 0]
        return out.numel() * (self.seen.shape[1] if self.kind == "experts" else per_output)


NOTHING = Use(None, "dense", lambda d, at: ())


class Unknown(Exception):
    """A variant that no rule is written for."""


def joined(tensors, dim=0):
    """Class tokens before patches, say."""
    dim = dim % tensors[0].ndim
    starts = itertools.accumulate([tensor.shape[dim] for tensor in tensors], initial=0)
    return [part(t, dim, start) for t, start in zip(tensors, starts, strict=False)] if dim else []


def part(tensor, dim, start):
    """One of the tensors that are joined along an axis that is not the samples'."""
    size, shape = tensor.shape[dim], unspread(tensor)
    return Use(tensor, "dense", lambda d, at: (at.reduced(d.narrow(dim, start, size), shape),))


def repeated(input, *sizes):
    """Copies for the samples, along the first axis."""
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = (1,) * (len(sizes) - input.ndim) + tuple(input.shape)
    if sizes[0] == 1 or len(sizes) != len(shape):
        raise Unknown

    def summed(d, at):
        if at.time_major or sizes[0] % at.samples:
            raise Unread
        lengths = [length for pair in zip(sizes[1:], shape[1:], strict=True) for length in pair]
        copies = d.reshape(at.samples, -1, shape[0], *lengths)
        return (copies.sum([1, *range(3, copies.ndim, 2)]).reshape(at.samples, *input.shape),)

    return [Use(input, "dense", summed)]


def rearranged(input, *settings, **more):
    """The same numbers in another shape or type, of a tensor that was spread over the samples."""
    if not is_spread(input):
        raise Unknown
    whole, shape = input.shape, unspread(input)
    return [Use(input, "dense", lambda d, at: (at.reduced(d.reshape(whole), shape),))]


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is the same along its first axis, by `expand`."""
    return tensor.ndim > 0 and tensor.shape[0] > 1 and tensor.stride(0) == 0


def unspread(tensor: Tensor) -> tuple[int, ...]:
    """The shape that it was expanded from."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(1 if size > 1 and stride == 0 else size for size, stride in pairs)
