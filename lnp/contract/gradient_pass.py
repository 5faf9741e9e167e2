"""One backward pass of the loss, and what the core asks of it."""

from __future__ import annotations

from dataclasses import replace

from lnp.contract.linearization import Array, GradientPass, Linearization, Vector, accumulation_dtype


def gradient_pass(
    lin: Linearization, *, per_sample: bool = False, products: int = 0, vector: bool = False
) -> GradientPass:
    """What the backward pass of the loss gradient g yields: what the backend offers, and the rest by its operators.

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
    if lin.gradient_pass is None:
        gradient = lin.vjp(lin.loss_gradient)
        found = GradientPass(lin.inner_products(gradient, gradient), vector=gradient)
    else:
        found = lin.gradient_pass(per_sample, products, vector)
    if per_sample and found.sample_square_norms is None:
        assert lin.sample_square_norms is not None, "the core asks only where the samples are taken apart"
        found = replace(found, sample_square_norms=lin.sample_square_norms(lin.loss_gradient))
    if found.vector is None and (vector or (products and found.products is None)):
        found = replace(found, vector=lin.vjp(lin.loss_gradient))
    if products and found.products is None:
        assert found.vector is not None
        some, index = _products(lin, found.vector, products)
        found = replace(found, products=some, index=index)
    return found


def gradient(lin: Linearization) -> Vector:
    """J^T g, the gradient of the loss in parameter space."""
    found = gradient_pass(lin, vector=True).vector
    assert found is not None
    return found


def _products(lin: Linearization, vector: Vector, count: int) -> tuple[Array, Array | None]:
    """<J_m^T g_m, u> = <g_m, J_m u> for the samples of the subset, or for all, (M,), and which samples these are."""
    xp = lin.xp
    g = xp.astype(lin.loss_gradient, accumulation_dtype(xp, lin.loss_gradient.dtype), copy=False)
    if lin.subset is None:
        assert lin.jvp is not None, "a backend without Jacobian-vector products gives the products itself"
        return xp.sum(g * lin.jvp(vector), axis=1), None
    some = lin.subset(count)
    assert some.jvp is not None, "a backend without Jacobian-vector products gives the products itself"
    return xp.sum(xp.take(g, some.index, axis=0) * some.jvp(vector), axis=1), some.index
