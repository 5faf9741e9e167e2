"""Windows that slide: gradients of a convolution's weight, sample by sample, and what maximum pooling hands back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lnp_jax.taps import convolution, rules
from lnp_jax.taps.pooling import max_pool

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CONVOLUTIONS = {
    "plain": ((1, 7, 8, 4), (3, 2, 4, 6), NHWC, {"padding": "SAME"}),
    "groups, stride, dilation, a batch in each sample": (
        (2, 7, 8, 4), (3, 2, 2, 6), NHWC,
        {"window_strides": (2, 1), "padding": ((1, 0), (2, 3)), "rhs_dilation": (1, 2), "feature_group_count": 2},
    ),
    "channels first, stretched": (
        (2, 4, 7, 8), (6, 4, 3, 2), NCHW,
        {"window_strides": (2, 3), "padding": ((0, 0), (1, 0)), "lhs_dilation": (2, 1)},
    ),
    "all at once": (
        (1, 8, 9, 2), (3, 2, 2, 6), NHWC,
        {"window_strides": (2, 3), "padding": ((3, 0), (-1, 3)), "rhs_dilation": (1, 2), "lhs_dilation": (1, 2)},
    ),
    "depthwise, cut": ((1, 4, 7), (8, 1, 3), ("NCH", "OIH", "NCH"), {"padding": ((2, -1),), "feature_group_count": 4}),
    "three axes": (
        (1, 4, 3, 4, 5), (6, 4, 3, 2, 2), ("NCDHW", "OIDHW", "NCDHW"), {"window_strides": (1, 2, 1), "padding": "SAME"}
    ),
}  # fmt: skip
SAMPLES = 6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize(
    ("name", "budget"), [*((name, 1500) for name in CONVOLUTIONS), ("all at once", 1), ("all at once", 2**30)]
)
@pytest.mark.parametrize("advantage", [1e9, 0], ids=["direct", "gram"])
def test_convolutions(name, advantage, budget, monkeypatch):
    """Squared norms, the sum, and the input's cotangent, against JAX's own gradients of single samples."""
    monkeypatch.setattr(convolution, "GRAM_ADVANTAGE", advantage)
    monkeypatch.setattr(convolution, "CACHE", budget)
    shape, kernel, axes, how = CONVOLUTIONS[name]
    how = {"window_strides": (1,) * (len(shape) - 2), **how}
    with jax.enable_x64(True):
        x, w = normal(SAMPLES, *shape), normal(*kernel, seed=1)
        convolve = lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=axes, **how)
        (eqn,) = jax.make_jaxpr(convolve)(w, x[0]).eqns
        use = rules.use_of(eqn, 1, rules.View("w", axes=tuple(range(w.ndim))))
        d = normal(SAMPLES, *eqn.outvars[0].aval.shape, seed=2)
        assert (use.gradient is None) == (advantage == 0)
        assert (use.back is None) == ("feature_group_count" in how)

        @jax.jit
        def all_of_it(x, d):
            own = jax.vmap(lambda x, d: jax.vjp(convolve, w, x)[1](d))(x, d)
            back = use.back and jax.vmap(use.back, (None, 0))(w, d)
            return own, use.square_norms(x, d), use.gradient and use.gradient(x, d), back

        (of_w, of_x), norms, both, back = all_of_it(x, d)
        expected = jnp.sum(of_w.reshape(SAMPLES, -1) ** 2, axis=1)
        np.testing.assert_allclose(norms, expected, 1e-10)
        if both is not None:
            np.testing.assert_allclose(both[0], expected, 1e-10)
            np.testing.assert_allclose(both[1], of_w.sum(0), 1e-10, 1e-10)
        if back is not None:
            np.testing.assert_allclose(back, of_x, 1e-10, 1e-10)


def test_the_form_with_fewer_products():
    of = lambda size, c, o: convolution.Window(
        (1, 3, 3), (1,) * 3, (1,) * 3, (1, size + 2, size + 2), (1, size, size), c, o
    )
    assert [of(*each).gram for each in ((32, 3, 32), (16, 32, 64), (8, 64, 128))] == [False, False, True]


POOLS = {
    "two by two": ((2, 8, 8, 3), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
    "overlapping": ((2, 9, 7, 3), (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
    "padded by hand": ((2, 9, 7, 3), (1, 3, 2, 1), (1, 1, 2, 1), ((0, 0), (2, 1), (0, 1), (0, 0))),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_hands_back_to_the_first_of_the_largest(name):
    """As JAX's own does; whole numbers from 0 to 3, which are often equal."""
    shape, window, strides, padding = POOLS[name]
    x = jnp.asarray(np.random.default_rng(0).integers(0, 4, shape), jnp.float32)
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    (eqn,) = jax.make_jaxpr(pool)(x).eqns
    y, pullback = jax.vjp(pool, x)
    made, other = jax.vjp(lambda x: max_pool(eqn, x), x)
    d = jnp.asarray(np.random.default_rng(1).integers(-9, 9, y.shape), jnp.float32)
    assert jnp.array_equal(made, y)
    assert jnp.array_equal(other(d)[0], pullback(d)[0])
    assert jnp.array_equal(jax.vmap(lambda x: max_pool(eqn, x))(x[None])[0], y)


def test_large_windows_are_left_alone():
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (5, 5), (1, 1), "VALID")
    (eqn,) = jax.make_jaxpr(pool)(jnp.ones((9, 9))).eqns
    assert max_pool(eqn, jnp.ones((9, 9))) is None
