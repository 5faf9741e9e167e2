"""lnp for JAX: functions with parameter pytrees, Flax NNX and Linen, Equinox, Haiku."""

from lnp_jax import results
from lnp_jax.backend import accepts, decompose, evaluate, linearize

__all__ = ["accepts", "decompose", "evaluate", "linearize"]

results.register()
