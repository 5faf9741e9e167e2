r"""What is measured of a checkpoint beside the decompositions where it is asked for: cross responses, nested batches.

*Cross responses* between the batches, from one loss gradient of each:

    cross[a, b] = <grad L_a, grad L_b>,   position cross[a, b] / (chi_loss chi_net), with geometric means of a and b

Their mean over pairs of independent batches is ||grad L||^2 of the population, without the noise of a batch. Source:
docs/theory.md, "The Gram matrix of gradients".

*Nested batches*, the first b samples of each batch for growing b, show the floor that a batch's size puts under its
position.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lnp.arguments import Batch, Model
from lnp.batches.cutting import samples_of
from lnp.batches.gram import gradient_gram, mean_of_pairs
from lnp.batches.nested import SMALLEST, decompose_nested
from lnp.checkpoints.means import ERROR, row_of
from lnp.results.cross_response import response
from lnp.results.decomposition import Decomposition

Sizes = bool | Sequence[int]
SHOWN = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")
"""What a row holds of each nested batch."""
OF_GRADIENTS = ("loss", "forward", "parameters", "microbatch", "batch_statistics")
"""Options of `lnp.decompose` that a loss gradient depends on."""
REFUSED = {
    "preconditioner": "whose responses are those of another kernel",
    "group": "whose processes have parts of the batches",
}


@dataclass(frozen=True)
class Asked:
    """What is asked for: whether there are cross responses, and the sizes of nested batches, smaller than the batch."""

    responses: bool
    sizes: tuple[int, ...]

    def values(
        self, model: Model, batches: Sequence[Batch], found: Sequence[Decomposition], seeds: Sequence[int],
        options: Mapping[str, Any],
    ) -> tuple[dict[str, float], tuple[str, ...]]:  # fmt: skip
        """(Columns, notes) of a checkpoint, of whose batches `found` are the decompositions, with these seeds."""
        values: dict[str, float] = {}
        notes: tuple[str, ...] = ()
        if self.responses:
            values, notes = responses(model, batches, found, options)
        if self.sizes:
            values |= nested(model, batches, self.sizes, seeds, options)
        return values, notes


def asked(responses: bool, sizes: Sizes, batches: Sequence[Batch], options: Mapping[str, Any]) -> Asked:
    """What was asked for, checked before anything is measured.

    Raises
    ------
    ValueError
        For cross responses of a single batch, or with options that they cannot be measured with, and for sizes that the
        batches do not have.
    """
    if responses and len(batches) < 2:
        raise ValueError(
            "responses=True received 1 batch. Expected two or more, between which there are responses. Pass a list of "
            "batches, or --count."
        )
    wrong = [name for name in REFUSED if responses and options.get(name) is not None]
    if wrong:
        raise ValueError(f"responses=True received {wrong[0]}=, {REFUSED[wrong[0]]}. Expected none. Leave one out.")
    return Asked(bool(responses), () if sizes is False else _sizes(sizes, min(map(samples_of, batches))))


def _sizes(sizes: Sizes, samples: int) -> tuple[int, ...]:
    """The numbers of samples, increasing: those given, or 8, 16, 32, ... below that of the batch.

    >>> _sizes(True, 40), _sizes([16, 4], 40)
    ((8, 16, 32), (4, 16))
    """
    if isinstance(sizes, bool):
        chosen = [SMALLEST * 2**k for k in range(64) if SMALLEST * 2**k < samples]
    else:
        try:
            chosen = sorted({operator.index(size) for size in sizes})
        except TypeError:
            chosen = []
    if not chosen or not 1 <= chosen[0] <= chosen[-1] < samples:
        raise ValueError(
            f"nested is {sizes!r} for batches of {samples} samples. Expected True for 8, 16, 32, ... or a list of "
            f"integers from 1 to {samples - 1}. Choose such sizes, or give larger batches."
        )
    return tuple(chosen)


def responses(
    model: Model, batches: Sequence[Batch], found: Sequence[Decomposition], options: Mapping[str, Any]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """({column: value} of the responses between all pairs of batches, notes).

    "cross/rate" and "cross/chi_pos" are means over pairs, with the errors of the jackknife over batches where there are
    three or more; "cross/0-1/rate" and "cross/0-1/chi_pos" are those of a pair.
    """
    gram = gradient_gram(model, list(batches), **{n: options[n] for n in OF_GRADIENTS if n in options})
    count = len(batches)
    tables = {name: np.zeros((count, count)) for name in ("rate", "chi_pos")}
    values: dict[str, float] = {}
    for a, b in itertools.combinations(range(count), 2):
        pair = response(np, float(gram.matrix[a, b]), found[a], found[b])
        for name, table in tables.items():
            table[a, b] = table[b, a] = float(getattr(pair, name))
            values[f"cross/{a}-{b}/{name}"] = float(table[a, b])
    means: dict[str, float] = {}
    for name, table in tables.items():
        mean, stderr = mean_of_pairs(table)
        means |= {f"cross/{name}": mean, f"cross/{name}{ERROR}": stderr}
    return means | values, gram.notes


def nested(
    model: Model, batches: Sequence[Batch], sizes: Sequence[int], seeds: Sequence[int], options: Mapping[str, Any]
) -> dict[str, float]:
    """{"nested/b/chi_pos": ...} of the first b samples of each batch, as means over batches with their errors."""
    less = {**options, "by_layer": False, "population": False, "sample_losses": False}
    loss = less.pop("loss", None)
    sweeps = [
        decompose_nested(model, batch, loss, batch_sizes=sizes, **{**less, "seed": seed})
        for batch, seed in zip(batches, seeds, strict=True)
    ]
    values: dict[str, float] = {}
    for size, of_size in zip(sizes, zip(*(sweep.decompositions for sweep in sweeps), strict=True), strict=True):
        row, _ = row_of(of_size)
        kept = [name for name in row if name.removesuffix(ERROR) in SHOWN]
        values |= {f"nested/{size}/{name}": row[name] for name in kept}
    return values
