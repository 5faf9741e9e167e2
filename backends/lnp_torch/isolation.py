"""Leave no trace: what a measurement might disturb is put back, also when an exception passes through."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import checkpoint

GENERATORS = frozenset({torch.Generator, np.random.Generator, random.Random})


@contextlib.contextmanager
def undisturbed(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """Gradients on, compiled modules run eagerly; random states and the modules' attributes are as before afterwards.

    Parameters and buffers need no care here: models are called on aliases and copies of them.

    Raises
    ------
    RuntimeError
        If a backward pass inside the model has written to the `.grad` of its parameters.
    """
    modules = list(modules)
    attributes = [(module, dict(module.__dict__)) for module in modules]
    randomness = RandomState(devices, [value for _, saved in attributes for value in saved.values() if draws(value)])
    try:
        with torch.inference_mode(False), torch.enable_grad(), eager(), unchecked(), uncached(), no_gradients(modules):
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


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Parametrized weights are computed from the parameters of this pass, also inside `parametrize.cached()`."""
    saved = parametrize._cache_enabled, parametrize._cache
    try:
        parametrize._cache_enabled, parametrize._cache = 0, {}
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = saved


@contextlib.contextmanager
def no_gradients(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters' `.grad` are out of reach: a function whose own backward pass calls `.backward()` writes to them.

    Reversible networks do so. What goes this way is not handed on to the caller, whose J^T v would lack it.
    """
    owned = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
    kept = {id(p): (p, p.grad) for _, _, p in owned}
    for p, _ in kept.values():
        p.grad = None
    try:
        yield
        written = [f"{type(module).__name__}.{name}" for module, name, p in owned if p.grad is not None]
        if written:
            raise RuntimeError(
                f"A backward pass inside the model wrote to the gradients of {', '.join(written[:4])}: a function with "
                "a backward of its own calls .backward() there, and what goes that way is not seen by its caller. "
                "Expected a backward that returns its gradients. Give it the parameters as arguments, and use "
                "torch.autograd.grad in it."
            )
    finally:
        for p, grad in kept.values():
            p.grad = grad


def draws(value: Any) -> bool:
    """Whether it is a generator of random numbers."""
    return type(value) in GENERATORS  # asking torch.Generator for its instances takes ten times as long


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def generator_state(device: torch.device) -> torch.Tensor:
    """Of PyTorch's default generator of this device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Put it back."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextlib.contextmanager
def noticed(notice: Callable[[], None]) -> Iterator[None]:
    """`notice` is called where a reentrant checkpoint runs: what is inside is not part of the graph."""
    original = checkpoint.CheckpointFunction

    class Noticed:
        @staticmethod
        def apply(*args: Any) -> Any:
            notice()
            return original.apply(*args)

    try:
        checkpoint.CheckpointFunction = Noticed
        yield
    finally:
        checkpoint.CheckpointFunction = original


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
    current = RandomState(state.devices, state.generators)
    state.restore()
    try:
        yield
    finally:
        current.restore()


class RandomState:
    """The random states of PyTorch (CPU and the given devices), NumPy, Python and generators at one moment."""

    def __init__(self, devices: Iterable[torch.device], generators: Iterable[Any] = ()) -> None:
        self.devices = tuple(device for device in devices if device.type == "cuda")
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self.devices]
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's legacy state
        self.generators = tuple(generators)
        self._own = [_state(generator) for generator in self.generators]

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self.devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        for generator, state in zip(self.generators, self._own, strict=True):
            _set_state(generator, state)
