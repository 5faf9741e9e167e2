"""lnp for TensorFlow: `tf.Module`s, functions with variables, and Keras models that run on TensorFlow."""

try:
    import tensorflow as tf  # noqa: F401
except ImportError as error:
    raise ImportError("lnp_tensorflow needs TensorFlow. Run: pip install 'lnp[tensorflow]'") from error

from lnp_tensorflow import nest
from lnp_tensorflow.backend import accepts, decompose, evaluate, linearize
from lnp_tensorflow.training_step import value_and_grad
from lnp_tensorflow.updates import difference, snapshot

__all__ = ["accepts", "decompose", "difference", "evaluate", "linearize", "snapshot", "value_and_grad"]

nest.register()
