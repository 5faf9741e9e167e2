"""Squared norms of single samples' gradients: taps beside samples on their own, and what the self-checks catch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

import lnp
import lnp_tensorflow
from contract.namespaces import tensorflow
from integrations.test_tensorflow_models import MODELS, NARROW, TOLERANCE, WIDE, Wrapped, normal
from lnp import norms
from lnp_tensorflow import backend, compiled, rules, windows

tensorflow()
GENERAL = {
    "GRU": "a loop",
    "weight norm": "a large weight made of parameters by more than a product",
    "mixture of experts, dispatched": "a sample's rows are found nowhere in particular",
    "nested function, recomputed": "a gradient of its own",
}
"""Models with parameters that take the general way, and why."""


class Norms:
    """A computation that returns squared norms of single samples."""

    def __call__(self, lin):
        v = lin.signs(3)
        return {"norms": lin.sample_square_norms(v), "v": v, "cheap": lin.cheap, "notes": lin.notes}


NORMS = Norms()


def single(model, variables, x, v):
    """||J_nl^T v_n||^2 from one sample at a time, (N, number of variables)."""
    rows = []
    for n in range(v.shape[0]):
        with tf.GradientTape() as tape:
            out = tf.reshape(model(x[n : n + 1]), (1, -1))
        grads = tape.gradient(out, variables, v[n : n + 1], unconnected_gradients="zero")
        rows.append([np.sum(tf.convert_to_tensor(g).numpy().astype(float) ** 2) for g in grads])
    return np.array(rows)


def measured(model, x, jit=False, **options):
    y = tf.zeros_like(model(x))
    token = backend._JIT.set(jit)
    try:
        return lnp_tensorflow.evaluate(NORMS, model, ((x, y),), lnp.Options(loss="mse", **options))
    finally:
        backend._JIT.reset(token)


def same(found, model, x, dtype):
    """Equal to single samples, where a parameter's own norm is not rounding noise beside the whole."""
    names = list(model.p)
    expected = single(model, [model.p[name] for name in names], x, found["v"].numpy())
    norms = np.stack([found["norms"][f"p.{name}"].numpy() for name in names], 1)
    floor = 1e-3 * expected.sum(1, keepdims=True)
    assert np.all(np.abs(norms - expected) <= TOLERANCE[dtype] * (expected + floor))


def wrapped(name, dtype):
    function, shapes, x = MODELS[name]
    values = {key: normal(*shape, seed=i).astype(dtype) for i, (key, shape) in enumerate(shapes.items())}
    return Wrapped(function, values), tf.constant(x.astype(dtype) if x.dtype.kind == "f" else x)


@pytest.mark.parametrize(("name", "dtype"), [*((n, "float64") for n in WIDE), *((n, "float32") for n in NARROW)])
def test_norms_are_those_of_single_samples(name, dtype):
    model, x = wrapped(name, dtype)
    found = measured(model, x)
    same(found, model, x, dtype)
    assert found["cheap"] == (name not in GENERAL), found["notes"]
    assert any("slower" in note for note in found["notes"]) == (name in GENERAL)


@pytest.mark.parametrize("name", ["conv2d, strided", "tied head", "causal attention"])
def test_under_xla(name):
    model, x = wrapped(name, "float32")
    same(measured(model, x, jit=True), model, x, "float32")


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_in_micro_batches(microbatch):
    model, x = wrapped("padded attention", "float64")
    same(measured(model, x, microbatch=microbatch), model, x, "float64")


def test_a_size_that_happens_to_be_the_number_of_samples():
    """Twelve positions, in micro-batches of twelve, which are compared in eight."""
    table = tf.constant(normal(12, 3))
    model = Wrapped(lambda p, x: tf.tanh(x + p["s"] * table), {"s": normal(3)})
    x = tf.constant(normal(24, 12, 3, seed=1))
    for microbatch in (None, 12):
        same(measured(model, x, microbatch=microbatch), model, x, "float64")


def folded(p, x):
    return tf.tanh(x @ p["w"] + p["b"]) @ p["w"] * tf.exp(p["s"]) - p["b"]


def cut(p, x):
    first, second = tf.split(p["w"], 2, axis=1)
    return tf.tanh(x @ first) @ p["o"][:2] + tf.sin(x @ second) @ p["o"][2:]


def adapted(p, x):
    return x @ (tf.transpose(p["w"]) + 0.5 * p["a"] @ p["b"])


def classed(p, x):
    start = tf.tile(p["c"][None, None], (x.shape[0], 1, 1))
    return tf.reduce_sum(tf.tanh(tf.concat([start, x], 1) + tf.gather(p["t"], [0, 2, 0])[None]) ** 2, 1)


def normalised(p, x):
    return x * (p["g"] / tf.sqrt(tf.constant([0.5, 2.0, 1.0], x.dtype))) + (p["b"] - 0.3 * p["g"])


def headed(p, x):
    return tf.einsum("nhd,hde->nhe", tf.stack([x, 2 * x], 1), p["w"])[:, 0] - tf.einsum("...d,ed->...e", x, p["v"])


