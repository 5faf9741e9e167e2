"""The demo's training loop in JAX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Trainer:
    """One network of the demo: plain gradient descent on a stream of batches."""

    def __init__(
        self,
        weights: Sequence[dict[str, np.ndarray]],
        stream: tuple[np.ndarray, ...],
        learning_rate: float,
        frozen: bool,
    ) -> None:
        self._parameters = jax.tree.map(jnp.asarray, list(weights))
        self._stream = self.arrays(stream)
        self._learning_rate, self._frozen = learning_rate, frozen

    @property
    def model(self) -> tuple:
        """For `lnp.decompose`."""
        return apply, self._parameters

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.size for p in jax.tree.leaves(self._parameters[-1:] if self._frozen else self._parameters))

    def arrays(self, batch: tuple[np.ndarray, ...]) -> tuple[jax.Array, jax.Array]:
        """Images and labels as arrays."""
        return jnp.asarray(batch[0]), jnp.asarray(batch[1])

    def train(self, start: int, stop: int) -> None:
        """Take the steps from `start` up to `stop`."""
        self._parameters = _train(self._parameters, self._stream, start, stop, self._learning_rate, self._frozen)


def apply(parameters: Any, images: jax.Array) -> jax.Array:
    """One hidden layer of tanh units."""
    hidden = jnp.tanh(images @ parameters[0]["weight"] + parameters[0]["bias"])
    return hidden @ parameters[1]["weight"] + parameters[1]["bias"]


def _loss(parameters: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(apply(parameters, images))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


@partial(jax.jit, static_argnums=5)
def _train(parameters: Any, stream: tuple, start: int, stop: int, learning_rate: float, frozen: bool) -> Any:
    def step(index: int, parameters: Any) -> Any:
        gradient = jax.grad(_loss)(parameters, stream[0][index], stream[1][index])
        moved = jax.tree.map(lambda p, g: p - learning_rate * g, parameters, gradient)
        return [parameters[0], moved[1]] if frozen else moved

    return jax.lax.fori_loop(start, stop, step, parameters)
