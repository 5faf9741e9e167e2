"""lnp for JAX: functions with parameter pytrees, Flax NNX and Linen, Equinox, Haiku."""

try:
    import jax  # noqa: F401
except ImportError as error:
    raise ImportError("lnp_jax needs JAX, which is not installed. Run: pip install 'lnp[jax]'") from error

from lnp_jax import pytrees
from lnp_jax.backend import accepts, decompose, evaluate, linearize
from lnp_jax.processes import needs_all, process_number
from lnp_jax.shards import group_of
from lnp_jax.training_step import value_and_grad
from lnp_jax.updates import difference, snapshot

__all__ = [
    "accepts",
    "decompose",
    "difference",
    "evaluate",
    "group_of",
    "linearize",
    "needs_all",
    "process_number",
    "snapshot",
    "value_and_grad",
]

pytrees.register()
