"""What a model is here: a function of parameters and inputs that can run again without touching the user's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lnp.batches import select
from lnp.structure import children, map_leaves
from lnp_torch.complex import continuous, like, real
from lnp_torch.isolation import draws

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Program:
    """A model on aliases of its parameters.

    Attributes
    ----------
    parameters:
        The selected parameters by name: leaves that share their storage with the user's, and require
        gradients. Of a complex one the real and imaginary parts, along a last axis.
    call:
        (parameters, inputs) -> outputs of any structure. Takes a dictionary that replaces the selected parameters.
    modules:
        The modules that are called.
    owner:
        The user's module or function.
    trained:
        Ids of a module's own parameters that are selected.
    """

    parameters: Parameters
    call: Callable[[Parameters, Any], Any]
    modules: tuple[nn.Module, ...] = ()
    owner: Any = None
    trained: frozenset[int] = frozenset()

    @property
    def generators(self) -> list[Any]:
        """Generators of random numbers that the modules hold as attributes."""
        return [value for module in self.modules for value in vars(module).values() if draws(value)]

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(iter(self.parameters.values())).device

    def restricted(self, names: Iterable[str]) -> Program:
        """The same with some of the parameters, the others as they are."""
        chosen = {name: self.parameters[name] for name in names}
        fixed = {name: p.detach() for name, p in self.parameters.items() if name not in chosen}
        return replace(self, parameters=chosen, call=lambda values, inputs: self.call({**fixed, **values}, inputs))


@dataclass(frozen=True)
class Snapshot:
    """A model with other values of its trained parameters: those from before an update (see `lnp_torch.steps`).

    Parameters that are not trained, buffers and modes are the model's own.
    """

    model: Any
    parameters: Parameters
    randomness: Any = None


def accepts(model: Any) -> bool:
    """Whether the model is a module, or a function with parameters that are tensors."""
    if isinstance(model, nn.Module | Snapshot):
        return True
    if not (isinstance(model, tuple) and len(model) == 2 and callable(model[0])):
        return False
    tensors = list(named(model[1]).values())
    return bool(tensors) and all(isinstance(tensor, torch.Tensor) for tensor in tensors)


def program(model: Any, forward: Callable | None, parameters: Any) -> Program:
    """The model as a program, with its trainable or selected parameters."""
    if isinstance(model, Snapshot):
        return replace(program(model.model, forward, parameters), parameters=model.parameters)
    if isinstance(model, nn.Module):
        return _on_a_device(_module(unwrapped(model), forward, parameters))
    if forward is not None:
        raise ValueError(
            "forward= was given for a model that is a pair (function, parameters). Expected it for modules only: put "
            "what it does into function(parameters, inputs)."
        )
    function, tree = model
    return _on_a_device(_function(function, tree, parameters))


def _on_a_device(made: Program) -> Program:
    if made.device.type == "meta":
        raise ValueError(
            f"The parameter {next(iter(made.parameters))} is on the meta device, where numbers have shapes but no "
            "values. Expected parameters with values: move the model to a device by to_empty(device=...) and load its "
            "weights."
        )
    return made


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside data-parallel and compiled wrappers, which would hook into the backward pass."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def named(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a structure by their dotted path.

    >>> named({"layer": [1, 2], "scale": 3})
    {'layer.0': 1, 'layer.1': 2, 'scale': 3}
    """
    inner = children(tree)
    if inner is None:
        return {prefix or "parameters": tree}
    return {
        name: leaf
        for key, child in inner.items()
        for name, leaf in named(child, f"{prefix}.{key}" if prefix else key).items()
    }


_STANDING: ContextVar[dict[int, torch.Tensor] | None] = ContextVar("standing", default=None)
"""{id of the user's own parameter: what stands in its place} while a module is called."""


