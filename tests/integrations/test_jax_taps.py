"""Taps on the uses of parameters: squared norms and products against single samples' own gradients."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lnp
import lnp_jax
from lnp.contract.gradient_pass import gradient_pass
from lnp.contract.options import Options
from lnp_jax import self_check
from lnp_jax.bound_model import bind
from lnp_jax.model import separate
from lnp_jax.taps import backward_pass, interpreter

PRODUCTS = 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        self_check._VERDICTS.clear()
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def tokens(*shape, high=7):
    return np.random.default_rng(0).integers(0, high, shape)


def probed(lin):
    """(random signs, squared norms for them, J^T of them)."""
    signs = lin.signs(0)
    return signs, dict(lin.sample_square_norms(signs)), lin.vjp(signs)


def both(lin):
    """(What signs give, the loss gradient, what its backward pass gives)."""
    found = gradient_pass(lin, per_sample=True, products=PRODUCTS)
    return probed(lin), lin.loss_gradient / found.magnitude, (found.index, found.products, found.sample_square_norms)


def alone(apply, parameters, x, v, g):
    """Squared norms by one gradient for each sample, and the sum of those gradients; for the loss gradient, inner
    products with the sum, and squared norms.
    """

    def gradient(row, v):
        return jax.vjp(lambda p: apply(p, row[None])[0].reshape(-1), parameters)[1](v)[0]

    each, descent = jax.vmap(gradient)(x, v), jax.vmap(gradient)(x, g)
    squares = lambda found: {name: jnp.sum(u.reshape(len(x), -1) ** 2, axis=1) for name, u in found.items()}
    return (
        squares(each),
        {name: jnp.sum(u, axis=0) for name, u in each.items()},
        sum(jnp.sum((u * jnp.sum(u, axis=0)).reshape(len(x), -1), axis=1) for u in descent.values()),
        squares(descent),
    )


def loss(outputs, targets):
    return jnp.mean(outputs**2)


def recurrent(p, x):
    def step(h, row):
        h = jnp.tanh(h @ p["w"] + row @ p["u"] + p["b"])
        return h, h

    h, all_h = jax.lax.scan(step, jnp.zeros((x.shape[0], 4)), jnp.swapaxes(x, 0, 1), reverse=True)
    return h @ p["o"] + all_h.sum(0) @ p["o"]


def stacked(p, x):
    """Layers along the leading axis, each recomputed in the backward pass, and used twice in it."""

    def layer(h, w):
        block = jax.checkpoint(lambda h: jnp.tanh(jnp.tanh(h @ w["w"] + w["b"]) @ w["w"].T))
        return block(h), None

    return jax.lax.scan(layer, x, {"w": p["w"], "b": p["b"]})[0] @ p["o"]


def looped_in_loop(p, x):
    """A scan over layers, each of which is used again in an inner scan."""

    def layer(h, w):
        return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), h), None

    return jax.lax.scan(layer, x, p["w"])[0]


def pieces(p, x):
    a, b = jnp.split(p["halves"], 2, axis=1)
    x = jnp.tanh(x @ p["layers"][0]) @ p["layers"][1] + p["rows"][:2].sum(0)
    return (x @ a) * (x @ b)


def overlapping(p, x):
    return jnp.tanh(x @ p["w"][:, :3]) @ p["w"][:3, :] + x @ p["w"]


def tied(p, t):
    return jnp.tanh(p["table"][t] + p["position"][jnp.arange(t.shape[1])]) @ p["table"].T


def branches(p, x):
    x = jax.lax.cond(p["s"] > 0, lambda x: x @ p["a"], lambda x: jnp.sin(x), x)
    return jax.vmap(lambda row: jax.lax.cond(row[0] > 0, lambda r: r @ p["b"], lambda r: r @ p["c"], row))(x)


def merged(p, x):
    """A low-rank addition, a mask, a normalised weight, and a product in a while loop."""
    w = p["w"] + p["left"] @ p["right"]
    return x @ w @ (p["masked"] * (p["masked"] > 0)) @ (p["v"] / jnp.linalg.norm(p["v"], axis=0))


@jax.custom_vjp
def rounded(w):
    return jnp.round(w)


rounded.defvjp(lambda w: (jnp.round(w), None), lambda _, d: (2 * d,))  # twice the straight-through rule


def through_rounding(p, x):
    return x @ rounded(p["w"]) + x @ p["plain"]


def experts(p, x):
    chosen = jnp.argmax(x @ p["gate"], axis=1)
    mixed = jnp.einsum("ni,eio->neo", x, p["all"])
    return jnp.take_along_axis(mixed, chosen[:, None, None], axis=1)[:, 0] * jax.nn.softmax(x @ p["gate"])[:, :1]


def reshaped(p, x):
    w = p["w"].reshape(4, 2, 2).transpose(1, 0, 2)
    return jnp.tanh(jnp.einsum("nsi,hio->nsho", x, w).reshape(*x.shape[:2], 4) @ p["w"].T[::-1])


def in_carry(p, x):
    h, w = jax.lax.fori_loop(0, 2, lambda _, s: (jnp.tanh(s[0] @ s[1]), 0.9 * s[1]), (x, p["w"]))
    return h @ w


def convolved(p, x):
    how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = jax.lax.conv_general_dilated(
        x, p["k"], (2, 1), [(1, -1), (2, 0)], rhs_dilation=(1, 2), feature_group_count=2, **how
    )
    frames = jax.lax.conv_general_dilated(y.reshape(-1, *y.shape[2:]), p["line"], (1,), "SAME",
                                          dimension_numbers=("NWC", "WIO", "NWC")).reshape(*y.shape)  # fmt: skip
    return jax.lax.conv_transpose(jnp.tanh(frames), p["t"], (2, 2), "SAME")


CASES = {
    "recurrent": (recurrent, {"w": (4, 4), "u": (3, 4), "b": (4,), "o": (4, 2)}, normal(5, 6, 3)),
    "stacked layers": (stacked, {"w": (3, 4, 4), "b": (3, 4), "o": (4, 2)}, normal(5, 2, 4)),
    "loop in a loop": (looped_in_loop, {"w": (2, 4, 4)}, normal(5, 3, 4)),
    "pieces": (pieces, {"halves": (4, 6), "layers": (2, 4, 4), "rows": (5, 4)}, normal(5, 4)),
    "overlapping pieces": (overlapping, {"w": (4, 4)}, normal(5, 4)),
    "tied, positions looked up": (tied, {"table": (7, 4), "position": (9, 4)}, tokens(5, 3)),
    "branches": (branches, {"a": (4, 4), "b": (4, 3), "c": (4, 3), "s": ()}, normal(5, 4)),
    "merged": (merged, {"w": (4, 4), "left": (4, 2), "right": (2, 4), "masked": (4, 4), "v": (4, 3)}, normal(5, 4)),
    "a rule of its own": (through_rounding, {"w": (4, 3), "plain": (4, 3)}, normal(5, 4)),
    "experts": (experts, {"gate": (4, 3), "all": (3, 4, 2)}, normal(5, 4)),
    "one weight in two shapes": (reshaped, {"w": (4, 4)}, normal(5, 3, 4)),
    "carried through a loop": (in_carry, {"w": (4, 4)}, normal(5, 3, 4)),
    "convolutions": (
        convolved, {"k": (3, 2, 2, 6), "line": (3, 6, 6), "t": (2, 2, 6, 2)}, normal(5, 7, 6, 4)
    ),
}  # fmt: skip


def made(shapes):
    return {name: jnp.asarray(0.7 * normal(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}


OTHER = {
    "recurrent": {"b"},
    "stacked layers": {"b"},
    "pieces": {"rows"},
    "overlapping pieces": {"w"},
    "branches": {"s", "b", "c"},  # one predicate for each sample becomes a selection
    "merged": {"w", "left", "right", "masked", "v"},
    "a rule of its own": {"w"},
    "one weight in two shapes": {"w"},
    "carried through a loop": {"w"},
}
"""Parameters that no tap on an operation sees: they are copied for each sample or run on their own."""


@pytest.mark.parametrize("name", CASES)
def test_which_parameters_taps_see(name, monkeypatch):
    monkeypatch.setattr(backward_pass, "COPIED", 0)
    apply, shapes, x = CASES[name]
    plans = []
    structure, arrays = separate((apply, made(shapes)), None, None)
    for rows in (2**12, 0):
        monkeypatch.setattr(backward_pass, "ROW", rows)
        net = bind(structure, arrays, jnp.asarray(x), Options())
        plans.append(backward_pass.tap(net, len(x), {}).plan)
    copied, own = plans
    assert {group[0] for group in copied.copies} == set(own.general) == OTHER.get(name, set())
    assert not copied.general
    assert not own.copies


@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, 2**12) for name in CASES), ("merged", 0), ("overlapping pieces", 0), ("carried through a loop", 0)],
)
def test_uses_of_parameters(name, rows, monkeypatch):
    apply, shapes, x = CASES[name]
    x = jnp.asarray(x)
    monkeypatch.setattr(backward_pass, "ROW", rows)
    monkeypatch.setattr(backward_pass, "COPIED", 0)
    parameters = made(shapes)
    (v, norms, vector), g, found = lnp_jax.evaluate(both, (apply, parameters), ((x, x),), Options(loss))
    index, products, of_g = found
    expected, total, descent, own = jax.jit(partial(alone, apply))(parameters, x, v, g)
    np.testing.assert_allclose(products, descent[index], 1e-10)
    assert len(index) == PRODUCTS
    for name in parameters:
        np.testing.assert_allclose(norms[name], expected[name], 1e-10, err_msg=name)
        np.testing.assert_allclose(of_g[name], own[name], 1e-10, err_msg=name)
        np.testing.assert_allclose(vector[name], total[name], 1e-10, 1e-12, err_msg=name)
    (verdict,) = self_check._VERDICTS.values()
    assert not verdict.reason
    assert not [why for _, why in verdict.general if "differ" in why]


def test_micro_batches_give_the_same_squared_norms():
    apply, shapes, x = CASES["recurrent"]
    whole, some = (
        lnp_jax.evaluate(probed, (apply, made(shapes)), ((x, x),), Options(loss, microbatch=size)) for size in (None, 2)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), some, whole)


def test_large_parameters_on_their_own_are_named(monkeypatch):
    apply, shapes, x = CASES["merged"]
    monkeypatch.setattr(backward_pass, "ROW", 8)
    monkeypatch.setattr(backward_pass, "COPIED", 0)
    d = lnp.decompose((lambda p, x: apply(p, x), made(shapes)), (x, jnp.arange(5) % 3))  # of which nothing is known
    assert any("run on their own" in note and "w (add)" in note for note in d.notes), d.notes
    assert any("population" in note for note in d.notes)
    monkeypatch.setattr(backward_pass, "ROW", 99)
    small = lnp.decompose((lambda p, x: apply(p, x), made(shapes)), (x, jnp.arange(5) % 3))
    assert small.population is not None
    assert small.notes == ()
    assert small.chi_net == pytest.approx(d.chi_net, rel=1e-10)


def sizes(program):
    """Of every array that a traced program makes, those in loops and branches too."""
    for eqn in program.eqns:
        yield from (var.aval.size for var in eqn.outvars if hasattr(var.aval, "size"))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from sizes(inner)


def plain(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def block(p, t):
    """A language model of one block."""
    x = p["table"][t]
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    x = x + jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
    return (x + jax.nn.gelu(x @ p["up"]) @ p["down"]) @ p["head"]


LARGE = {
    "MLP": (plain, {"w": (64, 256), "b": (256,), "v": (256, 16)}, normal(128, 64), np.arange(128) % 16),
    "LM": (
        block, {"table": (64, 32), "qkv": (32, 96), "up": (32, 128), "down": (128, 32), "head": (32, 64)},
        tokens(64, 4, high=64), tokens(64, 4, high=64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("estimator", ["per_sample", "exact"])
@pytest.mark.parametrize("name", LARGE)
def test_nothing_of_the_size_of_all_gradients_is_made(name, estimator):
    apply, shapes, x, y = LARGE[name]
    parameters = made(shapes)
    measure = lambda p, x: lnp.decompose((apply, p), (x, y), estimator=estimator, population=True, rtol=0)
    largest = max(sizes(jax.make_jaxpr(measure)(parameters, x).jaxpr))
    numbers = sum(p.size for p in parameters.values())
    assert numbers < largest < len(x) * max(p.size for p in parameters.values())


def test_where_a_scan_tells_its_parts():
    """In two ways, by release; what is told in neither is left to single samples."""
    ways = {"num_consts": 2, "num_carry": 1}, {"ft_in": SimpleNamespace(elts=((0, 0), (0,), (0, 0, 0)))}
    assert [interpreter._parts_of_scan(params) for params in ways] == [(2, 1), (2, 1)]
    assert interpreter._parts_of_scan({"ft_in": ()}) is None
    assert interpreter._parts_of_scan({}) is None
