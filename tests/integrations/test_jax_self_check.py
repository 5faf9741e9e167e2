"""The self-check in JAX: each of its parts on a network that only this part sees through."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lnp
import lnp_jax
from integrations.jax_reference import agrees, dense
from lnp.contract import recompiled
from lnp_jax import self_check
from lnp_jax.taps import rules


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        self_check._VERDICTS.clear()
        recompiled._FUNCTIONS.clear()  # tests here share code on purpose
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def made(shapes):
    return {name: jnp.asarray(0.7 * normal(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}


X, Y = normal(6, 4), normal(6, 4, seed=9)
PLAIN = {"w": (4, 5), "b": (5,), "v": (5, 4)}


def plain(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def measured(apply, parameters, x=X, y=Y, **options):
    """The decomposition, which agrees with a dense Jacobian."""
    d = lnp.decompose((apply, parameters), (x, y), estimator="exact", **options)
    agrees(d, dense(lambda p: apply(p, x), parameters, lambda outputs: jnp.mean((outputs - y) ** 2), np.size(y)))
    return d


def inside(apply, parameters, x=X, y=Y, **options):
    return jax.jit(lambda p: lnp.decompose((apply, p), (x, y), estimator="exact", **options))(parameters)


def said(d, text):
    return any(text in note for note in d.notes)


BY_COMPARING, BY_A_LOOK = "changes by", "in this measurement or one before"


def time_major(p, x):
    """(T, B, D) -> (T, B, K): the first axis is time, along which the rows depend on each other."""
    return jax.lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row),) * 2, jnp.zeros(x.shape[1:]), x)[1]


def flattened(p, x):
    """Rows of four positions one after the other; each attends to its own row's."""
    rows = jnp.tanh(x @ p["w"]).reshape(-1, 4, x.shape[1])
    return (jax.nn.softmax(rows @ jnp.swapaxes(rows, 1, 2)) @ rows).reshape(x.shape)


def normalising(p, x):
    h = x @ p["w"]
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)


def in_the_gradient_alone(p, x):
    """Outputs do not meet, gradients do."""
    h = x @ p["w"]
    return h + h.mean(0) - jax.lax.stop_gradient(h.mean(0))


def by_pairs(p, x):
    """The fourth and the fifth sample meet, no other: not the first, the third and the last."""
    h = x @ p["w"]
    return h.at[3].add(h[4]) if len(h) > 4 else h


def gated_twice(p, x):
    """What couples the samples has neither value nor gradient while both gates are closed."""
    return x @ p["w"] + p["gate"] * (p["inner"] * x.mean(0))


W = {"w": (4, 4)}
COUPLED = {
    "time-major": (time_major, W, normal(6, 3, 4), BY_COMPARING),
    "flattened rows": (flattened, W, normal(8, 4), "cannot be run"),
    "batch normalisation": (normalising, W, X, BY_COMPARING),
    "the gradient alone": (in_the_gradient_alone, W, X, BY_COMPARING),
    "two that are not compared one by one": (by_pairs, W, X, BY_COMPARING),
}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_interact(name):
    apply, shapes, x, reason = COUPLED[name]
    d = measured(apply, made(shapes), x, normal(*x.shape, seed=9))
    assert said(d, reason), d.notes
    assert d.probes == x.size
    self_check._VERDICTS.clear()
    found = inside(apply, made(shapes), x, normal(*x.shape, seed=9))
    joint = said(found, "cannot be run")  # known where one sample alone cannot even be run
    assert joint == (name == "flattened rows")
    assert np.isnan(found.chi_net) != joint


def test_coupling_behind_two_closed_gates():
    """Seen at moved parameters, before it opens."""
    parameters = made(W) | {"gate": jnp.zeros(()), "inner": jnp.zeros(())}
    assert said(measured(gated_twice, parameters), BY_COMPARING)
    assert said(measured(gated_twice, parameters | {"gate": jnp.ones(()), "inner": jnp.ones(())}), BY_COMPARING)


def behind_a_threshold(p, x):
    h = jnp.tanh(x @ p["w"])
    return h + jax.nn.relu(p["gate"] - 1) * h.mean(0)


