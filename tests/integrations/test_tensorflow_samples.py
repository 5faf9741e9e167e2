"""Models against a dense Jacobian, and squared norms of their single samples: 1e-5 relative in float32, 1e-10 in
float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

import lnp
import lnp_tensorflow
from contract.namespaces import tensorflow
from integrations.tensorflow_reference import dense
from integrations.test_tensorflow_models import (
    MODELS,
    NARROW,
    TOLERANCE,
    WIDE,
    Wrapped,
    agrees,
    flat,
    normal,
    squared,
)
from lnp.per_sample import norms
from lnp.results.decomposition import decompose
from lnp_tensorflow import backend, compile_cache
from lnp_tensorflow.taps import convolution

tensorflow()
GENERAL = {
    "weight norm": "a large weight made of parameters by more than a product",
    "mixture of experts, dispatched": "a sample's rows are found nowhere in particular",
    "nested function, recomputed": "a gradient of its own",
}
"""Models with parameters that take the general way, and why."""


class Everything:
    """A computation: the decomposition, squared norms of single samples, and their inner products with a vector."""

    def __call__(self, lin):
        v = lin.signs(3)
        found = lin.gradient_pass(True, max(v.shape[0] - 1, 1), True)
        g = lin.loss_gradient / found.magnitude
        return {
            "d": decompose(lin, estimator="exact", by_layer=str),
            **{"norms": lin.sample_square_norms(v), "v": v, "cheap": lin.cheap, "notes": lin.notes},
            **{"of g": found.sample_square_norms, "u": list(found.vector.values()), "g": g},
            **{"index": found.index, "products": found.products},
        }


EVERYTHING = Everything()


def single(model, variables, x, v, u=()):
    """||J_nl^T v_n||^2, (N, number of variables), and <J_n^T v_n, u>, (N,), from one sample at a time."""
    rows, products = [], []
    for n in range(v.shape[0]):
        with tf.GradientTape() as tape:
            out = tf.reshape(model(x[n : n + 1]), (1, -1))
        grads = tape.gradient(out, variables, v[n : n + 1], unconnected_gradients="zero")
        grads = [tf.convert_to_tensor(g).numpy().astype(float) for g in grads]
        rows.append([np.sum(g**2) for g in grads])
        products.append(sum(np.sum(g * np.asarray(part)) for g, part in zip(grads, u, strict=False)))
    return np.array(rows), np.array(products)


def target(out):
    return tf.constant(normal(*out.shape, seed=9), out.dtype)


def measured(model, x, jit=False, **options):
    y = target(model(x))
    token = backend._JIT.set(jit)
    try:
        return lnp_tensorflow.evaluate(EVERYTHING, model, ((x, y),), lnp.Options(loss="mse", **options))
    finally:
        backend._JIT.reset(token)


def same(found, model, x, dtype):
    """Equal to single samples, where a parameter's own norm is not rounding noise beside the whole."""
    names = list(model.p)
    variables = [model.p[name] for name in names]
    for of, v in (("norms", "v"), ("of g", "g")):
        expected, products = single(model, variables, x, found[v].numpy(), found["u"])
        norms = np.stack([found[of][f"p.{name}"].numpy() for name in names], 1)
        floor = 1e-3 * expected.sum(1, keepdims=True)
        assert np.all(np.abs(norms - expected) <= TOLERANCE[dtype] * (expected + floor))
    error = np.abs(found["products"].numpy() - products[found["index"].numpy()])
    assert np.all(error <= TOLERANCE[dtype] * np.abs(products).max())


def wrapped(name, dtype):
    function, shapes, x = MODELS[name]
    values = {key: normal(*shape, seed=i).astype(dtype) for i, (key, shape) in enumerate(shapes.items())}
    return Wrapped(function, values), tf.constant(x.astype(dtype) if x.dtype.kind == "f" else x)


def needs_its_own_gradient(model, x):
    """On a CPU, TensorFlow has the gradient of a grouped convolution only from oneDNN, which not every one can use."""
    try:
        single(model, model.trainable_variables, x, model(x))
    except tf.errors.InvalidArgumentError as error:
        pytest.skip(f"TensorFlow has no gradient of this model on this processor: {error}")


