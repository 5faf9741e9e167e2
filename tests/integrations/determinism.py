"""TensorFlow's operations in a fixed order, for tests that compare runs bit by bit."""

from __future__ import annotations

from collections.abc import Iterator


def deterministic() -> Iterator[None]:
    """Switched on while a module's tests run, and off again: others ask for what it forbids."""
    import tensorflow as tf
    from tensorflow.python.framework import config  # the public module has no way to switch it off

    tf.config.experimental.enable_op_determinism()
    yield
    config.disable_op_determinism()
