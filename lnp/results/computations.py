"""What is computed from records, as values: equal computations are equal, so that compiled code is found again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lnp.contract.gradient_pass import gradient
from lnp.contract.linearization import Array, GradientPass, Linearization, Vector, valid
from lnp.estimators.trace import Settings
from lnp.results.cross_response import CrossResponse, cross_response_of
from lnp.results.decomposition import ByLayer, Decomposition, decomposed, sum_of


@dataclass(frozen=True)
class Decompose(Settings):
    """The computation of `lnp.decompose`, up to what `lnp.results.finished.explained` does with numbers."""

    by_layer: ByLayer
    population: bool | None
    sample_losses: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.by_layer, bool) or callable(self.by_layer)):
            raise TypeError(
                f"by_layer is {self.by_layer!r}. Expected True for one entry for each module, or a function "
                "parameter name -> layer name."
            )

    def __call__(self, lin: Linearization) -> Decomposition:
        return decomposed(lin, **self._settings)[0]

    @property
    def _settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Respond(Decompose):
    """The computation of `lnp.cross_response`."""

    def __call__(self, trained: Linearization, measured: Linearization) -> CrossResponse:  # type: ignore[override]
        def made(lin: Linearization) -> tuple[Decomposition, GradientPass]:
            of_samples = self.sample_losses and lin is measured
            return decomposed(lin, **self._settings | {"sample_losses": of_samples}, vector=True)

        return cross_response_of(trained, measured, made)


def measured_change(lin: Linearization, learning_rate: Any = None, update: Vector | None = None) -> Array:
    """L(theta + Delta) - L(theta), where Delta is the update or a step of gradient descent. Shape ()."""
    if update is not None:
        return _change_along(lin, update, 1.0)
    vector, magnitude = gradient(lin)
    return _change_along(lin, vector, -lin.xp.asarray(learning_rate, dtype=magnitude.dtype) * magnitude)


def predicted_change(lin: Linearization, learning_rate: Any = None, update: Vector | None = None) -> Array:
    """<grad L, Delta>, where Delta is the update or a step of gradient descent. Shape ()."""
    vector, magnitude = gradient(lin)
    products = lin.inner_products(vector, vector if update is None else update)
    total = sum_of(products, products) * magnitude
    if update is None:
        total = -lin.xp.asarray(learning_rate, dtype=total.dtype) * total * magnitude
    return valid(lin, total)


def changes(lin: Linearization, update: Vector) -> tuple[Array, Array]:
    """(<grad L, Delta>, L(theta + Delta) - L(theta)), each of shape ()."""
    return predicted_change(lin, update=update), _change_along(lin, update, 1.0)


def _change_along(lin: Linearization, along: Vector, step: Any) -> Array:
    """L(theta + step u) - L(theta) for a vector u in parameter space, of the same frozen function. Shape ()."""
    if lin.loss_along is None:
        raise TypeError(
            "This model's backend cannot evaluate the loss at moved parameters. Expected a record with loss_along."
        )
    return valid(lin, lin.loss_along(along, step) - lin.loss)
