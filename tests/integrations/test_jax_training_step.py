"""A training step's loss and gradient from the measurement's own pass."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lnp
import lnp_jax

X = jnp.asarray(np.random.default_rng(0).standard_normal((64, 20)), jnp.float32)
Y = jnp.arange(64) % 12
KEY = jax.random.key(3)


def parameters():
    draw = np.random.default_rng(1).standard_normal
    return {
        "hidden": [jnp.asarray(draw((20, 30)) / 4, jnp.float32), jnp.zeros(30)],
        "head": jnp.asarray(draw((30, 12)) / 5, jnp.float32),
    }


def apply(p, x):
    return jax.nn.relu(x @ p["hidden"][0] + p["hidden"][1]) @ p["head"]


def coupled(p, x):
    return apply(p, x - x.mean(0))


def cross_entropy(outputs, targets):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1))


def reference(apply):
    return jax.value_and_grad(lambda p, batch: cross_entropy(apply(p, batch[0]), batch[1]))


def close(one, other):
    """To rounding: a millionth of the largest number in each array."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, 1e-6 * np.max(np.abs(b))), one, other)


@pytest.mark.parametrize(
    ("inside", "loss"), [(True, cross_entropy), (False, None)], ids=["inside jit, loss given", "outside, loss inferred"]
)
def test_loss_gradient_and_decomposition(inside, loss):
    shared = lnp_jax.value_and_grad(apply, loss, estimator="per_sample", max_probes=2, loss_terms=64)
    (value, d), gradients = (jax.jit(shared) if inside else shared)(parameters(), (X, Y), KEY)
    close((value, gradients), reference(apply)(parameters(), (X, Y)))
    expected = lnp.decompose(
        (apply, parameters()), (X, Y), loss, seed=KEY, estimator="per_sample", max_probes=2, loss_terms=64
    )
    for name in ("loss", "rate", "chi_net", "chi_pos", "chi_net_stderr"):
        assert float(getattr(d, name)) == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert d.population is not None
    assert expected.population is not None


def test_samples_that_interact_train_as_without():
    """Inside of jit the numbers are nan, until a call outside has looked at the samples."""
    expected = reference(coupled)(parameters(), (X, Y))
    shared = lnp_jax.value_and_grad(coupled)
    for compiled, known in ((True, False), (False, True), (True, True)):
        traced = jax.jit(lambda *given: shared(*given))  # a new one: what is compiled already stays as it is
        (value, d), gradients = (traced if compiled else shared)(parameters(), (X, Y), KEY)
        close((value, gradients), expected)
        assert any("interact" in note for note in d.notes) == known
        assert np.isfinite(d.chi_net) == known


def routed(p, x):
    """Two experts that take at most 40 of the 64 samples; which of the rest is dropped depends on the others."""
    hot = jax.nn.one_hot(jnp.argmax(x @ p["router"] + p["bias"], 1), 2)
    place = jnp.sum((jnp.cumsum(hot, 0) - 1) * hot, 1)
    expert = jnp.einsum("ni,eio,ne->no", x, p["experts"], hot)
    return jnp.tanh(jnp.where((place < 40)[:, None], expert, 0)) @ p["head"]


def experts(bias):
    draw = np.random.default_rng(2).standard_normal
    shapes = {"router": (20, 2), "experts": (2, 20, 8), "head": (8, 12)}
    return {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in shapes.items()} | {
        "bias": jnp.asarray([bias, 0.0])
    }


def test_samples_that_interact_later_than_they_were_compared():
    """Loss and gradient are the plain step's, bit by bit. The trace is nan inside of jit, and made jointly outside."""
    measured, plain = lnp_jax.value_and_grad(routed, cross_entropy, loss_terms=64), jax.jit(reference(routed))
    rows = lambda p: jax.jacrev(lambda p: routed(p, X))(p).values()
    for bias, apart in ((0.0, True), (50.0, False)):
        p = experts(bias)
        inside = jax.jit(lambda *given: measured(*given))(p, (X, Y), KEY) if not apart else None
        (value, d), gradients = measured(p, (X, Y), KEY)
        for found in [(value, gradients)] if inside is None else [(value, gradients), (inside[0][0], inside[1])]:
            assert jax.tree.all(jax.tree.map(np.array_equal, found, plain(p, (X, Y))))
        assert inside is None or np.isnan(inside[0][1].chi_net)
        assert any("interact" in note for note in d.notes) != apart
        trace = sum(float(jnp.sum(part**2)) for part in rows(p)) / 64
        assert abs(d.chi_net - trace) < 4 * d.chi_net_stderr + 1e-3 * trace


def test_training_with_it():
    step = jax.jit(lnp_jax.value_and_grad(apply))
    p, losses = parameters(), []
    for index in range(20):
        (value, d), gradients = step(p, (X, Y), jax.random.key(index))
        losses.append(float(value))
        p = jax.tree.map(lambda p, g: p - 0.5 * g, p, gradients)
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < d.chi_pos < 1


def test_equinox_as_the_docstring_says():
    model = eqx.nn.MLP(20, 12, 8, 1, key=jax.random.key(0))
    p, static = eqx.partition(model, eqx.is_inexact_array)
    network = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    (value, _), gradients = lnp_jax.value_and_grad(network)(p, (X, Y), KEY)
    close((value, gradients), reference(network)(p, (X, Y)))
    assert isinstance(eqx.apply_updates(model, gradients), eqx.nn.MLP)


def test_errors():
    with pytest.raises(TypeError, match="received the options"):
        lnp_jax.value_and_grad(apply, microbatch=2)
    with pytest.raises(ValueError, match="not trained"):
        lnp_jax.value_and_grad(apply)(parameters() | {"steps": jnp.arange(3)}, (X, Y), KEY)