@pytest.mark.parametrize("gate", [3.0, 1 + 2e-5], ids=["wide open", "open by hardly anything"])
def test_a_gate_that_opens_later(gate):
    """What is open by hardly anything shows in the gradient of the gate, not in the outputs."""
    narrow = jnp.float64 if gate == 3.0 else jnp.float32
    parameters, x, y = jax.tree.map(lambda a: jnp.asarray(a, narrow), (made(W) | {"gate": jnp.zeros(())}, X, Y))
    options = {"estimator": "exact", "population": None if narrow == jnp.float32 else False}
    measure = lambda gate: lnp.decompose(
        (behind_a_threshold, parameters | {"gate": jnp.asarray(gate, narrow)}), (x, y), **options
    )
    assert measure(0.0).notes == ()
    opened = measure(gate)
    expected = dense(
        lambda p: behind_a_threshold(p, X), made(W) | {"gate": jnp.asarray(gate, jnp.float64)},
        lambda outputs: jnp.mean((outputs - Y) ** 2), Y.size,
    )  # fmt: skip
    assert {name: getattr(opened, name) for name in expected} == pytest.approx(expected, rel=1e-3)
    assert said(opened, BY_A_LOOK)
    assert said(measure(0.0), BY_A_LOOK)  # it holds from then on
    with pytest.raises(ValueError, match=r"microbatch=2.*was asked for, but.*in this measurement"):
        lnp.decompose((behind_a_threshold, parameters), (x, y), microbatch=2, estimator="exact") and lnp.decompose(
            (behind_a_threshold, parameters | {"gate": jnp.asarray(gate, narrow)}), (x, y), microbatch=2
        )


def test_a_sum_of_gradients_that_has_cancelled_is_no_interaction():
    """At the end of a training with all data the bias's gradient is rounding alone."""
    with jax.enable_x64(False):
        x = jnp.asarray(normal(64, 4), jnp.float32)
        linear = lambda p, x: x @ p["w"] + p["b"]
        design = np.concatenate([normal(64, 4), np.ones((64, 1))], axis=1)
        targets = normal(64, 3, seed=3) + 50
        solution = np.linalg.lstsq(design, targets, rcond=None)[0]
        p = {"w": jnp.asarray(solution[:4], jnp.float32), "b": jnp.asarray(solution[4], jnp.float32)}
        d = lnp.decompose((linear, p), (x, jnp.asarray(targets, jnp.float32)))
        assert d.notes == ()


def test_rounding_of_narrow_types_inside_is_no_interaction():
    """Parameters and outputs in float32, what lies between in bfloat16."""
    with jax.enable_x64(False):
        narrow = lambda p, x: jnp.tanh(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)
        parameters, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), ({"w": normal(4, 4)}, normal(6, 4)))
        d = lnp.decompose((narrow, parameters), (x, x), estimator="exact")
        squared = lambda outputs: jnp.mean((outputs - x) ** 2)
        expected = dense(lambda p: narrow(p, x), parameters, squared, x.size)
        assert d.notes == ()
        assert d.chi_net == pytest.approx(expected["chi_net"], rel=2e-2)  # bfloat16 has 8 bits


