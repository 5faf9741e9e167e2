"""How many terms a loss averages, seen in the very calls that do it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from lnp_torch.graph import Edge, edge, reached, sources
from lnp_torch.reductions import LOSSES, Reduced, reduced

SUM = "the loss is a sum, which averages over nothing: loss_terms is 1"
PARTS = "loss_terms is that of a part of the loss: no averaging was seen in the rest; pass loss_terms="
MEANS = (torch.mean, Tensor.mean)
SUMS = (torch.sum, Tensor.sum)
DIVISIONS = (torch.div, torch.true_divide, torch.divide, Tensor.div, Tensor.true_divide, Tensor.divide, Tensor.div_)
PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_)
SAME = (
    *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.to, Tensor.float),
    *(Tensor.double, Tensor.contiguous, Tensor.clone, torch.flatten, torch.squeeze, torch.reshape),
)
"""Functions whose result holds the same numbers."""
ADDING = frozenset({*MEANS, *SUMS, *LOSSES})
WATCHED = frozenset({*ADDING, *DIVISIONS, *PRODUCTS, *SAME})


class Averages(TorchFunctionMode):
    """Watches the calls that add up numbers, while a loss is computed. Nothing is computed differently."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[weakref.ref, Reduced, Edge]] = {}
        self._at: dict[Edge, tuple[Reduced, Edge]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before, added_at = self._of(args[0]) if func in WATCHED and args else (None, None)
        out = func(*args, **kwargs)
        if func in WATCHED and isinstance(out, Tensor) and out.grad_fn is not None:
            found = _result(func, args, kwargs, before, out)
            if found is not None:
                added_at = added_at if added_at is not None and (found is before or func not in ADDING) else edge(out)
                self._found[id(out)] = weakref.ref(out), found, added_at
                if out.numel() == 1:
                    self._at[edge(out)] = found, added_at
        return out

    def _of(self, tensor: Any) -> tuple[Reduced | None, Edge | None]:
        """What is known of a tensor that a watched call has made, and where its numbers were added up."""
        known = self._found.get(id(tensor))
        return known[1:] if known is not None and known[0]() is tensor else (None, None)

    def terms(self, loss: Tensor, outputs: Iterable[Tensor]) -> tuple[Any, tuple[str, ...]] | None:
        """(`loss_terms`, notes) of a loss that was computed from these outputs; None if nothing was seen to average.

        What counts are the last averages before the loss, of those that the outputs are part of. An average of
        averages is none of its own: the loss of several heads, say.
        """
        found, others = _averages([edge(loss)], self._at, {edge(tensor) for tensor in outputs})
        if not found:
            return None
        terms, notes = _settled(found[0][0])
        if len(found) > 1:
            counts = [_number(_settled(one)[0]) for one, _ in found]
            notes = tuple(dict.fromkeys(note for one, _ in found for note in one.notes))
            if _mean_of_all(loss, found, counts):
                terms = sum(counts)
            else:
                terms, notes = counts[0], (*notes, _several(counts))
        return terms, (*notes, PARTS) if others else notes

    def sample_terms(self, loss: Tensor, outputs: Sequence[Tensor]) -> Tensor | None:
        """What each sample weighs in a mean over labels, (N,); None for any other loss, or where nothing was seen."""
        found, others = _averages([edge(loss)], self._at, {edge(tensor) for tensor in outputs})
        if len(found) != 1 or others:
            return None
        one, samples = found[0][0], len(outputs[0])
        if one.labels is None or not _averaged(one) or one.labels.numel() % samples:
            return None
        return one.labels.reshape(samples, -1).sum(dim=1)


def _result(
    func: Callable, args: tuple, kwargs: Mapping[str, Any], before: Reduced | None, out: Tensor
) -> Reduced | None:
    """How the result of a watched call adds up numbers, with what is known of its first argument."""
    if func in LOSSES:
        return reduced(func, args, dict(kwargs))
    if func in SAME:
        return before
    if func in MEANS or func in SUMS:
        source = args[0] if args else kwargs.get("input")
        if not isinstance(source, Tensor) or (func in SUMS and out.numel() > 1):
            return None
        size, inner = source.numel() // max(out.numel(), 1), before or Reduced(1, 1)
        if size == 1:  # of a number, say
            return before
        by = size if func in MEANS else 1
        return Reduced(size * inner.added, by * inner.divisor, inner.notes)
    factor = _factor(args[1] if len(args) > 1 else kwargs.get("other"))
    if before is None or factor is None or before.is_mean:
        return None
    if func in DIVISIONS:
        return Reduced(before.added, before.divisor * factor, before.notes, before.labels)
    by = before.divisor / factor
    return replace(before, divisor=before.added) if _same(by, before.added) else None


def _factor(other: Any) -> Any:
    """A number that a sum is divided by or multiplied with; None for what depends on parameters, or is no number."""
    if isinstance(other, Tensor):
        return other.detach() if other.numel() == 1 and not other.requires_grad else None
    return other if isinstance(other, int | float) and other and math.isfinite(other) else None


def _averages(
    starts: list[Edge], known: Mapping[Edge, tuple[Reduced, Edge]], outputs: Container[Edge]
) -> tuple[list[tuple[Reduced, Edge]], bool]:
    """(the last averages on the way from outputs to the starts, in their order; whether there are other ways)."""
    met, _ = reached(starts, _Either(known, outputs))
    order = {here: place for place, here in enumerate(known)}
    found, others = [], False
    for here in sorted(met, key=lambda one: order.get(one, -1)):
        if here not in known:
            others = True
            continue
        average, added_at = known[here]
        inner, directly = _averages(sources(added_at), known, outputs)
        found += [(average, here)] if directly else inner
    return found, others


def _mean_of_all(loss: Tensor, found: list[tuple[Reduced, Edge]], counts: list[int | float]) -> bool:
    """Whether a loss of several averages is the mean of all their numbers: each weighs one by how many these are."""
    if not all(_averaged(one) for one, _ in found):
        return False
    ends = [GradientEdge(*here) for _, here in found]
    weights = torch.autograd.grad(loss.sum(), ends, retain_graph=True)
    shares = [float(weight.sum()) * sum(counts) / max(count, 1) for weight, count in zip(weights, counts, strict=True)]
    return all(abs(share - 1) <= EQUAL for share in shares)


EQUAL = 1e-3
"""Relative difference up to which numbers weigh the same in a loss, which may be computed in float16."""


@dataclass(frozen=True)
class _Either(Container):
    """What is in one of two."""

    one: Container[Edge]
    other: Container[Edge]

    def __contains__(self, item: Any) -> bool:
        return item in self.one or item in self.other


def _settled(one: Reduced) -> tuple[Any, tuple[str, ...]]:
    """(n, notes) of one average."""
    if _averaged(one):
        return one.added, one.notes
    if isinstance(one.divisor, int) and one.divisor == 1:
        return 1, (*one.notes, SUM)
    by = _number(one.divisor)
    return by, (*one.notes, f"the loss is a sum of {_number(one.added)} numbers, divided by {by}: loss_terms is {by}")


def _averaged(one: Reduced) -> bool:
    """Whether numbers were divided by how many they are."""
    return one.is_mean or _same(one.divisor, one.added)


def _number(n: Any) -> int | float:
    value = float(n)
    return int(value) if value.is_integer() else value


def _same(a: Any, b: Any) -> bool:
    return abs(float(a) - float(b)) <= 1e-6 * abs(float(b))


def _several(counts: list[int | float]) -> str:
    """What is said of a loss of several averages."""
    if len(set(counts)) == 1:
        return f"the loss is made of {len(counts)} averages over {counts[0]} terms each: loss_terms is {counts[0]}"
    listed = " and ".join(map(str, counts))
    return f"the loss is made of averages over {listed} terms: loss_terms is {counts[0]}, of the first of them"
