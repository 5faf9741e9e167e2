"""lnp for Keras 3 on TensorFlow, JAX and PyTorch: models and layers go to the backend of the framework they run on."""

try:
    import keras  # noqa: F401
except ImportError as error:
    raise ImportError("lnp_keras needs Keras 3. Run: pip install 'lnp[keras]' and a framework") from error

from lnp_keras.backend import accepts, evaluate, linearize, untouched
from lnp_keras.strategies import needs_all
from lnp_keras.training_step import value_and_grad
from lnp_keras.updates import difference, snapshot

__all__ = ["accepts", "difference", "evaluate", "linearize", "needs_all", "snapshot", "untouched", "value_and_grad"]
