"""A Flax NNX loop on handwritten digits, with batch normalisation and dropout. lnp adds a tracker, and one line to the
loop.

pip install '.[jax,plot]' scikit-learn flax optax
python docs/examples/flax_loop.py [folder] [steps]
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import lnp
import lnp.plot


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(images)))))


@nnx.jit
def update(model: Network, optimizer: nnx.Optimizer, batch: tuple) -> None:
    def loss(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main(folder: Path, steps: int) -> lnp.Tracker:
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray((images - images.mean()) / images.std(), jnp.float32), jnp.asarray(labels)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    key = jax.random.key(1)

    schedule = lnp.schedule.log_windows(6, width=3, last=steps - 1)
    tracker = lnp.Tracker(folder / "flax.jsonl", schedule, by_layer=True)
    for step in range(steps):
        index = jax.random.randint(jax.random.fold_in(key, step), (128,), 0, len(images))
        batch = images[index], labels[index]
        tracker.observe(step, model, batch)
        update(model, optimizer, batch)
    lnp.plot.dashboard(tracker, "Flax NNX").savefig(folder / "flax.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
