"""A convolutional network and a transformer block with the same weights, as each framework writes them, agree: to 1e-10
relative in float64, to 1e-5 in float32. Sizes are drawn. Needs all frameworks in one environment, Keras on TensorFlow.

Without GELU: TensorFlow rounds its constants to float32.
"""

import importlib.util
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if not all(importlib.util.find_spec(name) for name in ("torch", "jax", "tensorflow", "keras")):
    pytest.skip("needs torch, jax, tensorflow and keras", allow_module_level=True)
os.environ["KERAS_BACKEND"] = "tensorflow"  # elsewhere Keras rounds to float32

import jax
import keras
import tensorflow as tf
import torch
from jax import numpy as jnp
from keras import layers

import lnp

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "loss_terms")


@st.composite
def networks(draw, kind):
    """(weights, inputs, labels) of a convolutional network or a transformer block."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    normal = lambda *shape: rng.normal(size=shape) / shape[0] ** 0.5
    samples, size, width, classes = (draw(st.integers(low, 4)) for low in (2, 3, 2, 2))
    if kind == "cnn":
        kernel = draw(st.integers(1, 2))
        side = (size + 3 - kernel) // 2  # what padding to an even size leaves
        weights = {
            "conv": rng.normal(size=(kernel, kernel, 2, width)),
            "bias": rng.normal(size=width),
            "head": normal(side * side * width, classes),
        }
        return weights, rng.normal(size=(samples, size + 1, size + 1, 2)), rng.integers(0, classes, samples)
    # Keras rounds 1 / sqrt(key size) to float32, which does not show for powers of four
    heads, key, depth = draw(st.integers(1, 2)), draw(st.sampled_from([1, 4])), 2 * width
    classes += 3  # never as many as positions, where PyTorch's axis of classes would be in doubt
    weights = {
        "scale": 1 + normal(depth),
        **{name: normal(depth, heads, key) for name in ("query", "key", "value")},
        "out": normal(heads, key, depth),
        "up": normal(depth, 5),
        "down": normal(5, classes),
    }
    return weights, rng.normal(size=(samples, size, depth)), rng.integers(0, classes, (samples, size))


def torch_cnn(p, x):
    x = torch.tanh(torch.conv2d(x.permute(0, 3, 1, 2), p["conv"].permute(3, 2, 0, 1), p["bias"]))
    x = torch.nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return torch.nn.functional.avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1) @ p["head"]


def jax_cnn(p, x):
    x = jnp.tanh(
        jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + p["bias"]
    )
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return x.reshape(x.shape[0], -1) @ p["head"]


def tensorflow_cnn(p, x):
    x = tf.tanh(tf.nn.conv2d(x, p["conv"], 1, "VALID") + p["bias"])
    x = tf.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return tf.reshape(tf.nn.avg_pool2d(x, 2, 2, "VALID"), (x.shape[0], -1)) @ p["head"]


def keras_cnn(p, x):
    kernel, _, _, width = p["conv"].shape
    odd = (x.shape[1] - kernel + 1) % 2
    model = keras.Sequential(
        [
            layers.Conv2D(width, kernel, activation="tanh"),
            layers.ZeroPadding2D(((0, odd), (0, odd))),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(p["head"].shape[1], use_bias=False),
        ]
    )
    model(x)
    model.set_weights(list(p.values()))
    return model


def torch_block(p, x):
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], p["scale"], eps=1e-5)
    q, k, v = (torch.einsum("ntd,dhe->nhte", y, p[name]) for name in ("query", "key", "value"))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + torch.einsum("nhte,hed->ntd", y, p["out"])
    return torch.tanh(x @ p["up"]) @ p["down"]


def jax_block(p, x):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"]
    q, k, v = (jnp.einsum("ntd,dhe->nthe", y, p[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("nthe,nshe->nhts", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf))
    x = x + jnp.einsum("nhts,nshe,hed->ntd", weights, v, p["out"])
    return jnp.tanh(x @ p["up"]) @ p["down"]


def tensorflow_block(p, x):
    mean, variance = tf.nn.moments(x, -1, keepdims=True)
    y = (x - mean) / tf.sqrt(variance + 1e-5) * p["scale"]
    q, k, v = (tf.einsum("ntd,dhe->nthe", y, p[name]) for name in ("query", "key", "value"))
    scores = tf.einsum("nthe,nshe->nhts", q, k) / q.shape[-1] ** 0.5
    seen = tf.linalg.band_part(tf.ones(scores.shape[-2:], tf.bool), -1, 0)
    weights = tf.nn.softmax(tf.where(seen, scores, tf.cast(-np.inf, scores.dtype)))
    x = x + tf.einsum("nthe,hed->ntd", tf.einsum("nhts,nshe->nthe", weights, v), p["out"])
    return tf.tanh(x @ p["up"]) @ p["down"]


class Block(keras.Model):
    def __init__(self, p):
        super().__init__()
        self.norm = layers.LayerNormalization(epsilon=1e-5, center=False)
        self.attention = layers.MultiHeadAttention(*p["query"].shape[1:], use_bias=False)
        self.up, self.down = (
            layers.Dense(p["up"].shape[1], use_bias=False),
            layers.Dense(p["down"].shape[1], use_bias=False),
        )

    def call(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return self.down(keras.ops.tanh(self.up(x)))


def keras_block(p, x):
    model = Block(p)
    model(x)
    model.set_weights(list(p.values()))
    return model


FUNCTIONS = {
    "cnn": ((torch_cnn, torch.tensor), (jax_cnn, jnp.asarray), (tensorflow_cnn, tf.constant), keras_cnn),
    "transformer": (
        (torch_block, torch.tensor),
        (jax_block, jnp.asarray),
        (tensorflow_block, tf.constant),
        keras_block,
    ),
}


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", FUNCTIONS)
@settings(max_examples=2, derandomize=True)
@given(data=st.data())
def test_layers(kind, dtype, data):
    weights, x, labels = data.draw(networks(kind))
    weights, x = {name: array.astype(dtype) for name, array in weights.items()}, x.astype(dtype)
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    *functions, build = FUNCTIONS[kind]
    with jax.enable_x64(dtype == "float64"):
        found = [
            lnp.decompose((f, {n: of(a) for n, a in weights.items()}), (of(x), of(labels)), estimator="exact")
            for f, of in functions
        ]
        found.append(lnp.decompose(build(weights, x), (x, labels), estimator="exact"))
    for name in NUMBERS:
        values = [getattr(d, name) for d in found]
        assert values == pytest.approx([values[0]] * 4, rel=TOLERANCE[dtype], abs=1e-12), name
    assert {d.probes for d in found} == {int(labels.size / len(x)) * weights.get("head", weights.get("down")).shape[1]}