PARTS = {
    "one weight twice, its bias in two places, a scale": (folded, {"w": (3, 3), "b": (3,), "s": ()}, normal(4, 2, 3)),
    "parts of a weight": (cut, {"w": (3, 4), "o": (4, 2)}, normal(4, 3)),
    "low-rank adapter": (adapted, {"w": (2, 3), "a": (3, 1), "b": (1, 2)}, normal(4, 5, 3)),
    "class token, positions": (classed, {"c": (3,), "t": (4, 3)}, normal(4, 2, 3)),
    "frozen normalisation": (normalised, {"g": (3,), "b": (3,)}, normal(4, 3)),
    "one matrix for each head": (headed, {"w": (2, 3, 3), "v": (3, 3)}, normal(4, 3)),
    "nested function": (tf.function(folded, jit_compile=True), {"w": (3, 3), "b": (3,), "s": ()}, normal(4, 3)),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_parameters_go_through(name):
    function, shapes, x = PARTS[name]
    model, x = (
        Wrapped(function, {k: normal(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}),
        tf.constant(x),
    )
    found = measured(model, x)
    same(found, model, x, "float64")
    assert found["cheap"], found["notes"]


def time_major(p, x):
    rows = tf.reshape(tf.transpose(x, (1, 0, 2)), (-1, x.shape[2])) @ p["w"]
    return tf.transpose(tf.reshape(rows, (x.shape[1], x.shape[0], -1)), (1, 0, 2))


def packed(p, x):
    """All rows in an order of their own."""
    rows = tf.reshape(x, (-1, x.shape[2]))
    order = tf.constant(np.random.default_rng(0).permutation(rows.shape[0]))
    mixed = tf.gather(tf.gather(rows, order) @ p["w"], tf.argsort(order))
    return tf.reshape(mixed, (x.shape[0], x.shape[1], -1))


def attention_over_the_batch(p, x):
    y = x[:, 0] @ p["w"]
    return tf.nn.softmax(y @ tf.transpose(y)) @ y


def batch_normalised(p, x):
    y = x[:, 0] @ p["w"]
    mean, variance = tf.nn.moments(y, 0)
    return (y - mean) / tf.sqrt(variance + 1e-3)


def gated(p, x):
    y = x[:, 0] @ p["w"]
    return y + p["gate"] * tf.reduce_mean(y, 0)


MISREAD = {"time major": time_major, "packed rows": packed}
COUPLED = {"batch attention": attention_over_the_batch, "batch norm": batch_normalised, "closed gate": gated}


def given(function):
    values = {"w": normal(3, 2)} | ({"gate": np.zeros(2)} if function is gated else {})
    return Wrapped(function, values), tf.constant(normal(5, 4, 3, seed=1))


@pytest.mark.parametrize("name", MISREAD)
def test_a_misread_sample_axis_is_caught(name):
    model, x = given(MISREAD[name])
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("its taps differ from single samples" in note and "p.w" in note for note in found["notes"])


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_interact_are_caught(name):
    model, x = given(COUPLED[name])
    d = lnp.decompose(model, (x, tf.ones_like(model(x))), estimator="per_sample")
    assert d.estimator == "joint"
    assert any("interact" in note for note in d.notes)


@pytest.mark.parametrize("name", MISREAD | COUPLED)
def test_inside_a_function(name):
    """Where nothing can be remembered, misread samples take the general way, and samples that interact give nan."""
    model, x = given((MISREAD | COUPLED)[name])
    y = tf.ones_like(model(x))
    inside = tf.function(lambda x: lnp.decompose(model, (x, y), estimator="exact", population=False), autograph=False)(
        x
    )
    if name in COUPLED:
        assert np.isnan(inside.chi_net.numpy())
    else:
        assert inside.chi_net.numpy() == pytest.approx(lnp.decompose(model, (x, y), estimator="exact").chi_net, 1e-10)


def test_a_wrong_rule_is_caught(monkeypatch):
    monkeypatch.setitem(
        rules.RULES, "AddV2", lambda *given: rules.Use("explicit", (2 * rules._shift(lambda _: 1)(*given).factors[0],))
    )
    model, x = Wrapped(lambda p, x: x @ p["w"] + p["b"], {"w": normal(3, 2), "b": normal(2)}), tf.constant(normal(5, 3))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("p.b (its taps differ" in note and "p.w" not in note for note in found["notes"])


@pytest.fixture
def compared(monkeypatch):
    """Grows by one with each comparison that is run."""
    calls = []

    def run(key, body, *given):
        calls.extend([0] if body is compiled._judge else [])
        return original(key, body, *given)

    original = compiled._run
    monkeypatch.setattr(compiled, "_run", run)
    return calls


def test_compared_once(compared):
    """Of measurements with other settings and of other kinds, the first compares."""
    model, x = wrapped("layer norm", "float64")
    y = tf.zeros_like(model(x))
    for seed in range(3):
        lnp.decompose(model, (x, y), seed=seed, rtol=0.01 + 0.1 * (seed == 2))
    measured(model, x)
    assert len(compared) == 1


def test_what_is_not_a_number_is_not_remembered(compared):
    model, x = wrapped("layer norm", "float64")
    lnp.decompose(model, (x * float("nan"), tf.zeros_like(model(x))))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert found["cheap"]
    assert len(compared) == 2


def test_what_arrives_where_nothing_was_sent_is_caught(monkeypatch):
    """A rule that is right at the samples that are compared, and wrong at the second of twenty."""

    def leaking(op, place, d, samples):
        (gradient,) = rules._shift(lambda _: 1)(op, place, d, samples).factors
        return rules.Use("explicit", (gradient + tf.one_hot(1, samples, dtype=d.dtype)[:, None],))

    monkeypatch.setitem(rules.RULES, "AddV2", leaking)
    model, x = Wrapped(lambda p, x: x + p["b"], {"b": normal(3)}), tf.constant(normal(20, 3))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("p.b (its taps differ" in note for note in found["notes"])


def test_overlapping_parts_of_a_weight():
    """Halves along either axis, which share a quarter."""
    model = Wrapped(
        lambda p, x: tf.sin(x @ tf.split(p["w"], 2, axis=1)[0]) + tf.cos(x[:, :2] @ tf.split(p["w"], 2)[0])[:, :2],
        {"w": normal(4, 4)},
    )
    x = tf.constant(normal(5, 4, seed=1))
    found = measured(model, x)
    same(found, model, x, "float64")
    assert any("p.w (several uses)" in note for note in found["notes"])


@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (2, 1)), ((2, 1), (1, 2))])
def test_convolutions_with_channels_last(stride, dilation):
    """The same as with channels first; TensorFlow has no dilated gradient on a CPU."""
    window = norms.Window((3, 2), stride, dilation)
    out = [(8 - dilation[i] * (window.kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    x, d = normal(3, 8, 8, 2), normal(3, *out, 4, seed=1)
    first = [np.moveaxis(array, -1, 1) for array in (x, d)]
    expected = norms.convolution(np, *first, window)
    assert np.allclose(windows.convolution(tf.constant(x), tf.constant(d), window), expected, rtol=1e-12)


def sizes(graph):
    """The number of elements of every tensor in a graph, its loops and functions."""
    definition = graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(node for f in definition.library.function for node in f.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    return [math.prod(max(dim.size, 0) for dim in shape.dim) for shape in shapes]


@pytest.mark.parametrize("name", ["MLP", "attention"])
def test_nothing_is_as_large_as_samples_times_parameters(name):
    if name == "MLP":
        function, shapes = (lambda p, x: tf.tanh(x @ p["a"]) @ p["b"]), {"a": (64, 64), "b": (64, 8)}
        x, largest = normal(16, 64), 64 * 64
    else:
        function, shapes = MODELS["causal attention"][0], dict.fromkeys("qkv", (32, 2, 16)) | {"o": (2, 16, 32)}
        x, largest = normal(16, 4, 32), 32 * 32
    model, x = Wrapped(function, {k: normal(*shape) for k, shape in shapes.items()}), tf.constant(x)
    compiled._TRACED.clear()
    d = lnp.decompose(model, (x, tf.zeros_like(model(x))), max_probes=2, rtol=0)
    assert d.population is not None
    graphs = [traced.function.graph for (plan, *_), traced in compiled._TRACED.items() if plan.verdicts]
    assert graphs
    assert max(size for graph in graphs for size in sizes(graph)) < 16 * largest


def test_population_values_come_by_default():
    """Of the mean squared error from a dense Jacobian."""
    model, x = wrapped("layer norm", "float64")
    x = tf.constant(normal(12, 4))
    y = tf.constant(normal(12, 3, seed=1))
    d = lnp.decompose(model, (x, y))
    with tf.GradientTape(persistent=True) as tape:
        losses = tf.unstack(tf.reduce_sum((model(x) - y) ** 2, 1) / 36)
    rows = [[tf.reshape(g, (-1,)) for g in tape.gradient(loss, model.trainable_variables)] for loss in losses]
    g = np.array([np.concatenate([part.numpy() for part in row]) for row in rows])
    rate = 12 / 11 * (np.sum(g.sum(0) ** 2) - np.sum(g**2))
    assert d.population.rate == pytest.approx(rate, rel=1e-10)
    assert lnp_tensorflow.decompose(model, (x, y), jit_compile=True).population is None


def test_subset_is_drawn_at_random():
    model, x = wrapped("layer norm", "float64")
    x, y = tf.constant(normal(40, 4)), tf.zeros((40, 3), tf.float64)
    drawn = []
    for seed in (0, 1):
        lin = lnp_tensorflow.linearize(model, (x, y), lnp.Options(seed=seed))
        some, v = lin.subset(8), lin.signs(0)
        index = some.index.numpy()
        assert len(set(index)) == 8
        whole = lin.sample_square_norms(v)
        part = some.sample_square_norms(tf.gather(v, index))
        assert all(np.allclose(part[name], whole[name].numpy()[index], rtol=1e-12) for name in whole)
        u = lin.vjp(lin.loss_gradient)
        assert np.allclose(some.jvp(u), lin.jvp(u).numpy()[index], rtol=1e-10)
        drawn.append(index.tolist())
    assert drawn[0] != drawn[1]
