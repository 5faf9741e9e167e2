"""A JAX loop with optax on handwritten digits. lnp adds a tracker, and one line outside of the compiled step.

pip install '.[jax,plot]' scikit-learn optax
python docs/examples/optax_loop.py [folder] [steps]
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lnp
import lnp.plot


def apply(parameters: dict, images: jax.Array) -> jax.Array:
    hidden = jnp.tanh(images @ parameters["hidden"]["weight"] + parameters["hidden"]["bias"])
    return hidden @ parameters["head"]["weight"] + parameters["head"]["bias"]


def layer(key: jax.Array, inputs: int, outputs: int) -> dict:
    return {"weight": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "bias": jnp.zeros(outputs)}


def main(folder: Path, steps: int) -> lnp.Tracker:
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray((images - images.mean()) / images.std(), jnp.float32), jnp.asarray(labels)
    trained, held_out = (images[500:], labels[500:]), (images[:500], labels[:500])
    k1, k2, key = jax.random.split(jax.random.key(0), 3)
    parameters = {"hidden": layer(k1, 64, 64), "head": layer(k2, 64, 10)}
    rate = 0.05
    optimizer = optax.sgd(rate)
    state = optimizer.init(parameters)

    def loss(parameters, batch):
        return optax.softmax_cross_entropy_with_integer_labels(apply(parameters, batch[0]), batch[1]).mean()

    @jax.jit
    def update(parameters, state, batch):
        change, state = optimizer.update(jax.grad(loss)(parameters, batch), state, parameters)
        return optax.apply_updates(parameters, change), state

    schedule = lnp.schedule.log_windows(6, width=3, last=steps - 1)
    tracker = lnp.Tracker(folder / "optax.jsonl", schedule, batch=held_out, learning_rate=rate, by_layer=True)
    for step in range(steps):
        tracker.observe(step, (apply, parameters))
        index = jax.random.randint(jax.random.fold_in(key, step), (128,), 0, len(trained[0]))
        parameters, state = update(parameters, state, (trained[0][index], trained[1][index]))
    lnp.plot.dashboard(tracker, "JAX and optax").savefig(folder / "optax.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
