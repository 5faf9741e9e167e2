r"""The decomposition of many batches as one: a data set, or the batches whose gradients one update adds up.

Each batch is measured by itself, with signs of its own, so that no more than one is in memory. The loss is the mean
over all terms, to which a batch of n_b terms adds its own mean with the weight a_b = n_b / sum_b n_b. One that is a
sum, and averages over nothing, is averaged over the batches.

    L = sum_b a_b L_b,   rate = ||sum_b a_b grad L_b||^2

The sum of the gradients and a few thousand projections of each one are held on the host. Where each batch's error of
the network scale is r sqrt(B), that of all B is r: one or two probes for each are enough.

Source: docs/theory.md, "Parts of a batch". Random projections that keep inner products: Achlioptas, J. Comput. Syst.
Sci. 66 (2003), doi:10.1016/S0022-0000(03)00025-4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lnp.arguments import Batch, Model
from lnp.contract.options import Options
from lnp.estimators.signs import seed_of_part
from lnp.progress import bar
from lnp.results.decomposition import Decomposition
from lnp.results.gradients import LossGradient, evaluate_gradient, inner_product
from lnp.results.merged import DecomposePart, merged
from lnp.state.random_states import random_states_kept

LOOSEST = 0.5
"""Relative error of a single batch up to which its own error is worth anything."""
PROJECTIONS = 2**12
"""Numbers that a gradient is projected to: inner products keep their values to |u| |w| / 64."""
NO_WEIGHT = "{} of {} batches have no terms that count and add nothing"
SUMS = (
    "the loss of a batch averages over nothing, as a sum does: measured is the mean of these losses over {0} batches; "
    "of their sum the loss, chi_loss and chi_net are {0} times as large, and the rate {0}^2 times"
)

_END = object()


class Alike(list):
    """Batches of which each counts as much as the others, whatever they hold: L = sum_b L_b / `of`.

    So hosts accumulate that divide each batch's own mean by the number of batches. At the end of a data set that may be
    more than there are.
    """

    def __init__(self, batches: Iterable[Batch], of: int) -> None:
        super().__init__(batches)
        self.of = of


def decompose_stream(
    model: Model, batches: Iterable[Batch], count: float, computation: DecomposePart, options: Options
) -> Decomposition:
    """The decomposition of the mean over all terms of the first `count` batches, or fewer if there are no more.

    Raises
    ------
    TypeError
        For what gives no batches, for a seed that is no integer, and inside of a compiled function.
    ValueError
        For a number of batches below 1, and where there are none.
    """
    _check(batches, count, options.seed)
    known = _expected(batches, count)
    rtol = computation.rtol if known is None else min(computation.rtol * math.sqrt(known), LOOSEST)
    one = replace(computation, rtol=max(rtol, computation.rtol))
    total, parts = _Total(batches.of if isinstance(batches, Alike) else None), []
    with bar("measuring batches", known) as advance:
        for place, batch in enumerate(_taken(model, batches, count)):
            seeded = replace(options, seed=seed_of_part(int(options.seed), place))
            parts.append(total.add(evaluate_gradient(one, model, batch, seeded)))
            advance(1)
    return total.merged(parts, computation)


class _Total:
    """The weighted sum of the gradients of batches, in units of the first one's magnitude; of batches that count alike
    where it is given of how many.
    """

    def __init__(self, alike: int | None) -> None:
        self._alike = alike
        self._sum: dict[str, np.ndarray] = {}
        self._unit = 0.0
        self._weights: list[float] = []
        self._projected: list[np.ndarray] = []
        self._squares: list[float] = []

    def add(self, found: LossGradient) -> LossGradient:
        """Add a batch's gradient; the batch without it."""
        weight = float(found.weight) if self._alike is None else 1.0
        factor = weight * float(found.magnitude) if weight else 0.0
        self._unit = self._unit or factor or 1.0
        relative = factor / self._unit
        vector = found.vector if weight else dict.fromkeys(found.vector, np.zeros(1))
        for name, part in vector.items():
            if name in self._sum and weight:
                self._sum[name] += relative * part
            elif weight:
                self._sum[name] = relative * part
        self._weights.append(weight)
        self._projected.append(relative * projected(vector))
        self._squares.append(relative**2 * sum(inner_product(part, part) for part in vector.values()))
        return replace(found, vector={})

    def merged(self, parts: list[LossGradient], computation: DecomposePart) -> Decomposition:
        """The decomposition of all."""
        if not parts:
            raise ValueError("batches= was given with what gave no batch. Expected one at least. Has it been used up?")
        kept = [place for place, weight in enumerate(self._weights) if weight]
        if not kept:
            raise ValueError(
                f"None of {len(parts)} batches has terms that count, such as labels that are not ignored. Expected "
                "batches whose loss is a number. Pass others, or check their labels."
            )
        whole = self._alike or math.fsum(self._weights)
        scale = self._unit / whole
        sums, everything = [self._projected[place] for place in kept], sum(self._projected)
        products = [
            (float(one @ everything) * scale**2, self._squares[place] * scale**2)
            for one, place in zip(sums, kept, strict=True)
        ]
        found = merged(
            [_with_notes(parts[place]) for place in kept],
            [self._weights[place] / whole for place in kept],
            {name: scale**2 * inner_product(part, part) for name, part in self._sum.items()},
            computation.by_layer,
            part_products=products,
        )
        left = len(parts) - len(kept)
        notes = [f"{len(kept)} batches, measured one after the other"]
        notes += [NO_WEIGHT.format(left, len(parts))] if left else []
        if len(kept) > 1 and found.loss_terms == len(kept) < found.samples:
            notes.append(SUMS.format(len(kept)))
        return replace(found, notes=(*found.notes, *notes))


