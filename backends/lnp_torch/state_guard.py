"""Leave no trace: what a measurement might disturb is put back, also when an exception passes through."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from lnp_torch.as_written import as_written

_ONE = threading.RLock()


@contextlib.contextmanager
def undisturbed(devices: Iterable[torch.device]) -> Iterator[None]:
    """Gradients on, nothing compiled or checkpointed; random states are as before afterwards.

    Models need no care here: what is called is a copy of them. Random states are the whole process's, so that one
    thread measures at a time.
    """
    with _ONE:
        cached = partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        put_back = partial(finished, cached, _Transforms().restore, RandomState(devices).restore)
        try:
            # what is cast would stay in memory until the user's block ends, and the second pass of a measurement, which
            # finds its parameters cast, would have other operations than the first
            torch.set_autocast_cache_enabled(False)
            with torch.inference_mode(False), torch.enable_grad(), as_written():
                yield
        finally:
            try:
                put_back()
            except KeyboardInterrupt:  # which may have come before the first thing was put back
                put_back()
                raise


ENDS = {
    "Vmap": "_vmap_decrement_nesting", "Grad": "_grad_decrement_nesting", "Jvp": "_jvp_decrement_nesting",
    "Functionalize": "_func_decrement_nesting",
}  # fmt: skip
"""{transform: what ends it}."""


class _Transforms:
    """Function transforms under way: torch.func leaves its own behind where Ctrl-C comes as it enters one."""

    def __init__(self) -> None:
        self._depth, self._level = torch._C._functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level

    def restore(self) -> None:
        """End what has been entered since, one by one: PyTorch's own way to a depth ends one too many up to 2.11."""
        functorch: Any = torch._C._functorch
        while functorch.get_dynamic_layer_stack_depth() > self._depth:
            getattr(functorch, ENDS[functorch.peek_interpreter_stack().key().name])()
        while forward_ad._current_level > self._level:
            forward_ad.exit_dual_level()


def finished(*restores: Callable[[], None]) -> None:
    """Put everything back to the end, also where Ctrl-C comes meanwhile, which then is raised afterwards.

    What is put back twice is as if it had been once.
    """
    late = None
    while True:
        try:
            for restore in restores:
                restore()
            break
        except KeyboardInterrupt as interrupt:
            late = interrupt
    if late is not None:
        raise late


@contextlib.contextmanager
def no_gradients(parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The parameters' `.grad` are out of reach: a function whose own backward pass calls `.backward()` writes to them.

    Reversible networks do so. What goes this way is not handed on to the caller, whose J^T v would lack it.

    Raises
    ------
    RuntimeError
        If that has happened.
    """
    kept = [(p, p.grad) for p in parameters.values()]
    for p, _ in kept:
        p.grad = None
    try:
        try:
            yield
        except Exception as error:  # what else went wrong may come from this
            _refuse_written(parameters, error)
            raise
        _refuse_written(parameters, None)
    finally:
        for p, grad in kept:
            p.grad = grad


def _refuse_written(parameters: Mapping[str, torch.Tensor], error: Exception | None) -> None:
    """Raise RuntimeError if something has been added to the parameters' gradients."""
    written = [name for name, p in parameters.items() if p.grad is not None]
    if written:
        raise RuntimeError(
            f"A backward pass inside the model wrote to the gradients of {', '.join(written[:4])}: a function with "
            "a backward of its own calls .backward() there, and what goes that way is not seen by its caller. "
            "Expected a backward that returns its gradients. Give it the parameters as arguments, and use "
            "torch.autograd.grad in it."
        ) from error


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
def same_randomness(state: RandomState) -> Iterator[None]:
    """Run with the random state that an earlier pass began with, so that it draws the same numbers."""
    current = RandomState(state.devices)
    state.restore()
    try:
        yield
    finally:
        finished(current.restore)


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

    def same(self, other: RandomState) -> bool:
        """Whether all of them are."""
        tensors = zip((self._cpu, *self._cuda), (other._cpu, *other._cuda), strict=True)
        legacy = zip(self._numpy, other._numpy, strict=True)  # its name, its words, and numbers
        return (
            all(torch.equal(mine, its) for mine, its in tensors)
            and self._python == other._python
            and all(np.array_equal(mine, its) for mine, its in legacy)
        )


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """PyTorch's random states, on all devices that are in use, are as before afterwards.

    A `DataLoader` draws the seed of its workers from the global generator each time it is started. One with a generator
    of its own has to be the tracker's alone.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
