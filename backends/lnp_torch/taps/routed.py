"""Whose each row is, where the rows of all samples lie along one axis and move: tokens that are sorted by their expert.

A tensor (N, S, p) that is seen as (N * S, p) has rows in the order of the samples. From there on the operations of a
pass are followed, as long as each row of what comes out is made of one row of what went in. Which rows an index picks
is read off its numbers, in every pass anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lnp_torch.writes import tensors

RESHAPES = frozenset({"view", "reshape", "flatten"})
PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "_grouped_mm", "grouped_mm", "layer_norm", "rms_norm"})
"""Operations that make each row of one row of their first tensor."""
ELEMENTWISE = frozenset({
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "mul", "mul_", "__mul__", "__rmul__",
    "__imul__", "div", "div_", "__truediv__", "__itruediv__", "__floordiv__", "pow", "rsqrt", "clamp", "clip",
    "sigmoid", "tanh", "relu", "relu_", "silu", "gelu", "softplus", "exp", "masked_fill", "dropout", "to", "float",
    "type_as", "contiguous", "clone", "detach",
})  # fmt: skip
PUTS = frozenset({"__setitem__", "index_put", "index_put_"})
ALONG_DIM = frozenset({"index_copy", "index_copy_", "index_add", "index_add_", "scatter", "scatter_", "scatter_add",
                       "scatter_add_", "gather"})  # fmt: skip
MOVES = PUTS | ALONG_DIM | {"take_along_dim"}
"""Operations that move rows, if they are told the first axis, in a way that is not followed."""
ALONG_AN_AXIS = {"softmax": 1, "sum": 1, "mean": 1, "unsqueeze": 1, "chunk": 2, "split": 2, "topk": 2}
"""{operation that makes each row of one row if it is told another axis than the first: which argument that is}."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Whose the rows of a tensor are.

    Attributes
    ----------
    samples:
        N.
    count:
        Of the rows, R.
    moved:
        The number of each row's sample, (R,), if they have moved; None where they lie in the order of the samples.
    """

    samples: int
    count: int
    moved: Tensor | None = None

    def sample_of(self, row: Tensor) -> Tensor:
        """The number of each row's sample, (R,), from the numbers 0..R-1 of the rows."""
        return row // (self.count // self.samples) if self.moved is None else self.moved

    def picked(self, index: Tensor | slice, device: torch.device) -> Rows:
        """Those that numbers, a mask or a slice pick."""
        sample = self.sample_of(torch.arange(self.count, device=device))[index]
        return Rows(self.samples, len(sample), sample)

    def merged(self, every: int) -> Rows:
        """So many of them at a time as one, which are of one sample unless samples meet."""
        moved = None if self.moved is None else self.moved[::every]
        return Rows(self.samples, self.count // every, moved)

    def repeated(self, times: int) -> Rows:
        """Each of them so many times, one after the other."""
        moved = None if self.moved is None else self.moved.repeat_interleave(times)
        return Rows(self.samples, self.count * times, moved)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """(the rows in the order of their samples, their sample, their number in it, the most that a sample has)."""
        assert self.moved is not None, "rows that have not moved are found by their number"
        order = torch.argsort(self.moved, stable=True)
        sample, counts = self.moved[order], torch.bincount(self.moved, minlength=self.samples)
        number = torch.arange(self.count, device=order.device) - (counts.cumsum(0) - counts)[sample]
        return order, sample, number, max(1, int(counts.max()))

    def by_sample(self, array: Tensor) -> Tensor:
        """Rows (R, ...) that have moved as (N, S, ...); zeros where a sample has fewer than another."""
        order, sample, number, most = self._places
        room = array.new_zeros(self.samples, most, *array.shape[1:])
        room[sample, number] = array[order]
        return room


class Routes:
    """Follows the operations of a pass.

    Attributes
    ----------
    rows:
        Whose the rows are that the latest operation has made, if that can be said.
    lost:
        Whether rows have moved and then gone into an operation that is not followed.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, Rows]] = {}
        self._samples, self._moved = 0, False
        self.rows: Rows | None = None
        self.lost = False

    def follow(
        self, name: str, args: tuple, kwargs: dict, out: Any, samples: int | None, constants: Container[Tensor]
    ) -> None:
        """An operation was called, and returned this. Nothing is followed where N is not known."""
        self.rows, self._samples, self._constants = None, samples or 0, constants
        way = WAYS.get(name)
        with torch._C.DisableTorchFunction():  # shapes, too, would be asked of all modes
            if way is not None and samples and args:
                try:
                    self.rows = way(self, name, args, kwargs, out)
                except Exception:  # a call of some other form is one that is not followed, and the pass goes on
                    self.lost |= self._moved or name in MOVES
            if self.rows is not None:
                self._moved |= self.rows.moved is not None
                for tensor in tensors(out):
                    self._remember(tensor)
            elif self._moved and not self.lost:
                self.lost = self._loses(name, args, kwargs, out)

    def remember(self, tensor: Tensor) -> None:
        """This stands for what the latest operation has made."""
        if self.rows is not None:
            with torch._C.DisableTorchFunction():
                self._remember(tensor)

    def _remember(self, tensor: Tensor) -> None:
        if self.rows is not None and tensor.ndim and len(tensor) == self.rows.count:
            self._keep(tensor, self.rows)

    def _loses(self, name: str, args: tuple, kwargs: dict, out: Any) -> bool:
        """Whether rows that have moved went in, and something else than the samples in their order came out."""
        made = tensors(out)
        if (name in RESHAPES and len(out) == self._samples) or not any(map(_meets_weights, made)):
            return False
        given = [rows for tensor in tensors((args, kwargs)) if (rows := self._of(tensor)) is not None]
        return not any(map(self._of, made)) and any(rows.moved is not None for rows in given)

    def _keep(self, tensor: Tensor, rows: Rows) -> Rows:
        self._known[id(tensor)] = weakref.ref(tensor), rows
        return rows

    def _of(self, tensor: Any) -> Rows | None:
        known = self._known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _natural(self, tensor: Tensor) -> Rows | None:
        """The rows of a tensor; of one that has as many as there are samples, theirs."""
        rows = self._of(tensor)
        if rows is not None or not tensor.ndim or len(tensor) != self._samples or tensor in self._constants:
            return rows
        # as many rows may also have been sent to an expert by chance
        return self._keep(tensor, Rows(self._samples, self._samples)) if tensor.ndim > 2 or not self._moved else None

    def _reshaped(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        rows = self._natural(args[0])
        if rows is None or not out.ndim or len(out) == rows.count:
            return rows if out.ndim else None
        if not len(out) or (len(out) % self._samples if rows.moved is None else len(out) == self._samples):
            return None  # rows that have moved are the samples' again if they are as many, unless these meet
        if rows.count % len(out) == 0:
            return rows.merged(rows.count // len(out))
        return None if len(out) % rows.count else rows.repeated(len(out) // rows.count)

    def _of_first(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        return self._of(args[0])

    def _of_any(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        """Of one that is not broadcast along the first axis: if rows of several samples met here, the samples would."""
        return next((r for t in args if isinstance(t, Tensor) and t.ndim == out.ndim and (r := self._of(t))), None)

    def _along(self, name: str, args: tuple, kwargs: dict, out: Any) -> Rows | None:
        rows, place = self._of(args[0]), ALONG_AN_AXIS[name]
        if rows is None:
            return None
        axis = kwargs.get("dim", args[place] if len(args) > place else (-1 if name == "topk" else None))
        if isinstance(axis, int) and axis % (args[0].ndim + (name == "unsqueeze")) != 0:
            return rows
        if name in ("chunk", "split") and axis in (0, None):
            start, self._moved = 0, True
            for piece in out:
                self._keep(piece, rows.picked(slice(start, start + len(piece)), piece.device))
                start += len(piece)
        return None

    def _looked_up(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        given, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        first = index[0] if index else None
        if first is None:
            rows = self._looked_up(name, (given, index[1:]), kwargs, out) if index else None
            return None if rows is None else self._keep(out, rows)
        if isinstance(first, list | np.ndarray):
            first = torch.as_tensor(first, device=given.device)
        elif not isinstance(first, Tensor):
            return None if tensors(index) else self._cut(self._of(given), first, given.device)
        by_numbers = all(array.ndim == 1 and array.dtype != torch.uint8 for array in (first, *tensors(index)))
        return self._at(given, first) if by_numbers else None

    def _at(self, given: Tensor, index: Tensor) -> Rows | None:
        """Of the rows of a tensor that an index picks."""
        if index in self._constants:
            return None
        rows = self._natural(given)
        if rows is not None:
            return rows.picked(index, given.device)
        self.lost |= _meets_weights(given) and given not in self._constants
        return self._of(index)  # a table, in which numbers that belong to samples are looked up

    def _cut(self, rows: Rows | None, first: Any, device: torch.device) -> Rows | None:
        """Of an index without tensors, which begins so."""
        if first is Ellipsis or first == slice(None):
            return rows
        return rows.picked(first, device) if rows is not None and isinstance(first, slice) else None

    def _scattered(self, name: str, args: tuple, kwargs: dict, out: Any) -> Rows | None:
        """Where rows are put to places that the batch says, nobody knows any more whose they are."""
        whole = args[0] if out is None else out
        if name in PUTS:
            where = tensors(args[1][:1] if isinstance(args[1], tuple) else args[1])
        else:
            places = ("indices", "dim") if name == "take_along_dim" else ("dim", "index")
            told = dict(zip(places, args[1:3], strict=False)) | kwargs
            if told["dim"] % args[0].ndim:
                return self._of(args[0])
            where = [told["indices" if name == "take_along_dim" else "index"]]
        if any(tensor not in self._constants for tensor in where):
            self._known.pop(id(whole), None)
            self.lost |= _meets_weights(whole)
        return None

    def _copied(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        self._known.pop(id(args[0]), None)
        return self._of(args[1]) if args[1].ndim == out.ndim else None

    def _selected(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        told = dict(zip(("dim", "index"), args[1:], strict=False)) | kwargs
        return self._of(args[0]) if told["dim"] % args[0].ndim else self._at(args[0], told["index"])

    def _sorted(self, name: str, args: tuple, kwargs: dict, out: Any) -> Rows | None:
        rows = self._of(args[0])
        return rows.picked(out[1], args[0].device) if rows is not None and args[0].ndim == 1 else None

    def _repeated(self, name: str, args: tuple, kwargs: dict, out: Tensor) -> Rows | None:
        rows, times = self._natural(args[0]), args[1] if len(args) > 1 else kwargs.get("repeats")
        axis = kwargs.get("dim", args[2] if len(args) > 2 else None)
        told = axis == 0 or (axis is None and args[0].ndim == 1)
        return rows.repeated(times) if rows is not None and isinstance(times, int) and told else None


WAYS: dict[str, Callable[..., Rows | None]] = {
    **dict.fromkeys(RESHAPES, Routes._reshaped),
    **dict.fromkeys(PRODUCTS, Routes._of_first),
    **dict.fromkeys(ELEMENTWISE, Routes._of_any),
    **dict.fromkeys(ALONG_AN_AXIS, Routes._along),
    **dict.fromkeys(MOVES, Routes._scattered),
    "__getitem__": Routes._looked_up,
    "index_select": Routes._selected,
    "sort": Routes._sorted,
    "repeat_interleave": Routes._repeated,
    "copy_": Routes._copied,
}
"""{name of an operation: what tells whose the rows of its result are}."""


def _meets_weights(tensor: Tensor) -> bool:
    """Whether a weight may be used on the rows of a tensor: numbers, not masks, places or counts."""
    return tensor.is_floating_point() and (tensor.requires_grad or tensor.ndim > 1)