def projected(vector: Mapping[str, np.ndarray]) -> np.ndarray:
    """s, (4096,), with E <s_u, s_w> = <u, w>: sums of a vector's entries with random signs, the same for every vector.

    >>> u = {"a": np.ones(30_000), "b": np.ones((2, 5))}
    >>> bool(abs(projected(u) @ projected(u) / 30_010 - 1) < 0.1)
    True
    """
    found, signs = np.zeros(PROJECTIONS), np.random.default_rng(0)
    for part in vector.values():
        flat = np.ravel(part)
        for start in range(0, flat.size, 2**8 * PROJECTIONS):
            piece = flat[start : start + 2**8 * PROJECTIONS]
            rows = -(-piece.size // PROJECTIONS)
            bits = np.unpackbits(np.frombuffer(signs.bytes(rows * PROJECTIONS // 8), dtype=np.uint8))
            signed = np.zeros(rows * PROJECTIONS)
            signed[: piece.size] = np.where(bits[: piece.size], piece, -piece)
            found += signed.reshape(rows, PROJECTIONS).sum(axis=0)
    return found


def _with_notes(found: LossGradient) -> Decomposition:
    """The decomposition with the notes of what measured it."""
    assert found.decomposition is not None, "`DecomposePart` gives it"
    return replace(found.decomposition, notes=(*found.decomposition.notes, *found.notes))


def _taken(model: Model, batches: Iterable[Batch], count: float) -> Iterator[Batch]:
    """The first batches; none more is drawn from a loader than is measured."""
    with random_states_kept(model):
        iterator = iter(batches)
    for _ in itertools.count() if count == math.inf else range(int(count)):
        with random_states_kept(model):
            batch = next(iterator, _END)
        if batch is _END:
            return
        yield batch


def _expected(batches: Iterable[Batch], count: float) -> int | None:
    """How many batches there will be, as far as that can be known."""
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:  # of a stream
        return None if count == math.inf else int(count)
    return max(1, int(min(length, count)))


def _check(batches: Any, count: Any, seed: Any) -> None:
    """Raise an error for what cannot be streamed, before anything is measured."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | bytes):
        raise TypeError(
            f"batches= was given with a {type(batches).__name__}. Expected a loader, a list, or anything else that "
            "gives batches one after the other. Leave batches= out to measure a single batch."
        )
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not (whole or count == math.inf) or count < 1:
        raise ValueError(
            f"batches is {count!r}. Expected how many batches to measure, an integer from 1, or math.inf for all."
        )
    if not isinstance(seed, int | np.integer):
        raise TypeError(
            f"seed is a {type(seed).__name__}, and batches= draws other signs for each batch. Expected an integer."
        )
