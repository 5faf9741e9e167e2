"""Keras on handwritten digits, on TensorFlow, JAX or PyTorch: one callback, measuring on images that are not trained
on.

    pip install '.[keras,tensorflow,plot]' scikit-learn
    KERAS_BACKEND=tensorflow python docs/examples/keras_fit.py [folder] [epochs]
"""

import sys
from pathlib import Path

import keras
from sklearn.datasets import load_digits

import lnp
import lnp.plot
from lnp_keras.callback import LNPCallback


def main(folder: Path, epochs: int) -> lnp.Tracker:
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
    model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    held_out = images[1500:], labels[1500:]
    updates = epochs * -(-1500 // 64)  # batches of 64, the last one of each epoch smaller
    schedule = lnp.schedule.log_windows(6, width=3, last=updates - 1)
    callback = LNPCallback(held_out, folder / "keras.jsonl", schedule, by_layer=True)
    model.fit(images[:1500], labels[:1500], 64, epochs, verbose=0, callbacks=[callback])
    lnp.plot.dashboard(callback.tracker, "Keras").savefig(folder / "keras.png", dpi=110)
    return callback.tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 20)
