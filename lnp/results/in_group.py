"""A batch of which several processes have a part each: all call the same line, and get the same decomposition.

What is minimised is the mean over the R processes of their losses, as in data-parallel training: `lnp.results.merged`
with a_r = 1/R. Processes that have the same part count as one. Each process measures its own part, by whatever passes
that takes. Then all agree that they have, the gradients are summed, once, as in training, and numbers are exchanged. So
nobody waits for a process that has failed: what can fail on its own comes before what needs the others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lnp.arguments import Batch, Model
from lnp.contract.gradient_pass import products_with
from lnp.contract.linearization import Linearization, Vector, unit
from lnp.contract.options import Options
from lnp.contract.registry import evaluate, find
from lnp.estimators.population import jackknife_size
from lnp.estimators.signs import seed_of_part
from lnp.losses.doubts import doubts
from lnp.results.decomposition import Decomposition, decomposed
from lnp.results.merged import merged
from lnp.results.two_losses import DecomposeWithGradient

AUTO = "auto"
"""As the model says."""


class Group(Protocol):
    """Processes that measure together, as a backend has them.

    Attributes
    ----------
    rank, size:
        This process among them, from 0 on, and R.
    whole_gradients:
        Whether each process holds its own gradient, of all parameters, before they are added up.
    parts:
        Which part of the batch each process has, by rank: 0 to R - 1, or the same one for processes among which a
        network's operations are split.
    """

    rank: int
    size: int
    whole_gradients: bool
    parts: Sequence[int]

    def session(self) -> AbstractContextManager:
        """Around a measurement: waits for all processes, and tells the others of an error."""

    def exchange(self, point: str, value: Any) -> list[Any]:
        """The small values of all processes, by rank; RuntimeError where one of them has failed, or is gone."""

    def summed(self, lin: Linearization, vector: Vector | None, share: float) -> tuple[dict[str, Any], Vector | None]:
        """The sum over processes of share * J^T g / m, with m the magnitude of g: ({parameter: square norm}, whose
        sum over processes is that of the sum; the sum itself, or None where no process holds all of it).
        """


def group_of(model: Model, asked: Any, preconditioner: Any = None, batches: Any = None) -> Group | None:
    """The processes that measure together, as the model's backend finds them; None for this process alone.

    Raises
    ------
    TypeError
        For a group, of a backend that knows none.
    ValueError
        For several processes and an option that one process alone can take.
    """
    backend: Any = find(model)
    if not hasattr(backend, "group_of"):
        if asked in (None, AUTO):
            return None
        raise TypeError(
            f"group= was given for a model of {backend.__name__}, which measures arrays wherever they lie. Expected a "
            "PyTorch module. Leave group= out."
        )
    group: Group | None = backend.group_of(model, asked)
    option = "preconditioner=" if preconditioner is not None else "batches=" if batches is not None else None
    if group is not None and option is not None:
        raise ValueError(
            f"{option} was given for a model that {group.size} processes measure together. Expected one process, which "
            "this option is for. Pass group=None to measure this process's batch alone, or leave the option out."
        )
    return group


class Held:
    """A gradient that stays where it is: no container, so that its numbers are not brought to the host."""

    def __init__(self, vector: Vector | None, names: list[str]) -> None:
        self.vector, self.names = vector, names


@dataclass(frozen=True)
class DecomposeTogether(DecomposeWithGradient):
    """The decomposition of this process's part, and what becomes of it among the others.

    A backend calls the computation, and once the numbers are there and nothing is to be measured again, `together`
    with the record and these numbers. What that returns takes the place of the result.
    """

    group: Group | None = None

    def __call__(self, lin: Linearization) -> tuple[Decomposition, Held]:  # type: ignore[override]
        settings = {name: value for name, value in self._settings.items() if name != "group"}
        whole = self.group is not None and self.group.whole_gradients
        d, found = decomposed(lin, **settings, vector=whole, part=True)
        return d, Held(found.vector if whole else None, sorted(found.square_norms))

    def together(self, lin: Linearization, measured: tuple[Decomposition, Held]) -> tuple:
        """(decomposition, {parameter: part of ||grad L / m||^2}, m, products with grad L / m or None)."""
        d, held = measured
        assert self.group is not None, "it belongs to this computation"
        own: dict[str, Any] = {"magnitude": float(d.magnitude), "population": d.contributions is not None}
        own |= {"names": held.names, "samples": d.samples, "loss": float(d.loss)}
        every = self.group.exchange("measured", own)
        _check_alike(every, self.group.parts)
        magnitude = max(one["magnitude"] for one in every)
        share = float(d.magnitude) / magnitude / self.group.size
        squares, u = self.group.summed(lin, held.vector, share)
        products = None
        if u is not None and all(one["population"] for one in every):
            g, _ = unit(lin.xp, lin.loss_gradient)
            products = products_with(lin, g, u, jackknife_size(lin.outputs.shape[0]))[0]
        return d, squares, magnitude, products


def decompose_together(computation: DecomposeTogether, model: Model, batch: Batch, options: Options) -> Decomposition:
    """The decomposition of the mean over processes of their losses, the same in each of them."""
    group = computation.group
    assert group is not None, "the caller has found it"
    with group.session():
        first = [group.parts.index(part) for part in sorted(set(group.parts))]  # the process that stands for each
        own = options
        if len(first) > 1:  # signs of this part alone: errors of parts are independent, so that they add up in squares
            own = replace(options, seed=seed_of_part(operator.index(options.seed), group.parts[group.rank]))
        found = evaluate(computation, model, (batch,), own)
        every = group.exchange("parts", _part(*found))
        squares = {name: sum(one["square_norms"][name] for one in every) for name in every[0]["square_norms"]}
        known: list[Any] | None = [one["products"] for one in every]
        known = None if any(products is None for products in known or []) else known
        parts = [every[rank]["decomposition"] for rank in first]
        return merged(parts, [1 / len(parts)] * len(parts), squares, computation.by_layer, known)


def _part(d: Decomposition, squares: dict[str, float], magnitude: float, products: np.ndarray | None) -> dict[str, Any]:
    """What the other processes need of this one: numbers, and notes in the place of the rows that they come from."""
    d = replace(d, notes=(*d.notes, *doubts(d.evidence)), evidence={})
    of_samples = None if products is None else np.asarray(products, dtype=float) * float(d.magnitude) * magnitude
    return {
        "decomposition": d,
        "square_norms": {name: float(square) * magnitude * magnitude for name, square in squares.items()},
        "products": of_samples,
    }


APART = 1e-4
"""Relative difference up to which two losses of one batch are the same, whatever order they were summed in."""


def _check_alike(every: Sequence[dict[str, Any]], parts: Sequence[int]) -> None:
    """Raise ValueError in every process where they measure different parameters, or different batches as one."""
    names = [one["names"] for one in every]
    other = next((rank for rank, one in enumerate(names) if one != names[0]), None)
    if other is not None:
        differing = sorted(set(names[0]) ^ set(names[other]))
        raise ValueError(
            f"Processes 0 and {other} of the group measure different parameters: {differing[:3]}. Expected the same "
            "model and the same parameters= in all of them. Pass group=None to measure this process alone."
        )
    for rank, part in enumerate(parts):
        other = parts.index(part)
        first, own = every[other], every[rank]
        if not _same_batch(first, own):
            raise ValueError(
                f"Processes {other} and {rank} of the group have different batches: {first['samples']} samples with a "
                f"loss of {first['loss']:.6g}, and {own['samples']} with {own['loss']:.6g}. Expected one batch in "
                "both, between which the network's operations are split. Give them the same one."
            )


def _same_batch(one: dict[str, Any], other: dict[str, Any]) -> bool:
    both_nan = one["loss"] != one["loss"] and other["loss"] != other["loss"]
    alike = both_nan or math.isclose(one["loss"], other["loss"], rel_tol=APART)
    return one["samples"] == other["samples"] and alike
