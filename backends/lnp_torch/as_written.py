"""While a measurement runs, code is run as it was written: nothing compiled, checkpointed or taken from a cache.

PyTorch keeps such switches for the whole process. They are turned by the first measurement that needs them and turned
back by the last; what they do to checkpoints holds for the measuring thread alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.utils import checkpoint

REENTRANT = "CheckpointFunction"
GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
"""What `torch.utils.checkpoint` calls without reentrance, in newer releases and in older ones."""
UNKNOWN = (
    "This release of PyTorch ({}) checkpoints in a way that lnp does not know, and the network uses "
    "torch.utils.checkpoint. Expected a release from 2.4 to 2.14. Switch checkpointing off while you measure, or take "
    "another release."
)


class Counted:
    """A context of the whole process: entered with the first of those who need it, left with the last."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager]) -> None:
        self._make, self._lock, self._users = make, threading.RLock(), 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._stack.enter_context(self._make())
            self._users += 1

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Compiled functions run eagerly, activations are kept, parametrized weights are computed anew."""
    with _EAGER, _CHECKPOINTS, _here(), _uncached():
        yield


def _eager() -> contextlib.AbstractContextManager:
    """A compiled forward pass allows one backward pass only. Where nothing is compiled, no compiler is imported."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """`torch.utils.checkpoint` keeps activations instead of computing them again in the backward pass.

    That is when the parameters, dropout masks and batch statistics of the measurement are no longer in place: a
    reentrant checkpoint would even add to the user's `.grad`. The parts that are replaced are looked up by name at each
    call, so that functions which were imported or bound long before are reached too.
    """
    generators = [name for name in GENERATORS if hasattr(checkpoint, name)][:1]
    saved = {name: getattr(checkpoint, name) for name in (REENTRANT, *generators) if hasattr(checkpoint, name)}
    replace = {REENTRANT: _reentrant, **dict.fromkeys(generators, _generator)}
    try:
        for name, original in saved.items():
            setattr(checkpoint, name, replace[name](original))
        yield
    finally:
        for name, original in saved.items():
            setattr(checkpoint, name, original)


def _reentrant(original: Any) -> type:
    """The class that stands for reentrant checkpoints: it only calls their function while this thread measures."""

    class Either:
        @staticmethod
        def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args) if _MEASURES.on else original.apply(function, preserve_rng_state, *args)

    return Either


def _generator(original: Callable) -> Callable:
    def nothing() -> Iterator[None]:
        yield  # neither before the forward pass of a checkpointed function nor after it

    return lambda *args, **kwargs: nothing() if _MEASURES.on else original(*args, **kwargs)


class _Measures(threading.local):
    on = False


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """This thread measures."""
    before, _MEASURES.on = _MEASURES.on, True
    try:
        with contextlib.nullcontext() if takes_hold() else _refused():
            yield
    finally:
        _MEASURES.on = before


@functools.cache
def takes_hold() -> bool:
    """Whether checkpoints really keep activations now: tried on one number, once in a process."""
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return (2 * x).square()

    run = inspect.unwrap(checkpoint.checkpoint)  # without the part that imports the compiler
    with torch.enable_grad():
        for reentrant in (False, True):
            run(double, torch.ones((), device="cpu", requires_grad=True), use_reentrant=reentrant).backward()
    return len(calls) == 2


def _refused() -> contextlib.AbstractContextManager:
    """Checkpoints raise an error that says why: they cannot do without these hooks."""
    return torch.autograd.graph.disable_saved_tensors_hooks(UNKNOWN.format(torch.__version__))


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Parametrized weights are computed from the parameters of this pass, also inside `parametrize.cached()`."""
    if not parametrize._cache_enabled:
        yield
        return
    saved = parametrize._cache_enabled, parametrize._cache
    try:
        parametrize._cache_enabled, parametrize._cache = 0, {}
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = saved


_MEASURES = _Measures()
_EAGER, _CHECKPOINTS = Counted(_eager), Counted(_unchecked)