def captured(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation has been given one of the user's own parameters.

    Modules are called with other tensors in the place of their parameters. One that a closure, a `functools.partial`
    or a list holds by itself stays what it was, and what flows through it would be lost.
    """
    if _STANDING.get() is None:
        return False
    return any(map(_holds_parameter, args)) or (bool(kwargs) and any(map(_holds_parameter, kwargs.values())))


def replaced(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with what stands in the place of the user's own parameters."""
    standing = _STANDING.get() or {}
    own = lambda leaf: standing.get(id(leaf), leaf)
    return tuple(map_leaves(own, value) for value in args), {n: map_leaves(own, v) for n, v in kwargs.items()}


def _holds_parameter(value: Any) -> bool:
    kind = type(value)
    return kind is nn.Parameter or ((kind is list or kind is tuple) and any(map(_holds_parameter, value)))


class _Whole(nn.Module):
    """The user's module with the way it is called, so that the whole call can run on other parameters."""

    def __init__(self, model: nn.Module, forward: Callable) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Any:
        return self._forward(self.model, inputs)


@dataclass
class _Buffers:
    """Copies of the buffers: a forward pass may write to them. Those it did write to start anew at each pass."""

    original: Parameters
    copies: Parameters = field(default_factory=dict)

    def fresh(self) -> Parameters:
        for name, buffer in self.original.items():
            if name not in self.copies or self.copies[name]._version:
                self.copies[name] = buffer.detach().clone()
        return self.copies


def _module(model: nn.Module, forward: Callable | None, parameters: Any) -> Program:
    every = dict(model.named_parameters())
    uninitialized = [name for name, p in every.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if uninitialized:
        raise ValueError(
            f"The parameters {uninitialized} are not initialised. Expected a model that has seen its first batch. "
            "Run model(inputs) once."
        )
    candidates = [name for name, p in every.items() if continuous(p) and (p.requires_grad or parameters is not None)]
    chosen = select(candidates, parameters)
    first = {id(p): name for name, p in reversed(every.items())}
    names = {id(p): name for name, p in every.items()}
    tied = {f"model.{name}": first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    written = _written_parameters(model)
    every = {name: p.detach().clone() if id(p) in written else p for name, p in every.items()}
    aliases = {name: _alias(every[name]) for name in chosen}
    fixed = {name: p.detach() for name, p in every.items() if name not in aliases}
    buffers = _Buffers({f"model.{name}": buffer for name, buffer in model.named_buffers() if buffer is not None})
    whole = _Whole(model, forward or called)
    whole.training = model.training

    def call(parameters: Parameters, inputs: Any) -> Any:
        values = fixed | {name: like(every[name], alias) for name, alias in parameters.items()}
        state = {name: values[source] for name, source in tied.items()} | buffers.fresh()
        token = _STANDING.set({number: values[name] for number, name in names.items()})
        try:
            return torch.func.functional_call(whole, state, (inputs,), tie_weights=False)
        finally:
            _STANDING.reset(token)

    trained = frozenset(number for number, name in names.items() if name in aliases)
    return Program(aliases, call, tuple(model.modules()), model, trained)


def _function(function: Callable, tree: Any, parameters: Any) -> Program:
    leaves = named(tree)
    chosen = select([name for name, leaf in leaves.items() if continuous(leaf)], parameters)
    aliases = {name: _alias(leaves[name]) for name in chosen}

    def call(parameters: Parameters, inputs: Any) -> Any:
        values = iter(
            [like(leaf, parameters[name]) if name in parameters else leaf.detach() for name, leaf in leaves.items()]
        )
        return function(map_leaves(lambda _: next(values), tree), inputs)

    return Program(aliases, call, owner=function)


def _alias(parameter: torch.Tensor) -> torch.Tensor:
    """A real leaf, on the parameter's storage unless that is complex."""
    return real(parameter.detach()).requires_grad_()


def _written_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that a forward pass writes to: embeddings with `max_norm` shrink their rows in place."""
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }


def called(model: nn.Module, inputs: Any) -> Any:
    """model(x), model(*tuple) or model(**dict)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    return model(inputs)
