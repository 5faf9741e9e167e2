"""Runs that are over: three sizes of a language model in Keras, trained by `fit` on the source text of Python's
standard library, byte by byte. The weights that ModelCheckpoint saved are measured afterwards, on text that none has
seen.

pip install '.[keras,tensorflow,plot,report]'
KERAS_BACKEND=tensorflow python docs/examples/keras_ladder.py [folder] [steps]

On the command line, with the same bytes in held_out.npy; a file of weights needs the model of its size:

for width in 16 32 64; do
    lnp measure width-$width --model docs/examples/keras_ladder.py:width_$width --tokens held_out.npy --out histories
done
lnp compare histories
lnp report histories
"""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import keras
import numpy as np
from ladder import BATCH, LENGTH, SYMBOLS, WIDTHS, measured, next_bytes, saved_steps, show, source_text

import lnp
from lnp_keras.callback import LNPCallback

HEADS = 2


@keras.saving.register_keras_serializable("ladder")
class Positions(keras.layers.Layer):
    """Adds a vector of its own to each position."""

    def build(self, shape: tuple) -> None:
        self.vectors = self.add_weight(shape=shape[1:], initializer="random_normal", name="vectors")

    def call(self, x: object) -> object:
        return x + self.vectors


def language_model(width: int) -> keras.Model:
    """Bytes (N, T) -> logits (N, T, 256) of the next ones: two blocks of causal attention and a feed-forward layer."""
    tokens = keras.Input((LENGTH - 1,), dtype="int32")
    x = Positions()(keras.layers.Embedding(SYMBOLS, width)(tokens))
    for _ in range(2):
        normed = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(HEADS, width // HEADS)(normed, normed, use_causal_mask=True)
        inner = keras.layers.Dense(4 * width, "gelu")(keras.layers.LayerNormalization()(x))
        x += keras.layers.Dense(width)(inner)
    model = keras.Model(tokens, keras.layers.Dense(SYMBOLS)(keras.layers.LayerNormalization()(x)))
    model.compile(keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


width_16, width_32, width_64 = (partial(language_model, width) for width in WIDTHS)


def train(folder: Path, width: int, sequences: np.ndarray, batch: tuple, steps: int) -> lnp.Tracker:
    """Train one size; about twelve checkpoints stay behind. The tracker is there to lay beside what they say."""
    keras.utils.set_random_seed(0)
    model, saved = language_model(width), saved_steps(steps)
    watched = LNPCallback(batch, schedule=saved)
    path = folder / "step-{batch:04d}.weights.h5"
    saving = keras.callbacks.ModelCheckpoint(path, save_weights_only=True, save_freq=saved[0])
    rows = np.random.default_rng(0).integers(0, len(sequences), BATCH * steps)
    model.fit(*next_bytes(sequences[rows]), BATCH, shuffle=False, verbose=0, callbacks=[watched, saving])
    return watched.tracker


def main(folder: Path, steps: int = 240, widths: Iterable[int] = WIDTHS) -> list[float]:
    sequences, held_out = source_text(folder)
    batch = next_bytes(held_out)
    apart = []
    for width in widths:
        watched = train(folder / f"width-{width}", width, sequences, batch, steps)
        apart.append(measured(folder, width, watched, batch, partial(language_model, width)))
    show(folder)
    return apart


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 240)
