"""The cross response of two different losses: each is measured by itself, and their gradients meet on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lnp.arguments import Batch, Model
from lnp.contract.linearization import Linearization
from lnp.contract.options import Options
from lnp.results.computations import Decompose
from lnp.results.cross_response import CrossResponse, finished, response
from lnp.results.decomposition import Decomposition, decomposed
from lnp.results.gradients import LossGradient, evaluate_gradient, products, widened

NUMBERS = ("rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr")


@dataclass(frozen=True)
class DecomposeWithGradient(Decompose):
    """The decomposition of a batch with the gradient of its loss, for products with those of others."""

    def __call__(self, lin: Linearization) -> LossGradient:  # type: ignore[override]
        d, found = decomposed(lin, **self._settings, vector=True)
        assert found.vector is not None, "it was asked for"
        return LossGradient(d.loss, d.magnitude, widened(lin, found.vector), d)


def respond_to(
    settings: Decompose, model: Model, trained: tuple[Batch, Options], measured: tuple[Batch, Options]
) -> CrossResponse:
    """The cross response of two losses, each on its own batch with its own options.

    The rate is the entry of their Gram matrix off the diagonal.
    """
    computation = DecomposeWithGradient(**vars(settings))
    found = [evaluate_gradient(computation, model, *one) for one in (trained, measured)]
    t, m = map(_decomposition, found)
    made = response(np, products(found)[0, 1], t, m)
    numbers: dict[str, Any] = {name: float(getattr(made, name)) for name in NUMBERS}
    return finished(replace(made, **numbers))


def _decomposition(of: LossGradient) -> Decomposition:
    """With the notes of what measured it."""
    assert of.decomposition is not None, "`DecomposeWithGradient` gives it"
    return replace(of.decomposition, notes=(*of.decomposition.notes, *of.notes))
