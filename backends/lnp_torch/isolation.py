"""Leave no trace: what a measurement might disturb is put back, also when an exception passes through."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import checkpoint


@contextlib.contextmanager
def undisturbed(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """Gradients on, compiled modules run eagerly; random states and the modules' attributes are as before afterwards.

    Parameters and buffers need no care here: models are called on aliases and copies of them.
    """
    attributes = [(module, dict(module.__dict__)) for module in modules]
    randomness = RandomState(devices)
    try:
        with torch.inference_mode(False), torch.enable_grad(), eager(), unchecked():
            yield
    finally:
        randomness.restore()
        for module, saved in attributes:
            module.__dict__.clear()
            module.__dict__.update(saved)


def eager() -> contextlib.AbstractContextManager:
    """Compiled functions run as they were written: a compiled forward pass allows only one backward pass."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """`torch.utils.checkpoint` keeps activations instead of computing them again in the backward pass.

    That is when the parameters, dropout masks and batch statistics of the measurement are no longer in place: a
    reentrant checkpoint would even add to the user's `.grad`. The parts that are replaced are looked up by name at each
    call, so that functions which were imported or bound long before are reached too.
    """
    saved = {
        name: getattr(checkpoint, name) for name in ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    }
    try:
        checkpoint.CheckpointFunction = _Unchecked
        checkpoint._checkpoint_without_reentrant_generator = _unchecked
        yield
    finally:
        for name, value in saved.items():
            setattr(checkpoint, name, value)


class _Unchecked:
    @staticmethod
    def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _unchecked(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What PyTorch does before and after the forward pass of a checkpointed function: nothing."""
    yield


@contextlib.contextmanager
def same_randomness(state: RandomState) -> Iterator[None]:
    """Run with the random state that an earlier pass began with, so that it draws the same numbers."""
    current = RandomState(state.devices)
    state.restore()
    try:
        yield
    finally:
        current.restore()


class RandomState:
    """The random states of PyTorch (CPU and the given devices), NumPy and Python at one moment."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.devices = tuple(device for device in devices if device.type == "cuda")
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self.devices]
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's legacy state

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self.devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
