"""One backward pass of the loss, and what the core asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lnp.contract.linearization import Array, GradientPass, Linearization, Vector, unit


def gradient_pass(
    lin: Linearization, *, per_sample: bool = False, products: int = 0, vector: bool = False
) -> GradientPass:
    """What the backward pass of the loss gradient g yields: what the backend offers, and the rest by its operators.

    It is of g / m, with m the `magnitude` of g, also where a backend has pulled back g itself.

    Pure, safe to trace and compile.

    Parameters
    ----------
    per_sample:
        Whether {parameter name: (N,) array of ||J_nl^T g_n||^2} is wanted.
    products:
        M, how many samples' inner products <J_m^T g_m, J^T g> are wanted.
    vector:
        Whether J^T g is wanted.
    """

    def g() -> Array:  # of the size of the outputs: held as long as it is needed
        return unit(lin.xp, lin.loss_gradient)[0]

    if lin.gradient_pass is None:
        gradient, magnitude = lin.vjp(g()), unit(lin.xp, lin.loss_gradient)[1]
        found = GradientPass(lin.inner_products(gradient, gradient), vector=gradient, magnitude=magnitude)
    else:
        found = lin.gradient_pass(per_sample, products, vector)
        found = found if found.magnitude is not None else _divided(found, unit(lin.xp, lin.loss_gradient)[1])
    if per_sample and found.sample_square_norms is None:
        assert lin.sample_square_norms is not None, "the core asks only where the samples are taken apart"
        found = replace(found, sample_square_norms=lin.sample_square_norms(g()))
    if found.vector is None and (vector or (products and found.products is None)):
        found = replace(found, vector=lin.vjp(g()))
    if products and found.products is None:
        assert found.vector is not None
        some, index = products_with(lin, g(), found.vector, products)
        found = replace(found, products=some, index=index)
    return found


def gradient(lin: Linearization) -> tuple[Vector, Array]:
    """(J^T g / m, m): the gradient of the loss in parameter space, and what it is to be multiplied with."""
    found = gradient_pass(lin, vector=True)
    assert found.vector is not None
    return found.vector, found.magnitude


def _divided(found: GradientPass, magnitude: Array) -> GradientPass:
    """What a pass of g has yielded, of g / magnitude. Divided in turn: its square may be out of range."""

    def squares(values: Mapping[str, Array]) -> dict[str, Array]:
        return {name: value / magnitude / magnitude for name, value in values.items()}

    return GradientPass(
        square_norms=squares(found.square_norms),
        sample_square_norms=None if found.sample_square_norms is None else squares(found.sample_square_norms),
        products=None if found.products is None else found.products / magnitude / magnitude,
        index=found.index,
        vector=None if found.vector is None else {name: part / magnitude for name, part in found.vector.items()},
        magnitude=magnitude,
    )


def products_with(lin: Linearization, g: Array, vector: Vector, count: int) -> tuple[Array, Array | None]:
    """<J_m^T g_m, u> = <g_m, J_m u> for the samples of the subset, or for all, (M,), and which samples these are."""
    xp = lin.xp
    if lin.subset is None:
        assert lin.jvp is not None, "a backend without Jacobian-vector products gives the products itself"
        return xp.sum(g * lin.jvp(vector), axis=1), None
    some = lin.subset(count)
    assert some.jvp is not None, "a backend without Jacobian-vector products gives the products itself"
    return xp.sum(xp.take(g, some.index, axis=0) * some.jvp(vector), axis=1), some.index
