"""The first pass of a batch of which no more than a piece is in memory at a time, and a loss that the model computes.

Batch statistics and random numbers belong to the batch: a network that has them is run on the whole, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp_torch.averages import Averages
from lnp_torch.loss_gradient import LossAt, loss_at, models_own
from lnp_torch.model import Program
from lnp_torch.outputs import Outputs
from lnp_torch.own_loss import shown_mean
from lnp_torch.replay import Passes, copied, first_pass, without_graph
from lnp_torch.state_guard import RandomState, same_randomness
from lnp_torch.writes import WrittenTo

CHECKED = 3
"""Samples in which it is looked at whether a model's own loss is a mean over samples."""
First = tuple[LossAt, Outputs, Passes]


def first_in_pieces(
    program: Program, inputs: Any, targets: Any, options: Options, tolerance: Callable[[list[torch.Tensor]], float]
) -> First | None:
    """The loss, the measured outputs, and the passes that repeat them.

    None where pieces would be another function than the batch, as far as it can be seen: where the network draws
    random numbers or holds batch statistics, and where it returns more than rows of its samples.
    """
    size, before = options.microbatch, RandomState([program.device])
    assert size is not None, "it is asked for with micro-batches"
    try:
        passes = _divided(program, inputs, targets, options.batch_statistics == "frozen", size)
        if passes is not None and targets is None:
            return _own_loss(passes, options, size, tolerance)
        tree = None if passes is None else _tree(passes, size)
    except (torch.OutOfMemoryError, WrittenTo):
        raise
    except Exception:  # whatever the network raises on a part of its batch: the whole may have an answer
        before.restore()
        return None
    if passes is None or tree is None:
        return None
    loss, outputs = loss_at(program, Outputs(tree), targets, options, None)
    return loss, outputs, replace(passes, measured=outputs.measured)


def _tree(passes: Passes, size: int) -> Any:
    """What the model returns for the whole batch, joined; None where that is more than rows of its samples."""
    trees = [_without_graph(passes, rows).tree for rows in _slices(passes.samples, size)]
    if not all(map(_rows_alone, trees, _slices(passes.samples, size))):
        return None
    joined = iter([torch.cat(list(parts)) for parts in zip(*map(leaves, trees), strict=True)])
    return map_leaves(lambda _: next(joined), trees[0])


def _own_loss(
    passes: Passes, options: Options, size: int, tolerance: Callable[[list[torch.Tensor]], float]
) -> First | None:
    """The loss that the model computes, as the mean over the terms of all pieces; None where it is not seen to be a
    mean over samples: one that couples them needs the whole batch.
    """
    first, outputs = _own(passes, slice(0, min(max(size, CHECKED), passes.samples)), options)
    some = replace(passes.some(slice(0, len(first.gradient))), measured=outputs.measured)
    if not shown_mean(some, first.gradient, first.terms, tolerance(outputs.parts), options.seed):
        return None
    ends = [_own(some, rows, options)[0].terms for rows in (slice(0, 1), slice(1, some.samples))]
    pieces = [_own(passes, rows, options) for rows in _slices(passes.samples, size)]
    made = _joined([loss for loss, _ in pieces], first.terms, ends, options.loss_terms)
    if made is None:
        return None
    columns = zip(*(found.leaves for _, found in pieces), strict=True)
    return made, Outputs([torch.cat(parts) for parts in columns]), replace(passes, measured=outputs.measured)


def _joined(pieces: list[LossAt], terms: Any, ends: list[Any], stated: int | None) -> LossAt | None:
    """The loss of all pieces: the mean over their terms if those of two ends add up to those of the samples between
    them, the sum of their losses if all have the same, as where a sum is divided by a number of terms that is given.
    None for neither. The user may have stated the number of terms.
    """
    first, last, both = (float(n) for n in (*ends, terms))
    if first + last == both:
        counts = [torch.as_tensor(piece.terms, device=piece.value.device) for piece in pieces]
        total = sum(counts[1:], start=counts[0])
        shares = [n.to(piece.gradient.dtype) / total for n, piece in zip(counts, pieces, strict=True)]
        seen = total if isinstance(pieces[0].terms, torch.Tensor) else total.item()
    elif first == last == both:
        shares, seen = [torch.ones_like(piece.value) for piece in pieces], pieces[0].terms
    else:
        return None
    weights = [piece.sample_terms for piece in pieces]
    known = [weight for weight in weights if weight is not None]
    return replace(
        pieces[0],
        value=sum(_weighed(share, piece.value) for share, piece in zip(shares, pieces, strict=True)),
        gradient=torch.cat([_weighed(share, piece.gradient) for share, piece in zip(shares, pieces, strict=True)]),
        terms=stated or seen,
        notes=tuple(dict.fromkeys(note for piece in pieces for note in piece.notes)),
        sample_terms=torch.cat(known) if len(known) == len(weights) else None,
    )


def _weighed(share: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What a piece adds: nothing where none of its terms count, for its own mean is then 0/0."""
    return torch.where(share > 0, share * value, torch.zeros_like(value))


def _own(passes: Passes, rows: slice, options: Options) -> tuple[LossAt, Outputs]:
    """The model's own loss of some samples and its gradient; the outputs without their graph."""
    with torch.enable_grad(), Averages() as averages:
        outputs = passes.part(passes.program.parameters, rows)
    loss, outputs = models_own(outputs, replace(options, loss_terms=None), averages)
    return loss, replace(outputs, tree=map_leaves(_detached, outputs.tree))


def _divided(program: Program, inputs: Any, targets: Any, statistics: bool, size: int) -> Passes | None:
    """Passes that repeat the first samples' for all; None where the network draws, or holds statistics."""
    lengths = lengths_of(inputs if targets is None else targets)
    if len(lengths) != 1 or not lengths <= lengths_of(inputs):
        return None
    (samples,) = lengths
    over = tuple(
        isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.size(0) == samples for leaf in leaves(inputs)
    )
    along = iter(over)
    few = map_leaves(lambda leaf: leaf[:size] if next(along) else leaf, inputs)
    outputs, repeat, _, differing = first_pass(program, few, statistics, False, nullcontext)
    passes = repeat(outputs)
    if differing or passes.record or not passes.explained or not passes.state.same(passes.after):
        passes.state.restore()
        return None
    return replace(passes, inputs=inputs, samples=samples, over=over)


def lengths_of(tree: Any) -> set[int]:
    """The lengths that tensors have along their first axis: one for all where it runs over the samples."""
    return {leaf.size(0) for leaf in leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.ndim}


def length_of(tree: Any) -> int | None:
    """That one length, or None: the samples' number, if they come first."""
    lengths = lengths_of(tree)
    return lengths.pop() if len(lengths) == 1 else None


def _without_graph(passes: Passes, rows: slice) -> Outputs:
    """The outputs of some samples."""
    some = passes.some(rows)
    with same_randomness(passes.state), passes.replayed(passes.record):
        return without_graph(lambda p: passes.called(p, copied(some.inputs)), passes.program.parameters)


def _rows_alone(tree: Any, rows: slice) -> bool:
    """Whether everything that a model returned has a row for each of its samples."""
    count = rows.stop - rows.start
    return all(isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == count for leaf in leaves(tree))


def _slices(samples: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
