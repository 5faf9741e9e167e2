"""The core's random signs, inside compiled code too."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.estimators.signs import Signs, layout, seed_words


def signs_of(seed: Any, outputs: jax.Array, parts: list) -> Signs:
    """The signs for outputs (N, K), which were these parts. The seed is a number or a key of either kind."""
    words = jax.lax.bitcast_convert_type(jnp.ravel(_key_data(seed)), jnp.int32)
    shape = (outputs.shape[0], outputs.shape[1])
    return Signs(jnp, words, shape, *layout([part.shape for part in parts]), outputs.dtype)


def as_words(seed: Any) -> Any:
    """An integer as its two words: one of a part of a batch has 64 bits, and JAX as it comes has integers of 32. Others
    as they are.
    """
    return seed_words(operator.index(seed)) if isinstance(seed, int | np.integer) else seed


def _key_data(seed: Any) -> jax.Array:
    """Words of the seed, a number or a key of either kind."""
    seed = jnp.asarray(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(seed)
    return seed if seed.ndim else jax.random.key_data(jax.random.key(seed))
