"""Compiled once per structure and shape, usable inside the user's own compiled functions, and clear errors."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lnp
import lnp_jax
from lnp.contract import recompiled
from lnp_jax import compile_cache
from lnp_jax.loops import ends_after_one

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
Y = jnp.asarray([0, 1, 2, 0, 1, 2])
W = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32), "b": jnp.zeros(3)}
CALLS = itertools.count()
"""Goes on where lists would be put back."""


def apply(parameters, x):
    next(CALLS)  # runs when the function is traced
    return jnp.tanh(x @ parameters["w"]) + parameters["b"]


def traced(call) -> int:
    before = next(CALLS)
    call()
    return next(CALLS) - before - 1


@pytest.mark.parametrize("estimator", ["auto", "per_sample", "joint"])
def test_second_call_traces_nothing(estimator):
    measure = lambda p, seed: lnp.decompose((apply, p), (X, Y), estimator=estimator, seed=seed, rtol=0.3, max_probes=9)
    first = measure(W, 0)
    assert traced(lambda: measure(jax.tree.map(lambda p: p + 1, W), 1)) == 0
    assert measure(W, 0) == first
    assert traced(lambda: lnp.decompose((apply, W), (X[:5], Y[:5]), estimator=estimator)) > 0


def test_steps_of_other_lengths_trace_nothing():
    lnp.measured_loss_change((apply, W), (X, Y), learning_rate=0.1)
    assert traced(lambda: lnp.measured_loss_change((apply, W), (X, Y), learning_rate=0.2)) == 0
    lnp.measured_loss_change((apply, W), (X, Y), update=W)
    assert traced(lambda: lnp.measured_loss_change((apply, W), (X, Y), update=jax.tree.map(jnp.zeros_like, W))) == 0


def test_coupled_networks_are_compiled_twice_and_then_no_more():
    measure = lambda p: lnp.decompose((coupled, p), (X, Y), estimator="joint" if p is None else "auto")
    measure(W)
    assert traced(lambda: measure(jax.tree.map(lambda p: 2 * p, W))) == 0


def coupled(parameters, x):
    out = apply(parameters, x)
    return out - out.mean(0)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        next(CALLS)
        return jnp.tanh(self.layer(x))


def test_new_module_objects_of_one_structure_trace_nothing():
    lnp.decompose(Net(nnx.Rngs(0)), (X, Y))
    assert traced(lambda: lnp.decompose(Net(nnx.Rngs(1)), (X, Y))) == 0
    make = lambda seed: eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(seed))
    lnp.decompose(make(0), (X, Y), forward=vectorized)
    assert traced(lambda: lnp.decompose(make(1), (X, Y), forward=vectorized)) == 0


def vectorized(model, x):
    next(CALLS)
    return jax.vmap(model)(x)


def test_a_new_lambda_at_every_step_is_noticed_and_said(monkeypatch):
    monkeypatch.setattr(recompiled, "REPEATS", 1)
    measure = partial(lnp.decompose, estimator="joint", max_probes=1)
    with pytest.warns(UserWarning, match="is a new function object") as caught:
        found = [measure((lambda p, x: apply(p, x), W), (X, Y)) for _ in range(3)]
    assert len(caught) == 1
    assert any("define it once" in note for note in found[-1].notes)
    assert not any("define it once" in note for note in found[0].notes)
    with pytest.warns(UserWarning, match="new function object"):
        [measure((apply, W), (X, Y), lambda f, y: jnp.mean(f**2)) for _ in range(2)]
    with pytest.warns(UserWarning, match="scaled is a new function object"):
        [measure((partial(scaled, 2.0), W), (X, Y)) for _ in range(2)]


def scaled(factor, parameters, x):
    return factor * apply(parameters, x)


def test_bound_methods_and_alternating_functions_are_not():
    class Holder:
        def apply(self, parameters, x):
            return apply(parameters, x)

    holder, one, two = Holder(), lambda p, x: apply(p, x), lambda p, x: apply(p, 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            for function in (holder.apply, one, two):
                lnp.decompose((function, W), (X, Y), estimator="joint", max_probes=1)


def test_pure_form_inside_jit_vmap_and_scan():
    eager = lnp.decompose((apply, W), (X, Y), estimator="per_sample", seed=jax.random.key(3), population=True)
    pure = lambda p, key: lnp_jax.decompose(
        apply, p, (X, Y), key, estimator="per_sample", population=True, by_layer=True
    )
    inside = jax.jit(pure)(W, jax.random.key(3))
    assert isinstance(inside, lnp.Decomposition)
    assert inside.chi_pos.shape == ()
    for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "probes", "loss_terms"):
        assert float(getattr(inside, name)) == pytest.approx(getattr(eager, name), rel=1e-5), name
    assert float(inside.population.chi_pos) == pytest.approx(eager.population.chi_pos, rel=1e-4)
    assert inside.estimator == eager.estimator == "per_sample"
    layers = sum(layer.chi_net for layer in inside.layers.values())
    assert float(layers) == pytest.approx(float(inside.chi_net), rel=1e-5)
    keys = jax.random.split(jax.random.key(0), 3)
    net_scale = lambda p, key: (
        lnp_jax.decompose(apply, p, (X, Y), key, estimator="per_sample", population=False, max_probes=1).chi_net
    )
    many = jax.jit(jax.vmap(net_scale, (None, 0)))(W, keys)
    scanned = jax.jit(lambda p: jax.lax.scan(lambda p, key: (p, net_scale(p, key)), p, keys)[1])(W)
    assert many.shape == (3,)
    np.testing.assert_allclose(scanned, many, rtol=1e-5)


def test_keys_and_seeds():
    draw = lambda seed: lnp.decompose((apply, W), (X, Y), estimator="joint", seed=seed, max_probes=8).chi_net
    assert draw(0) == draw(0) != draw(1)
    assert draw(jax.random.key(0)) == draw(0) == draw(jax.random.PRNGKey(0))


def test_microbatches_are_the_same_function():
    whole = lnp.decompose((apply, W), (X, Y), estimator="exact")
    for size in (2, 4, 6, 9):
        part = lnp.decompose((apply, W), (X, Y), estimator="exact", microbatch=size)
        for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
            assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    grouped = lnp.decompose((apply, W), (X, Y), estimator="grouped", microbatch=4, rtol=0, max_probes=100)
    assert grouped.chi_net == pytest.approx(whole.chi_net, abs=5 * grouped.chi_net_stderr)


def test_per_sample_gradients_come_in_chunks_of_bounded_memory(monkeypatch):
    expected = lnp.decompose((apply, W), (X, Y), estimator="exact")
    for name in ("ROW", "COPIED"):
        monkeypatch.setattr(f"lnp_jax.taps.backward_pass.{name}", 0)  # the bias runs on its own
    monkeypatch.setattr("lnp_jax.fallback.BUDGET", 4 * 3 * 4)  # four samples of 3 float32 parameters
    monkeypatch.setattr("lnp_jax.taps.primitives.BUDGET", 4 * 7)  # four samples of a product's 4 + 3 numbers
    chunked = lnp.decompose((lambda p, x: apply(p, x), W), (X, Y), estimator="exact")
    assert chunked.chi_net == pytest.approx(expected.chi_net, rel=1e-6)
    assert any("run on their own" in note for note in chunked.notes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_summed_in_float32(dtype):
    narrow = jax.tree.map(lambda p: p.astype(dtype), W)
    lin = lnp_jax.linearize((apply, narrow), (X.astype(dtype), Y), lnp.Options())
    assert lin.outputs.dtype == lin.loss_gradient.dtype == jnp.float32
    u = lin.vjp(lin.loss_gradient)
    assert {value.dtype for value in lin.inner_products(u, u).values()} == {jnp.dtype(jnp.float32)}
    d = lnp.decompose((jax.checkpoint(apply), narrow), (X.astype(dtype), Y))
    exact = lnp.decompose((apply, W), (X, Y))
    assert (d.rate, d.chi_net) == pytest.approx((exact.rate, exact.chi_net), rel=0.03)
    assert d.notes == ()


ERRORS = {
    "no trainable parameter": (
        ValueError, "no trainable parameter", lambda: lnp.decompose((apply, {"n": np.arange(3)}), (X, Y))
    ),
    "selection": (ValueError, "picks no parameter", lambda: lnp.decompose((apply, W), (X, Y), parameters="head.*")),
    "loss not scalar": (ValueError, "loss has shape", lambda: lnp.decompose((apply, W), (X, Y), lambda f, y: f[:, 0])),
    "unknown loss": (ValueError, "Unknown loss", lambda: lnp.decompose((apply, W), (X, Y), "nll")),
    "labels out of range": (ValueError, "outside .0, 3.", lambda: lnp.decompose((apply, W), (X, Y + 1))),
    "labels of another shape": (ValueError, "do not match", lambda: lnp.decompose((apply, W), (X, Y[:, None, None]))),
    "mse of another shape": (ValueError, "do not match", lambda: lnp.decompose((apply, W), (X, Y * 1.0), "mse")),
    "fewer targets": (
        ValueError, "hold 6 samples", lambda: lnp.decompose((apply, W), (X, Y[:3]), lambda f, y: f.sum())
    ),
    "empty batch": (ValueError, "batch is empty", lambda: lnp.decompose((apply, W), (X[:0], Y[:0]))),
    "not a pair": (TypeError, "Expected a pair", lambda: lnp.decompose((apply, W), X)),
    "forward": (ValueError, "forward= was given", lambda: lnp.decompose((apply, W), (X, Y), forward=vectorized)),
    "targets of a structure": (ValueError, "cannot be inferred", lambda: lnp.decompose((apply, W), (X, {"y": Y}))),
    "update": (
        ValueError, "does not match the model's parameters",
        lambda: lnp.measured_loss_change((apply, W), (X, Y), update={"w": jnp.zeros(2)}),
    ),
    "unhashable": (
        TypeError, "cannot be hashed", lambda: lnp.decompose((apply, W), (X, Y), Unhashable()),
    ),
}  # fmt: skip


class Unhashable:
    __hash__ = None

    def __call__(self, outputs, targets):
        return outputs.sum()


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    kind, match, call = ERRORS[case]
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "xpected" in str(caught.value)


def test_labels_out_of_range_inside_jit_give_nan():
    inside = jax.jit(lambda y: lnp.decompose((apply, W), (X, y)))(Y + 1)
    assert np.isnan(inside.chi_net)
    assert np.isnan(inside.chi_pos)


def test_global_flags_stay(monkeypatch):
    before = dict(jax.config.values)
    lnp.decompose((apply, W), (X, Y), by_layer=True, population=True)
    assert dict(jax.config.values) == before


def test_what_may_run_once_is_no_loop():
    """Proved from the condition alone, for either value of a flag that comes from outside."""
    flag, state = jnp.asarray(True), (0, jnp.ones(2))
    assert ends_after_one(lambda state: (state[0] < 1) & flag, state)
    assert not ends_after_one(lambda state: (state[0] < 2) & flag, state)
    assert not ends_after_one(lambda state: (state[0] < 1) | flag, state)
    assert not ends_after_one(lambda state: (state[0] < 1) & (jnp.sum(state[1]) > 0), state)  # not looked into


def test_compiled_code_is_kept_for_the_latest_and_many_shapes_are_said(monkeypatch):
    monkeypatch.setattr(compile_cache, "KEPT", 2)
    monkeypatch.setattr(recompiled, "SIZES", 3)
    compile_cache._COMPILED.clear()
    model = (lambda p, x: apply(p, x)), W
    measure = lambda size: lnp.decompose(model, (X[:size], Y[:size]), estimator="joint", max_probes=1)
    with pytest.warns(UserWarning, match=r"for 3 different shapes .* the code of the last 2") as caught:
        found = [measure(size) for size in (2, 3, 4)]
    assert len(caught) == 1
    assert [any("different shapes" in note for note in d.notes) for d in found] == [False, False, True]
    assert len(compile_cache._COMPILED) == 2
    assert traced(lambda: measure(4)) == traced(lambda: measure(3)) == 0
    assert traced(lambda: measure(2)) > 0


def test_code_that_is_no_longer_kept_is_freed(monkeypatch):
    made, program = [], compile_cache.program
    monkeypatch.setattr(compile_cache, "KEPT", 1)
    monkeypatch.setattr(compile_cache, "program", lambda plan: made.append(weakref.ref(p := program(plan))) or p)
    for size in (2, 3, 4):
        lnp.decompose((coupled, W), (X[:size], Y[:size]), estimator="joint", max_probes=1)
    gc.collect()
    assert [one() is None for one in made] == [True, True, False]
