"""Keras on TensorFlow: functional models of layers with drawn kinds, sizes and settings, compiled with a drawn loss."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
import keras
import numpy as np
import tensorflow as tf
from compared import NotBuilt, verdict
from keras import layers
from norms import Norms

import lnp
from lnp.contract.options import Options
from lnp.contract.registry import evaluate

VERSIONS = {"tensorflow": tf.__version__, "keras": keras.__version__}
SAMPLES, LENGTH, SIDE, VOCABULARY, CLASSES = 4, 6, 8, 11, 3
SHAPES = {"vector": (5,), "image": (SIDE, SIDE, 3), "sequence": (LENGTH, 5), "tokens": (LENGTH,)}
ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "softmax", None)


def drawn(seed: int, only: str) -> Iterator[tuple[str, Callable[[], tuple[str, str]]]]:
    """(name, its comparison) without end."""
    rng = random.Random(seed)
    while True:
        kind, number = rng.choice(sorted(SHAPES)), rng.randrange(2**31)
        if only in kind:
            yield f"keras {kind} {number}", partial(compared, kind, number)


def built(kind: str, seed: int) -> tuple[list[str], keras.Model]:
    """(names of the layers, the compiled model)."""
    rng, names = random.Random(seed), []
    keras.utils.set_random_seed(seed % 2**32)
    start = keras.Input(SHAPES[kind], dtype="int32" if kind == "tokens" else "float32")
    x = layers.Embedding(VOCABULARY, 6, mask_zero=rng.random() < 0.3)(start) if kind == "tokens" else start
    for _ in range(rng.randint(1, 4)):
        name, layer = drawn_layer(len(x.shape), rng)
        y = layer(x)
        x = layers.Add()([x, y]) if y.shape == x.shape and rng.random() < 0.3 else y
        names.append(name)
    x = {2: lambda x: x, 3: layers.GlobalAveragePooling1D(), 4: layers.GlobalAveragePooling2D()}[len(x.shape)](x)
    probabilities = rng.random() < 0.3
    x = layers.Dense(CLASSES, activation="softmax" if probabilities else None)(x)
    model = keras.Model(start, x)
    loss = rng.choice(
        [
            keras.losses.SparseCategoricalCrossentropy(from_logits=not probabilities),
            keras.losses.SparseCategoricalCrossentropy(from_logits=not probabilities, reduction="sum"),
        ]
    )
    model.compile(keras.optimizers.SGD(1.0), loss)
    return [*names, loss.reduction], model


def drawn_layer(rank: int, rng: random.Random) -> tuple[str, Any]:
    """(name, layer) for arrays of this rank."""
    out, bias, act = rng.choice((4, 6, 8)), rng.random() < 0.7, rng.choice(ACTIVATIONS)
    decay = rng.choice((None, None, None, keras.regularizers.L2(0.01)))
    makers: dict[str, Callable] = {
        "Dense": lambda: layers.Dense(out, act, use_bias=bias, kernel_regularizer=decay),
        "LayerNormalization": layers.LayerNormalization,
        "RMSNormalization": layers.RMSNormalization,
        "BatchNormalization": layers.BatchNormalization,
        "PReLU": layers.PReLU,
        "Dropout": lambda: layers.Dropout(0.0),
        "EinsumDense": lambda: layers.EinsumDense("...i,io->...o", (*[None] * (rank - 2), out), bias_axes="o"),
        "UnitNormalization": layers.UnitNormalization,
    }
    if rank == 3:
        makers |= {
            "LSTM": lambda: layers.LSTM(out, return_sequences=True),
            "GRU": lambda: layers.GRU(out, return_sequences=True, reset_after=bias),
            "SimpleRNN": lambda: layers.SimpleRNN(out, go_backwards=bias, return_sequences=True),
            "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(out)),
            "Conv1D": lambda: layers.Conv1D(out, 3, padding="causal", activation=act),
            "SeparableConv1D": lambda: layers.SeparableConv1D(out, 3, padding="same"),
            "attention": lambda: SelfAttention(2, 4),
        }
    if rank == 4:
        makers |= {
            "Conv2D": lambda: layers.Conv2D(
                out, 3, rng.choice((1, 2)), "same", use_bias=bias, kernel_regularizer=decay
            ),
            "DepthwiseConv2D": lambda: layers.DepthwiseConv2D(3, padding="same"),
            "SeparableConv2D": lambda: layers.SeparableConv2D(out, 3, padding="same"),
            "Conv2DTranspose": lambda: layers.Conv2DTranspose(out, 2, 2),
            "GroupNormalization": lambda: layers.GroupNormalization(1),
            "MaxPooling2D": layers.MaxPooling2D,
        }
    name = rng.choice(sorted(makers))
    return name + ("" if decay is None or name not in ("Dense", "Conv2D") else " with decay"), makers[name]()


@keras.saving.register_keras_serializable()
class SelfAttention(layers.Layer):
    """Attention of a sequence to itself."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, size)

    def call(self, x: Any) -> Any:
        return self.attention(x, x)


def compared(kind: str, seed: int) -> tuple[str, str]:
    """Build, measure, compare."""
    try:
        names, model = built(kind, seed)
    except Exception as error:
        raise NotBuilt(str(error)) from error
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(SAMPLES, *SHAPES[kind])).astype("float32")
    if kind == "tokens":
        x = rng.integers(0, VOCABULARY, (SAMPLES, LENGTH))
    y, said = np.arange(SAMPLES) % CLASSES, " + ".join(names)
    try:
        d = lnp.decompose(model, (x, y), max_probes=2)
        record = evaluate(Norms(), model, ((x, y),), Options())
    except (ValueError, TypeError) as error:
        return "refused", f"{said}: {error}"[:250]
    pairs = {}
    if record["norms"] and "BatchNormalization" not in names:
        pairs = norms_alone(model, x, record)
    before = [variable.numpy() for variable in model.trainable_variables]
    model.train_on_batch(x, y)  # by SGD with a learning rate of 1: the update is the gradient
    after = [variable.numpy() for variable in model.trainable_variables]
    rate = sum(float(np.sum((a - b).astype(float) ** 2)) for a, b in zip(after, before, strict=True))
    if not rate > 0:
        raise NotBuilt("nothing is learnt")
    found, notes = verdict({"rate": ([d.rate], [rate]), **pairs}, d.notes)
    return found, f"{said}: {notes}"


def norms_alone(model: keras.Model, x: Any, record: dict[str, Any]) -> dict[str, tuple]:
    """{parameter: (lnp's squared norms, those of each sample run by itself)}."""
    rows = []
    for n in range(SAMPLES):
        with tf.GradientTape() as tape:
            out = tf.reshape(model(x[n : n + 1], training=True), (1, -1))
        weight = np.asarray(record["v"])[n : n + 1]
        grads = tape.gradient(out, model.trainable_variables, tf.constant(weight), unconnected_gradients="zero")
        rows.append([float(tf.reduce_sum(tf.convert_to_tensor(g) ** 2)) for g in grads])
    columns, lnps = np.array(rows).T, list(record["norms"].items())
    if len(lnps) != len(columns):
        return {"number of parameters": ([len(lnps)], [len(columns)])}
    return {name: (np.asarray(values), column) for (name, values), column in zip(lnps, columns, strict=True)}
