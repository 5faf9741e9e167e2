r"""Nested batches: the decomposition of the first b samples of one batch, for growing b.

It shows the floor that a finite batch puts under its position. With tr Cov the variance of single samples' gradients,

    E rate(b) = ||grad L||^2 + tr Cov / b

so that the position falls with b until it meets the population's, which has no such floor. Source: docs/theory.md,
"Nested batches"; McCandlish et al., arXiv 1812.06162.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from lnp.api import decompose
from lnp.arguments import Batch, Loss, Model
from lnp.batches.cutting import part, samples_of
from lnp.estimators.population import Population
from lnp.optional import import_optional
from lnp.parameter_texts import parameters_of
from lnp.results.decomposition import Decomposition
from lnp.results.in_group import AUTO
from lnp.results.rounding import number, with_error
from lnp.results.tables import Page, Shown
from lnp.typed_options import MeasureOptions

SMALLEST = 8
"""Samples of the smallest batch, where none is given: fewer say little of a population."""

HEAD = ("samples", "loss", "rate", "chi_loss", "chi_net", "chi_pos", "of the population", "expected")


@dataclass(frozen=True)
class NestedBatches(Shown):
    """The decompositions of a batch's first samples, one for each batch size.

    Attributes
    ----------
    decompositions:
        One for each size, each that of `lnp.decompose` for the first samples alone, from the fewest to the most.
    """

    decompositions: tuple[Decomposition, ...]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples of each batch, increasing."""
        return tuple(d.samples for d in self.decompositions)

    @property
    def population(self) -> Population | None:
        """The population's values from the largest batch, which tells them best; None where it has none."""
        return self.decompositions[-1].population

    def expected_chi_pos(self, batch_size: float) -> float:
        """The position that a batch of this size is expected to have, by the population's values of the largest.

            chi_pos(b) = (||grad L||^2 + tr Cov / b) / (chi_loss chi_net)

        nan without population values.
        """
        largest, population = self.decompositions[-1], self.population
        if population is None:
            return float("nan")
        scale = largest.chi_loss * largest.chi_net
        return (population.rate + population.gradient_noise / batch_size) / scale if scale else float("nan")

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row for each batch size, its index. Needs pandas."""
        pandas = import_optional("pandas", "to_pandas()", install="pandas")
        index = pandas.Index(self.batch_sizes, name="batch_size")
        return pandas.DataFrame([d.to_dict() for d in self.decompositions], index=index)

    def _page(self) -> Page:
        lines = []
        for d in self.decompositions:
            own = "-" if d.population is None else with_error(d.population.chi_pos, d.population.chi_pos_stderr)
            values = [with_error(getattr(d, name), getattr(d, f"{name}_stderr", None)) for name in HEAD[1:6]]
            lines.append([str(d.samples), *values, own, number(self.expected_chi_pos(d.samples))])
        notes: dict[str, list[int]] = {}
        for d in self.decompositions:
            for note in d.notes:
                notes.setdefault(note, []).append(d.samples)
        small = []
        for note, sizes in notes.items():
            which = "" if len(sizes) == len(lines) else f" ({', '.join(map(str, sizes))} samples)"
            small.append(f"note{which}: {note}")
        return Page((), HEAD, lines, small)


@parameters_of(decompose, without=("batches", "group"))
def decompose_nested(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    **options: Unpack[MeasureOptions],
) -> NestedBatches:
    r"""The factors at 8, 16, ..., N samples of one batch: the floor that its size puts under the position is seen.

        E rate(b) = ||grad L||^2 + tr Cov / b,   chi_pos(b) = rate(b) / (chi_loss(b) chi_net(b))

    Each size is `lnp.decompose` of the batch's first samples. A sweep over sizes that double takes two to four times as
    long as the largest alone; JAX and TensorFlow compile once for each size.

    Parameters
    ----------
    model, batch, loss:
        As for `lnp.decompose`. The batch is cut along the first axis of its arrays, in containers of any kind.
    batch_sizes:
        Numbers of samples. Default: 8, 16, 32, ... and N.
    options:
        As for `lnp.decompose`. They hold for every size. The batch is that of this process alone.

    Raises
    ------
    ValueError
        For sizes that the batch does not have, for a `group`, and for a batch that cannot be cut; before anything is
        measured.
    TypeError, ValueError
        For a model, batch, loss or option that cannot be used.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> rng = numpy.random.default_rng(0)
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((3, 1)))
    >>> nested = lnp.decompose_nested(model, (rng.normal(size=(20, 3)), rng.normal(size=(20, 1))))
    >>> nested.batch_sizes, [round(d.rate, 2) for d in nested.decompositions], round(nested.population.rate, 2)
    ((8, 16, 20), [2.33, 1.97, 0.99], 0.4)
    """
    samples = samples_of(batch)
    sizes = _default_sizes(samples) if batch_sizes is None else _checked_sizes(batch_sizes, samples)
    parts = [part(batch, slice(0, size), samples) for size in sizes]
    if options.setdefault("group", None) not in (None, AUTO):
        raise ValueError(
            "group= was given to lnp.decompose_nested, which cuts the batch of this process. Expected group=None. Call "
            "lnp.decompose in all processes for each size, with the first samples of each."
        )
    options["group"] = None
    found = []
    for size, one in zip(sizes, parts, strict=True):
        d = decompose(model, one, loss, **options)
        if d.samples != size:
            raise ValueError(
                f"The batch was cut to its first {size} samples, and the model returned {d.samples}. Expected arrays "
                "with the sample axis first in inputs and outputs. Cut the batch yourself, and call lnp.decompose for "
                "each part."
            )
        found.append(d)
    return NestedBatches(tuple(found))


def _default_sizes(samples: int) -> list[int]:
    """8, 16, ... up to N, and N.

    >>> _default_sizes(40), _default_sizes(5)
    ([8, 16, 32, 40], [5])
    """
    sizes = [SMALLEST]
    while sizes[-1] < samples:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], samples]


def _checked_sizes(batch_sizes: Sequence[int], samples: int) -> list[int]:
    """The sizes in increasing order, each once."""
    try:
        sizes = sorted({operator.index(size) for size in batch_sizes})
    except TypeError:
        sizes = []
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= samples:
        raise ValueError(
            f"batch_sizes is {batch_sizes!r} for a batch of {samples} samples. Expected a list of integers from 1 to "
            f"{samples}."
        )
    return sizes
