"""What the turns of a loop make of the parameters: recurrent networks of many kinds, taken apart by rules."""

from __future__ import annotations

import pytest
import tensorflow as tf
from tensorflow.python.ops import while_v2

import lnp
from contract.namespaces import tensorflow
from integrations.tensorflow_reference import dense
from integrations.test_tensorflow_models import Wrapped, agrees, flat, normal, squared
from integrations.test_tensorflow_samples import measured, same, target

tensorflow()
TURNS = 4


def start(x, size=3):
    return tf.zeros((x.shape[0], size), x.dtype)


def lstm(p, x):
    """Time first, in arrays, with a mask: as Keras runs one. Bias and weights are cut inside of the loop."""
    taken = tf.TensorArray(x.dtype, TURNS, clear_after_read=False).unstack(tf.transpose(x, (1, 0, 2)))
    real = tf.TensorArray(tf.bool, TURNS, clear_after_read=False).unstack(tf.transpose(x[:, :, :1] < 0.7, (1, 0, 2)))

    def step(t, made, h, c):
        z = taken.read(t) @ p["w"] + h @ p["u"] + p["b"]
        i, f, o, g = tf.split(z, 4, axis=1)
        new = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
        c = tf.where(real.read(t), new, c)
        h = tf.where(real.read(t), tf.sigmoid(o) * tf.tanh(new), h)
        return t + 1, made.write(t, h), h, c

    made = tf.TensorArray(x.dtype, TURNS, element_shape=(x.shape[0], 3))
    state = (0, made, start(x), start(x))
    made = tf.while_loop(lambda t, *_: t < TURNS, step, state, maximum_iterations=TURNS)[1]
    return flat(tf.transpose(made.stack(), (1, 0, 2)))


def scanned(p, x):
    """A scale in the loop, a weight made of two, and a first state that is a parameter."""
    weight = p["a"] @ p["b"]
    first = tf.tile(p["h"][None], (x.shape[0], 1))
    step = lambda h, x: tf.tanh(x @ p["w"] + (h @ weight) * p["g"])
    return tf.scan(step, tf.transpose(x, (1, 0, 2)), first)[-1]


def attending(p, x):
    """Places within each sample, beside the turns; one weight inside of the loop and outside of it."""

    def step(h):
        scores = tf.nn.softmax(tf.einsum("nsd,nd->ns", tf.tanh(x @ p["w"]), h))
        return (tf.tanh(tf.einsum("ns,nsd->nd", scores, x) @ p["w"] + h),)

    return tf.while_loop(lambda h: True, step, (x[:, 0] @ p["w"],), maximum_iterations=3)[0]


def moving_picture(p, x):
    step = lambda t, h: (t + 1, tf.tanh(tf.nn.conv2d(x[:, t], p["w"], 1, "SAME") + tf.nn.conv2d(h, p["u"], 1, "SAME")))
    return flat(tf.while_loop(lambda t, h: t < 2, step, (0, tf.zeros((x.shape[0], 2, 2, 2), x.dtype)))[1])


def fewer(p, x):
    """Fewer turns than there may be."""
    step = lambda t, h: (t + 1, tf.tanh(h @ p["w"] + p["b"]))
    return tf.while_loop(lambda t, h: t < 3, step, (0, x), maximum_iterations=5)[1]


NETWORKS = {
    "LSTM": (lstm, {"w": (2, 12), "u": (3, 12), "b": (12,)}, (3, TURNS, 2)),
    "scan": (scanned, {"w": (2, 3), "a": (3, 2), "b": (2, 3), "g": (3,), "h": (3,)}, (4, TURNS, 2)),
    "attention": (attending, {"w": (3, 3)}, (4, 2, 3)),
    "convolution": (moving_picture, {"w": (2, 2, 1, 2), "u": (2, 2, 2, 2)}, (3, 2, 2, 2, 1)),
    "fewer turns": (fewer, {"w": (3, 3), "b": (3,)}, (4, 3)),
}


def network(name, dtype="float64"):
    function, shapes, size = NETWORKS[name]
    values = {key: normal(*shape, seed=i).astype(dtype) for i, (key, shape) in enumerate(shapes.items())}
    return Wrapped(function, values), tf.constant(normal(*size).astype(dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_loops_are_taken_apart_by_rules(name):
    model, x = network(name)
    found = measured(model, x)
    y = target(model(x))
    agrees(
        found["d"], dense(lambda: model(x), model.trainable_variables, squared(y), y.shape.num_elements()), "float64"
    )
    same(found, model, x, "float64")
    assert found["cheap"], found["notes"]
    assert not found["notes"]
    assert while_v2.while_loop.__module__ == while_v2.__name__  # TensorFlow has its own again


def test_code_that_counts_how_often_it_is_traced():
    def run(p, x):
        traced = []

        def step(t, h):
            traced.append(t)
            return t + 1, tf.tanh(h @ p["w"]) * float(len(traced))

        return tf.while_loop(lambda t, h: t < 3, step, (0, x))[1]

    model, x = Wrapped(run, {"w": normal(3, 3)}), tf.constant(normal(4, 3))
    expected = tf.function(lambda: squared(tf.zeros_like(x))(model(x)))()
    assert lnp.decompose(model, (x, tf.zeros_like(x)), "mse").loss == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("case", ["as many turns as the data ask for", "a weight that changes", "an inner loop"])
def test_other_loops_are_run_sample_by_sample(case):
    def run(p, x):
        if case == "an inner loop":
            inner = lambda h: tf.while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, tf.tanh(h @ p["w"])), (0, h))[1]
            return tf.while_loop(lambda t, h: t < 2, lambda t, h: (t + 1, inner(h)), (0, x))[1]
        if case == "a weight that changes":
            step = lambda t, h, w: (t + 1, tf.tanh(h @ w), w / 2)
            return tf.while_loop(lambda t, *_: t < 3, step, (0, x, tf.convert_to_tensor(p["w"])))[1]
        step = lambda h: (tf.tanh(h @ p["w"]) / 2,)
        return tf.while_loop(lambda h: tf.reduce_max(tf.abs(h)) > 0.1, step, (x,))[0]

    model, x = Wrapped(run, {"w": normal(3, 3)}), tf.constant(normal(4, 3))
    if case.startswith("as"):
        x = x[:1] * [[1.0], [1.0], [1.0], [-1.0]]  # each alone as often as all
    y = target(model(x))
    d = lnp.decompose(model, (x, y), "mse", estimator="exact")
    assert any("slower" in note for note in d.notes), d.notes
    agrees(d, dense(lambda: model(x), model.trainable_variables, squared(y), y.shape.num_elements()), "float64")


def test_a_loop_costs_a_few_passes():
    """Recurrent networks are measured by their backward passes: no loop over samples is in what is run."""
    from lnp_tensorflow import compile_cache

    model, x = network("LSTM", "float32")
    lnp.decompose(model, (x, target(model(x))), "mse")
    definition = list(compile_cache._TRACED.values())[-1].function.graph.as_graph_def()
    bodies = {f.signature.name: [node.op for node in f.node_def] for f in definition.library.function}
    loops = [name for name, ops in bodies.items() if any("While" in op for op in ops) and "TensorListSetItem" in ops]
    assert not loops, loops