@pytest.mark.parametrize(("name", "dtype"), [*((n, "float64") for n in WIDE), *((n, "float32") for n in NARROW)])
def test_model(name, dtype):
    model, x = wrapped(name, dtype)
    if "grouped" in name:
        needs_its_own_gradient(model, x)
    found = measured(model, x)
    d, y = found["d"], target(model(x))
    agrees(d, dense(lambda: model(x), model.trainable_variables, squared(y), y.shape.num_elements()), dtype)
    assert d.probes == y[0].shape.num_elements(), d.notes  # the samples were taken apart
    assert set(d.layers) == {f"p.{key}" for key in model.p}
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
    above, below = tf.unstack(tf.reshape(p["o"], (2, 2, 2)))
    return tf.tanh(x @ first) @ above + tf.sin(x @ second) @ p["m"][2:] + tf.cos(x @ second) @ below * p["m"][1, ::-1]


def adapted(p, x):
    return x @ (tf.transpose(p["w"]) + 0.5 * p["a"] @ p["b"])


def classed(p, x):
    start = tf.tile(p["c"][None, None], (x.shape[0], 1, 1))
    return tf.reduce_sum(tf.tanh(tf.concat([start, x], 1) + tf.gather(p["t"], [0, 2, 0])[None]) ** 2, 1)


def normalised(p, x):
    return x * (p["g"] / tf.sqrt(tf.constant([0.5, 2.0, 1.0], x.dtype))) + (p["b"] - 0.3 * p["g"])


def headed(p, x):
    made = tf.einsum("nhd,hde->nhe", tf.stack([x, 2 * x], 1), p["w"])[:, 0] - tf.einsum("...d,ed->...e", x, p["v"])
    return made + tf.einsum("nhd,dhe->nhe", tf.stack([x, x**2], 1), p["u"])[:, 1]


def turned(p, x):
    return tf.tanh(x @ tf.transpose(p["w"])[:, 1:]) @ p["o"]


