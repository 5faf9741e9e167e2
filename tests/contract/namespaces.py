"""The frameworks' functions under the array-API standard's names, as the scenarios call them."""

import contextlib
from types import SimpleNamespace


def jax():
    from jax import numpy

    return numpy


def torch():
    from array_api_compat import torch

    return torch


def tensorflow():
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})  # many small graphs, each run once
    return SimpleNamespace(**vars(tf.experimental.numpy) | {"matrix_transpose": tf.linalg.matrix_transpose})


def float64(framework):
    """Where numbers of 64 bits have to be switched on: a context manager that does."""
    if framework != "jax":
        return contextlib.nullcontext()
    import jax
    import jax.experimental

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64(True)  # as it was called before 0.8
