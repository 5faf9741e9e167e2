r"""The Gram matrix of loss gradients: which batches, samples or losses learn together, and which against each other.

    gram[a, b] = <grad L_a, grad L_b> = g_a^T J_a J_b^T g_b

How fast the loss on b falls under gradient descent on a, to first order. Its diagonal has the rates.

Source: docs/theory.md, "Cross response". Cosines between the gradients of tasks: Yu et al., "Gradient surgery",
arXiv 2001.06782.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lnp.api import decompose
from lnp.arguments import Batch, Forward, Loss, Model, Parameters
from lnp.batches.cutting import part, samples_of
from lnp.contract.options import BatchStatistics, Options
from lnp.parameter_texts import parameters_of
from lnp.results.display import noted
from lnp.results.gradients import LossGradient, evaluate_gradient, loss_gradient, products
from lnp.results.rounding import number
from lnp.results.tables import Page, Shown

SHOWN = 12
"""Rows and columns that are printed."""


@dataclass(frozen=True)
class GradientGram(Shown):
    """<grad L_a, grad L_b> of m batches.

    Attributes
    ----------
    matrix:
        (m, m), symmetric and positive semi-definite. The diagonal has the batches' rates, an entry off it is the rate
        of `lnp.cross_response`.
    losses:
        (m,), L of each batch.
    notes:
        What the user should know.
    """

    matrix: np.ndarray
    losses: np.ndarray
    notes: tuple[str, ...] = field(default=())

    @property
    def rates(self) -> np.ndarray:
        """(m,) ||grad L_a||^2, the diagonal."""
        return np.diag(self.matrix)

    @property
    def cosines(self) -> np.ndarray:
        """(m, m) of <grad L_a, grad L_b> / (||grad L_a|| ||grad L_b||), in [-1, 1]; nan for a gradient of zero."""
        norms = np.sqrt(self.rates)
        norms = np.where(norms == 0, np.nan, norms)
        return self.matrix / norms[:, None] / norms[None, :]

    @property
    def population_rate(self) -> float:
        """The mean of the entries off the diagonal; nan for a single batch.

        For batches that were drawn independently, and one loss that is a mean over samples of equal weight, it
        estimates ||grad L||^2 of the population without bias; it may come out negative.
        """
        return mean_of_pairs(self.matrix)[0]

    @property
    def population_rate_stderr(self) -> float:
        """The standard error of `population_rate`, by leaving out one batch at a time; nan for fewer than three."""
        return mean_of_pairs(self.matrix)[1]

    def _page(self) -> Page:
        count = min(len(self.matrix), SHOWN)
        table = [
            [str(index), number(float(loss)), number(float(rate)), *(f"{cosine:.2f}" for cosine in row[:count])]
            for index, (loss, rate, row) in enumerate(zip(self.losses, self.rates, self.cosines, strict=True))
            if index < count
        ]
        left = [f"{len(self.matrix)} batches in all, of which {SHOWN} are shown"] if len(self.matrix) > SHOWN else []
        said = "The columns with a number have the cosines of the gradients."
        return Page((), ("batch", "loss", "rate", *map(str, range(count))), table, [said, *left, *noted(self.notes)])


@parameters_of(decompose)
def gradient_gram(
    model: Model,
    batches: Iterable[Batch] | Batch,
    loss: Loss | list[Loss] = None,
    *,
    groups: int | None = None,
    forward: Forward = None,
    parameters: Parameters = None,
    microbatch: int | None = None,
    batch_statistics: BatchStatistics = "frozen",
) -> GradientGram:
    r"""The inner products and cosines of the loss gradients of several batches, or of groups of one batch's samples.

        gram[a, b] = <grad L_a, grad L_b>

    Each batch costs one forward and one backward pass, one batch after the other. The m gradients are held in NumPy on
    the host, m times the size of the parameters in float32; the device never holds more than one.

    Parameters
    ----------
    batches:
        m batches as `lnp.decompose` takes them: a list, or anything that yields them. With `groups`, one batch.
    loss:
        As for `lnp.decompose`. Or a list with one loss for each batch, such as those of several tasks.
    groups:
        Cut one batch into so many groups of neighbouring samples, as equal as possible, each a batch of its own; as
        many as there are samples for single samples.
    model, forward, parameters, microbatch, batch_statistics:
        As for `lnp.decompose`.

    Raises
    ------
    TypeError
        Inside of a compiled function, and for a model, batch or loss that cannot be used.
    ValueError
        For no batches, another number of losses than batches, and a batch that cannot be cut into groups.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
    >>> x, y = numpy.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), numpy.ones((3, 1))
    >>> lnp.gradient_gram(model, (x, y), groups=3).cosines.tolist()
    [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    given = _batches(batches) if groups is None else _groups(batches, groups)
    losses = list(loss) if isinstance(loss, list | tuple) else [loss] * len(given)
    if len(losses) != len(given):
        raise ValueError(
            f"loss= has {len(losses)} entries for {len(given)} batches. Expected one loss for all, or a list with one "
            "for each."
        )
    options = [
        Options(
            loss=one,
            forward=forward,
            parameters=parameters,
            loss_terms=1,  # which no gradient depends on
            microbatch=microbatch,
            batch_statistics=batch_statistics,
            split=microbatch is not None,
            population=False,
        )
        for one in losses
    ]
    measured = [evaluate_gradient(loss_gradient, model, batch, one) for batch, one in zip(given, options, strict=True)]
    return _gram(measured)


def mean_of_pairs(table: np.ndarray) -> tuple[float, float]:
    """(Mean over the pairs of a symmetric table, its standard error by leaving out one row and column at a time).

    The error is nan for fewer than three rows, and so is the mean for a single one. Source: docs/theory.md, "The Gram
    matrix of gradients"; Arvesen, doi:10.1214/aoms/1177697287.

    >>> mean_of_pairs(np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]]))
    (2.0, 1.1547005383792515)
    """
    count = len(table)
    if count < 2:
        return float("nan"), float("nan")
    off = table - np.diag(np.diag(table))
    mean = float(off.sum() / (count * (count - 1)))
    if count < 3:
        return mean, float("nan")
    # the mean without a row is what all rows have in common, less this
    less = 2 * off.sum(axis=1) / ((count - 1) * (count - 2))
    return mean, float(np.sqrt((count - 1) * np.var(less)))


def _gram(gradients: list[LossGradient]) -> GradientGram:
    """The matrix of gradients that were measured."""
    magnitudes = np.array([one.magnitude for one in gradients])
    notes = dict.fromkeys(note for one in gradients for note in one.notes)
    matrix = products(gradients) * np.outer(magnitudes, magnitudes)
    return GradientGram(matrix, np.array([one.loss for one in gradients]), tuple(notes))


def _batches(batches: Any) -> list[Batch]:
    """The batches of a list, or of anything else that yields them."""
    found = [batches] if isinstance(batches, Mapping) or not isinstance(batches, Iterable) else list(batches)
    wrong = [batch for batch in found if not isinstance(batch, Mapping | list | tuple)]
    if isinstance(batches, Mapping) or wrong or not found:
        what = f"a {type(batches).__name__}" + (
            f" of {type(wrong[0]).__name__}" if wrong and wrong[0] is not batches else ""
        )
        raise ValueError(
            f"batches is {what if found else 'empty'}. Expected a list of batches, each (inputs, targets) or a "
            "dictionary with labels. For one batch pass groups=, the number of groups to cut it into."
        )
    return found


def _groups(batch: Batch, groups: int) -> list[Batch]:
    """The groups of a batch's samples."""
    samples = samples_of(batch)
    if not isinstance(groups, int | np.integer) or not 1 <= groups <= samples:
        raise ValueError(f"groups is {groups!r} for {samples} samples. Expected an integer from 1 to {samples}.")
    bounds = [samples * group // groups for group in range(groups + 1)]
    return [part(batch, slice(start, stop), samples) for start, stop in itertools.pairwise(bounds)]