def backward(rule):
    """The identity with this backward pass."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, d: (rule(d),))
    return identity


def bent(rule, p, x):
    """A custom backward pass, inside of a compiled function and a loop."""
    once = jax.jit(lambda h: jax.lax.scan(lambda h, _: (backward(rule)(h), None), h, length=1)[0])
    return once(jnp.tanh(x @ p["w"])) @ p["v"]


BENT = {
    "clipped": lambda d: jnp.clip(d, -0.05, 0.05),
    "normalised": lambda d: d / (jnp.linalg.norm(d) + 1e-6),
    "with a constant": lambda d: d + 0.1,
    "clipped far away": lambda d: jnp.clip(d, -3.0, 3.0),
}
SMALL = {"w": (4, 4), "v": (4, 4)}


@pytest.mark.parametrize("estimator", ["exact", "joint"])
@pytest.mark.parametrize("name", BENT)
def test_a_backward_pass_that_is_not_linear(name, estimator):
    apply, p = partial(bent, BENT[name]), made(SMALL)
    with pytest.raises(ValueError, match="backward pass of this network is not linear"):
        lnp.decompose((apply, p), (X, Y), estimator=estimator)
    if estimator == "joint":
        found = jax.jit(lambda p: lnp.decompose((apply, p), (X, Y), estimator="joint", max_probes=1).chi_net)(p)
        assert np.isnan(found)
        assert np.isfinite(lnp.measured_loss_change((apply, p), (X, Y), learning_rate=1e-3))


def test_a_backward_pass_that_is_bent_later():
    """The cotangents grow with the weight behind the clipped place: seen by the look at one sample."""
    apply, p = partial(bent, lambda d: jnp.clip(d, -40.0, 40.0)), made(SMALL)
    measured(apply, p)
    measured(apply, jax.tree.map(lambda w: 1.1 * w, p))
    with pytest.raises(ValueError, match="is not linear"):
        lnp.decompose((apply, p | {"v": 100 * p["v"]}), (X, Y))


def test_custom_backward_passes_that_are_linear():
    """A gradient that is turned round is no J^T v of these outputs, but a linear one: nothing can tell."""
    straight = partial(bent, lambda d: d)
    assert measured(straight, made(SMALL)).notes == ()
    assert measured(straight, made(SMALL), microbatch=2).notes == ()


def asserting(p, x):
    assert x.shape[0] == 6
    return plain(p, x)


def looking_up(p, x):
    return {6: plain}[x.shape[0]](p, x)


class Own(Exception):
    pass


def raising(p, x):
    if x.shape[0] != 6:
        raise Own("batches of six")
    return plain(p, x)


def hidden_state(p, x):
    return plain(p, x) + jnp.zeros((6, 4))


def at_run_time(p, x):
    """What compiled code calls back raises, when it runs."""

    def check(x):
        assert x.shape == (6, 4)
        return x

    return plain(p, jax.pure_callback(check, x, jax.lax.stop_gradient(x), vmap_method="sequential"))


exported = None


def from_an_export(p, x):
    return exported.call(p, x)


RAISING = {
    "AssertionError": asserting,
    "KeyError": looking_up,
    "Own": raising,
    "hidden states": hidden_state,
    "NotImplementedError": from_an_export,
    "at run time": at_run_time,
}


@pytest.mark.parametrize("name", RAISING)
def test_whatever_is_raised_on_a_part_of_a_batch(name):
    global exported
    p = made(PLAIN)
    if name == "NotImplementedError":
        from jax import export

        exported = export.export(jax.jit(plain))(p, jnp.asarray(X))
    apply = RAISING[name]
    d = lnp.decompose((apply, p), (X, Y), estimator="exact")
    agrees(d, dense(lambda p: plain(p, X), p, lambda outputs: jnp.mean((outputs - Y) ** 2), Y.size))
    assert said(d, "cannot be run"), d.notes
    assert name in ("hidden states", "at run time") or said(d, name), d.notes
    if name == "at run time":
        return
    self_check._VERDICTS.clear()
    found = inside(apply, p)
    assert float(found.chi_net) == pytest.approx(d.chi_net)
    (_, of_step), _ = lnp_jax.value_and_grad(apply)(p, (X, Y), jax.random.key(0))
    assert np.isfinite(of_step.rate)


def test_errors_of_the_whole_batch_are_the_users():
    def broken(p, x):
        assert x.shape[0] == 5, "five, please"
        return plain(p, x)

    with pytest.raises(AssertionError, match="five"):
        lnp.decompose((broken, made(PLAIN)), (X, Y))


def test_samples_are_compared_once(monkeypatch):
    calls = []
    bound = self_check.bind
    monkeypatch.setattr(self_check, "bind", lambda *args: calls.append(1) or bound(*args))
    apply = lambda p, x: plain(p, x)
    for seed in range(3):
        lnp.decompose((apply, made(PLAIN)), (X + seed, Y), seed=seed, max_probes=1)
    assert len(calls) == 1  # traced once for both comparisons
    lnp.decompose((apply, made(PLAIN)), (X[:4], Y[:4]), max_probes=1)
    assert len(calls) == 2


def test_what_is_not_finite_shows_nothing():
    broken = made(PLAIN) | {"b": jnp.full(5, jnp.nan)}
    assert np.isnan(lnp.decompose((plain, broken), (X, Y)).rate)
    assert not self_check._VERDICTS
    assert np.isfinite(lnp.decompose((plain, made(PLAIN)), (X, Y)).rate)
    assert len(self_check._VERDICTS) == 1


right = rules.Use.square_norms
WRONG = {
    "twice as large": lambda norms: 2 * norms,
    "arriving elsewhere": lambda norms: jnp.where(norms == 0, jnp.max(norms), norms),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_noticed(name, monkeypatch):
    """Squared norms of the rows of the first weight."""
    wrong = lambda use, x, d: WRONG[name](right(use, x, d)) if x.shape[-1] == 4 else right(use, x, d)
    monkeypatch.setattr(rules.Use, "square_norms", wrong)
    apply = lambda p, x: plain(p, x)
    d = measured(apply, made(PLAIN))
    assert ["w (its rules differ" in note for note in d.notes] == [True, False]
    assert d.population is None  # as single samples are not cheap
    self_check._VERDICTS.clear()
    assert np.isnan(inside(apply, made(PLAIN), population=False).chi_net)


def test_what_a_call_outside_has_found_holds_inside():
    assert said(measured(normalising, made(W)), BY_COMPARING)
    found = inside(normalising, made(W))
    assert said(found, BY_COMPARING)
    assert np.isfinite(found.chi_net)
