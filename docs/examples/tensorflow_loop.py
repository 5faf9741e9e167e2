"""A tf.GradientTape loop on handwritten digits. lnp adds a tracker, and one line to the loop.

pip install '.[tensorflow,plot]' scikit-learn
python docs/examples/tensorflow_loop.py [folder] [steps]
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import lnp
import lnp.plot

RATE = 0.05


class Network(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        normal = tf.random.Generator.from_seed(0).normal
        self.hidden, self.bias = tf.Variable(normal((64, 64)) / 8), tf.Variable(tf.zeros(64))
        self.head, self.head_bias = tf.Variable(normal((64, 10)) / 8), tf.Variable(tf.zeros(10))

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        return tf.tanh(images @ self.hidden + self.bias) @ self.head + self.head_bias


@tf.function
def update(model: Network, images: tf.Tensor, labels: tf.Tensor) -> None:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images)))
    for variable, gradient in zip(
        model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True
    ):
        variable.assign_sub(RATE * gradient)


def main(folder: Path, steps: int) -> lnp.Tracker:
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype(np.float32)
    held_out = tf.constant(images[:500]), tf.constant(labels[:500])
    generator = np.random.default_rng(0)
    model = Network()

    schedule = lnp.schedule.log_windows(6, width=3, last=steps - 1)
    tracker = lnp.Tracker(folder / "tensorflow.jsonl", schedule, batch=held_out, learning_rate=RATE, by_layer=True)
    for step in range(steps):
        tracker.observe(step, model)
        index = generator.integers(500, len(images), size=128)
        update(model, tf.constant(images[index]), tf.constant(labels[index]))
    lnp.plot.dashboard(tracker, "TensorFlow").savefig(folder / "tensorflow.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
