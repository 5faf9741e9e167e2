"""Random numbers that a pass draws: recorded once, for the whole batch, and repeated for any of its samples.

Recorded are masks of dropout and the values of PyTorch's functions that draw. What draws in another way (inside a fused
kernel, by NumPy, by Python) is noticed by the state of its generator.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnp_torch.state_guard import generator_state, set_generator_state
from lnp_torch.writes import Guard

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout)
MADE = frozenset(
    {
        *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like),
        *(torch.randint_like, torch.normal, torch.bernoulli, torch.multinomial, torch.poisson),
        *(Tensor.bernoulli, Tensor.multinomial),
    }
)
"""Functions that return random numbers."""
FILLED = frozenset(
    {
        *(Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_),
        *(Tensor.cauchy_, Tensor.log_normal_, Tensor.geometric_),
    }
)
"""Functions that fill a tensor with them."""
HOOKS = (Tensor.register_hook, Tensor.retain_grad)
ATTENTION = F.multi_head_attention_forward
ROWS = ("mask", "draw")
"""Kinds of recorded values that may have rows for each sample."""

Record = list[tuple[str, Any]]


class Expected:
    """The states in which PyTorch's generators must be, as far as what they drew is recorded.

    Attributes
    ----------
    explained:
        Whether they have been in them.
    """

    def __init__(self, device: torch.device) -> None:
        self._states = {place: generator_state(place) for place in {torch.device("cpu"), _place(device)}}
        self.explained = True

    def before(self, device: torch.device) -> None:
        """Numbers are about to be drawn, and recorded."""
        known = self._states.get(_place(device))
        self.explained &= known is None or torch.equal(known, generator_state(device))

    def after(self, device: torch.device) -> Tensor:
        """They have been drawn; the generator's state."""
        self._states[_place(device)] = state = generator_state(device)
        return state

    def all_explained(self) -> bool:
        """Whether everything that has been drawn is recorded."""
        for device in self._states:
            self.before(device)
        return self.explained


@dataclass(frozen=True)
class Mask:
    """A mask of dropout that can be drawn again: what the function makes of ones, from the state that it began with."""

    func: Callable
    p: float
    like: Tensor
    device: torch.device
    state: Tensor

    def drawn(self) -> Tensor:
        """The mask; the generator is afterwards as before."""
        now = generator_state(self.device)
        set_generator_state(self.device, self.state)
        try:
            return self.func(torch.ones_like(self.like, device=self.device), self.p, True)
        finally:
            set_generator_state(self.device, now)


class Watched(TorchFunctionMode):
    """Records what a training step draws. Nothing is computed differently, in no bit.

    Attributes
    ----------
    record:
        As of `Frozen`.
    hooked:
        Whether hooks were put on activations.
    wrote:
        Whether one of the parameters was written to.
    """

    def __init__(self, device: torch.device, parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._guard, self.wrote = Guard(parameters), False
        self._expected = Expected(device)
        self._record: Record = []
        self.hooked = False

    @property
    def record(self) -> Record:
        """What was drawn, with the masks."""
        return [(kind, value.drawn() if isinstance(value, Mask) else value) for kind, value in self._record]

    @property
    def explained(self) -> bool:
        """Whether all that was drawn up to the end of the forward pass is recorded."""
        return self._expected.all_explained()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the user's compiler follows this code: it must find nothing in it
            return func(*args, **kwargs)
        self.hooked |= func in HOOKS
        self.wrote |= self._guard.written(func, args, kwargs) is not None
        if func in DROPOUTS:
            return self._dropout(func, args, kwargs)
        if func is ATTENTION and OPENS:
            with self:  # so that its parts are seen
                return open_attention(*args, **kwargs)
        if func not in MADE and func not in FILLED:
            return func(*args, **kwargs)
        device = device_of(args, kwargs)
        self._expected.before(device)
        out = func(*args, **kwargs)
        self._record += [("draw", out.detach().clone()), ("state", self._expected.after(device))]
        return out

    def _dropout(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """The operation as it is, with what its mask can be drawn from again."""
        input, p, training = dropout_arguments(*args, **kwargs)
        if not training or p == 0:
            return func(*args, **kwargs)
        device = input.device
        self._expected.before(device)
        mask = Mask(func, p, torch.empty_like(input, device="meta"), device, generator_state(device))
        out = func(*args, **kwargs)
        self._record += [("mask", mask), ("state", self._expected.after(device))]
        return out


def dropout_arguments(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool | None = None
) -> tuple[Tensor, float, bool]:
    """(input, p, whether it drops) of a call of one of DROPOUTS."""
    return input, p, training if train is None else train


def device_of(args: tuple, kwargs: dict) -> torch.device:
    """Where a function draws its numbers."""
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return given.device if given is not None else torch.get_default_device()


open_attention = types.FunctionType(
    ATTENTION.__code__,
    {**ATTENTION.__globals__, "has_torch_function": lambda tensors: False},
    ATTENTION.__name__,
    ATTENTION.__defaults__,
    ATTENTION.__closure__,
)
"""Multi-head attention whose parts a mode sees: the original hands itself over as a whole, with its dropout."""
OPENS = "has_torch_function" in ATTENTION.__code__.co_names
"""Whether that takes hold in this release. Otherwise dropout inside is unexplained, and samples are not taken apart."""


def by_sample(kind: str, value: Any, samples: int) -> Tensor | None:
    """A recorded value with the samples along its first axis; None where it has no rows for each of them."""
    if kind not in ROWS or value.ndim == 0 or value.shape[0] % samples:
        return None
    return value.unflatten(0, (samples, -1))


def rows(record: Record, samples: int, part: slice | Tensor) -> Record:
    """The recorded values for some of the samples. Masks may have several rows per sample, as attention heads do."""
    found = [(kind, value, by_sample(kind, value, samples)) for kind, value in record]
    return [(kind, value if apart is None else apart[part].flatten(0, 1)) for kind, value, apart in found]


def _place(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")