PARTS = {
    "part of a transposed weight": (turned, {"w": (5, 3), "o": (4, 2)}, normal(4, 3)),
    "one weight twice, its bias in two places, a scale": (folded, {"w": (3, 3), "b": (3,), "s": ()}, normal(4, 2, 3)),
    "parts of a weight": (cut, {"w": (3, 4), "o": (4, 2), "m": (4, 2)}, normal(4, 3)),
    "low-rank adapter": (adapted, {"w": (2, 3), "a": (3, 1), "b": (1, 2)}, normal(4, 5, 3)),
    "class token, positions": (classed, {"c": (3,), "t": (4, 3)}, normal(4, 2, 3)),
    "frozen normalisation": (normalised, {"g": (3,), "b": (3,)}, normal(4, 3)),
    "one matrix for each head": (headed, {"w": (2, 3, 4), "v": (4, 3), "u": (3, 2, 4)}, normal(4, 3)),
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


CONVOLUTIONS = {
    "strided": (norms.Window((3, 2), (2, 1), (1, 1)), 2, 4),
    "dilated": (norms.Window((3, 2), (1, 1), (2, 1)), 2, 4),
    "many channels": (norms.Window((3, 2), (1, 1), (1, 2)), 60, 50),
    "in groups": (norms.Window((3, 2), (2, 1), (1, 1), 2), 4, 6),
    "depthwise": (norms.Window((3, 2), (1, 1), (1, 1), 4), 4, 8),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_with_channels_last(name):
    """The weight's gradient sample by sample, by its definition."""
    window, channels, outputs = CONVOLUTIONS[name]
    (k, m), (s, t), (p, q), groups = window.kernel, window.stride, window.dilation, window.groups
    x = normal(3, 6, 7, channels)
    d = normal(3, (5 - p * (k - 1)) // s + 1, (6 - q * (m - 1)) // t + 1, outputs, seed=1)
    gradient = np.zeros((3, k, m, channels // groups, outputs))
    for i, j, o in np.ndindex(k, m, outputs):
        first = o // (outputs // groups) * (channels // groups)
        piece = x[:, i * p :: s, j * q :: t, first : first + channels // groups][:, : d.shape[1], : d.shape[2]]
        gradient[:, i, j, :, o] = np.einsum("nhwc,nhw->nc", piece, d[..., o])
    found = convolution.convolution(tf.constant(x), tf.constant(d), window)
    assert np.allclose(found, np.sum(gradient**2, (1, 2, 3, 4)), rtol=1e-12)
    u = normal(*gradient.shape[1:], seed=2)
    given = np.moveaxis(u, -1, -2).reshape(k, m, groups, -1) if name == "depthwise" else u  # as TensorFlow has it
    along = convolution.along_convolution(tf.constant(x), tf.constant(d), window, tf.constant(given))
    assert np.allclose(along, np.sum(gradient * u, (1, 2, 3, 4)), rtol=1e-10)


def test_many_channels_on_few_positions_take_the_gram_form(monkeypatch):
    """The other one would be taken at any advantage that is large enough."""
    called = []
    monkeypatch.setattr(convolution, "_gram", lambda x, d, window: called.append(x.shape[0]) or tf.zeros(x.shape[0]))
    window, channels, outputs = CONVOLUTIONS["many channels"]
    convolution.convolution(tf.zeros((3, 6, 7, channels)), tf.zeros((3, 4, 5, outputs)), window)
    convolution.convolution(tf.zeros((3, 6, 7, 2)), tf.zeros((3, 4, 5, 3)), window)
    assert called == [3]


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
    compile_cache._TRACED.clear()
    d = lnp.decompose(model, (x, tf.zeros_like(model(x))), max_probes=2, rtol=0)
    assert d.population is not None
    graphs = [traced.function.graph for (plan, *_), traced in compile_cache._TRACED.items() if plan.checked]
    assert graphs
    assert max(size for graph in graphs for size in sizes(graph)) < 16 * largest


def test_maxima_are_pooled_outside_of_loops():
    """A loop would look for them anew at each turn."""
    model, x = wrapped("max pooling", "float32")
    compile_cache._TRACED.clear()
    d = lnp.decompose(model, (x, tf.zeros_like(model(x))), estimator="exact", population=False)
    assert d.probes > 1
    (graph,) = [traced.function.graph for (plan, *_), traced in compile_cache._TRACED.items() if plan.checked]
    definition = graph.as_graph_def()
    looped = [node.op for function in definition.library.function for node in function.node_def]
    assert [node.op for node in definition.node].count("MaxPoolGrad") > d.probes
    assert "MaxPoolGrad" not in looped


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
    fast = lnp_tensorflow.decompose(model, (x, y), jit_compile=True)
    assert fast.population.rate_stderr == pytest.approx(d.population.rate_stderr, rel=1e-10)


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
        found = lin.gradient_pass(False, 8, True)
        products = np.sum((lin.loss_gradient / found.magnitude).numpy() * lin.jvp(found.vector).numpy(), 1)
        assert np.array_equal(found.index, index)
        assert np.allclose(found.products, products[index], rtol=1e-10)
        drawn.append(index.tolist())
    assert drawn[0] != drawn[1]


@tf.function(jit_compile=True)
def grouped(x, w):
    """A convolution whose gradient some processors have from XLA alone."""
    return tf.nn.conv2d(x, w, 1, "VALID")


@tf.function(jit_compile=True)
def swapped(x, w):
    """One whose channels come first, which no processor runs without XLA."""
    return tf.nn.conv2d(tf.transpose(x, (0, 3, 1, 2)), w, 1, "VALID", "NCHW")


@pytest.mark.parametrize("product", [grouped, swapped])
@pytest.mark.parametrize("estimator", ["exact", "joint"])
def test_what_the_model_compiles_by_xla_stays_compiled_where_it_runs_nowhere_else(product, estimator):
    w = normal(2, 2, 2 if product is grouped else 4, 4).astype("float32")
    model, x = Wrapped(lambda p, x: flat(product(x, p["w"])), {"w": w}), tf.constant(normal(5, 3, 3, 4), tf.float32)
    y = target(model(x))
    expected = dense(lambda: model(x), model.trainable_variables, squared(y), y.shape.num_elements())
    for _ in range(2):
        d = lnp.decompose(model, (x, y), loss="mse", estimator=estimator)
        assert d.rate == pytest.approx(expected["rate"], rel=1e-5)
        assert not any("not taken apart" in note for note in d.notes), d.notes
    if estimator == "exact":
        agrees(d, expected, "float32")
