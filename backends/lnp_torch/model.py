"""What a model is here: a function of parameters and inputs that can run again without touching the user's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from lnp.contract.trees import map_leaves
from lnp.contract.validation import select
from lnp_torch.clones import cast
from lnp_torch.dtensors import is_sharded
from lnp_torch.leaf_names import named
from lnp_torch.model_parts import unwrapped
from lnp_torch.outputs import continuous, like, real
from lnp_torch.refusals import is_tensor_parallel, refuse, refuse_transforms, with_whole_weights
from lnp_torch.replica import Replica
from lnp_torch.sharded import active
from lnp_torch.writes import Guard

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Program:
    """A copy of a model, on aliases of its parameters.

    Attributes
    ----------
    parameters:
        The selected parameters by name: leaves that share their storage with the user's, and require
        gradients. Of a complex one the real and imaginary parts, along a last axis.
    call:
        (parameters, inputs) -> outputs of any structure. Takes a dictionary that replaces the selected parameters.
    replica:
        The copy.
    loss:
        The copy of the user's loss, or None.
    guard:
        What the copy shares with the user.
    modules:
        The user's own modules, to be looked at.
    owner:
        The user's module or function.
    trained:
        Ids of a module's own parameters that are selected.
    written:
        Names of selected parameters that the model writes to.
    """

    parameters: Parameters
    call: Callable[[Parameters, Any], Any]
    replica: Replica
    loss: Any
    guard: Guard
    modules: tuple[nn.Module, ...] = ()
    owner: Any = None
    trained: frozenset[int] = frozenset()
    written: tuple[str, ...] = ()

    def in_float64(self) -> Program:
        """The same function in float64, as far as its dtypes follow from those of parameters, buffers and inputs."""
        gathering = active()
        wide = torch.Tensor.double if gathering is None else gathering.as_float64
        parameters = {name: wide(p.detach()).requires_grad_() for name, p in self.parameters.items()}
        clones = self.replica.clones

        def call(values: Parameters, inputs: Any) -> Any:
            clones.dtype = torch.float64
            try:
                return self.call(values, inputs)
            finally:
                clones.dtype = None

        return replace(self, parameters=parameters, call=call)

    def rewind(self) -> None:
        """The copy as it was in the beginning, at the parameters as they are."""
        self.replica.rewind({})

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(iter(self.parameters.values())).device

    def restricted(self, names: Iterable[str]) -> Program:
        """The same with some of the parameters, the others as they are."""
        chosen = {name: self.parameters[name] for name in names}
        fixed = {
            name: p for name, p in self.parameters.items() if name not in chosen
        }  # a network may differentiate in it
        return replace(self, parameters=chosen, call=lambda values, inputs: self.call({**fixed, **values}, inputs))


@dataclass(frozen=True)
class Snapshot:
    """A model with other values of its trained parameters: those from before an update (see `lnp_torch.updates`).

    Parameters that are not trained, buffers and modes are the model's own.
    """

    model: Any
    parameters: Parameters
    randomness: Any = None


def accepts(model: Any) -> bool:
    """Whether the model is a module, or a function with parameters some of which are tensors."""
    if isinstance(model, nn.Module | Snapshot):
        return True
    if not (isinstance(model, tuple) and len(model) == 2 and callable(model[0])):
        return False
    return any(isinstance(leaf, torch.Tensor) for leaf in named(model[1]).values())


def program(
    model: Any, forward: Callable | None, parameters: Any, loss: Any = None, written: frozenset[int] = frozenset()
) -> Program:
    """The model as a program, with its trainable or selected parameters, and a copy of the loss that belongs to it.

    `written` are the ids of tensors that it is known to write to.

    Raises
    ------
    ValueError
        For models that cannot be measured without touching them, see `lnp_torch.refusals`.
    RuntimeError
        Inside a transform of torch.func.
    """
    if isinstance(model, Snapshot):
        made = program(model.model, forward, parameters, loss, written)
        return replace(made, parameters=model.parameters)
    if active() is None:
        refuse(model)
    refuse_transforms()
    if isinstance(model, nn.Module):
        return _on_a_device(_module(unwrapped(model), forward, parameters, loss, written))
    if forward is not None:
        raise ValueError(
            "forward= was given for a model that is a pair (function, parameters). Expected it for modules only: put "
            "what it does into function(parameters, inputs)."
        )
    function, tree = model
    return _on_a_device(_function(function, tree, parameters, loss, written))


def _on_a_device(made: Program) -> Program:
    """The program, unless its parameters have no values."""
    if made.device.type == "meta":
        raise ValueError(
            f"The parameter {next(iter(made.parameters))} is on the meta device, where numbers have shapes but no "
            "values. Expected parameters with values: move the model to a device by to_empty(device=...) and load its "
            "weights, or load it without offloading where a library keeps them elsewhere."
        )
    return made


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

    def in_place(leaf: Any) -> Any:
        return standing.get(id(leaf), leaf)

    return tuple(map_leaves(in_place, value) for value in args), {n: map_leaves(in_place, v) for n, v in kwargs.items()}


def _holds_parameter(value: Any) -> bool:
    kind = type(value)
    return kind is nn.Parameter or ((kind is list or kind is tuple) and any(map(_holds_parameter, value)))


def _module(model: nn.Module, forward: Callable | None, parameters: Any, loss: Any, written: frozenset[int]) -> Program:
    """A module as a program: its copy is called with aliases in the place of its parameters."""
    own = dict(model.named_parameters())
    uninitialized = [name for name, p in own.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if uninitialized:
        raise ValueError(
            f"The parameters {uninitialized} are not initialised. Expected a model that has seen its first batch. "
            "Run model(inputs) once."
        )
    candidates = [name for name, p in own.items() if continuous(p) and (p.requires_grad or parameters is not None)]
    chosen = select(candidates, parameters)
    gathering = active()
    values = own if gathering is None else {name: gathering.standing(p) for name, p in own.items()}
    aliases = {name: _alias(values[name]) for name in chosen}
    split = gathering is not None and not gathering.as_it_is and is_tensor_parallel(model)
    if gathering is not None and not gathering.as_it_is:
        gathering.parameters = aliases
    replica = Replica((model, forward or called, loss), map(id, own.values()), written)
    copy, run, of_outputs = replica.roots

    def stands_for(name: str, p: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """What a pass has in the place of one of the module's own parameters."""
        given = name in parameters
        value = like(p, parameters[name]) if given else cast(values[name].detach(), replica.clones.dtype)
        return own_memory(value) if id(p) in written else value

    def call(parameters: Parameters, inputs: Any) -> Any:
        replica.rewind(standing := {id(p): stands_for(name, p, parameters) for name, p in own.items()})
        token = _STANDING.set(standing)
        try:
            with with_whole_weights() if split else nullcontext():
                return run(copy, inputs)
        finally:
            _STANDING.reset(token)

    trained = frozenset(id(p) for name, p in own.items() if name in aliases)
    return Program(
        aliases, call, replica, of_outputs, _guard(own, replica), tuple(model.modules()), model, trained,
        _written(own, aliases, written),
    )  # fmt: skip


def _function(function: Callable, tree: Any, parameters: Any, loss: Any, written: frozenset[int]) -> Program:
    """A function of a structure of parameters as a program."""
    leaves = named(tree)
    others = [f"{name} ({type(leaf).__name__})" for name, leaf in leaves.items() if not isinstance(leaf, torch.Tensor)]
    if others:
        raise ValueError(
            f"The parameters hold what is no tensor: {', '.join(others)}. Expected tensors alone. Make them tensors, "
            "or give them to the function in another way, such as functools.partial."
        )
    chosen = select([name for name, leaf in leaves.items() if continuous(leaf)], parameters)
    aliases = {name: _alias(leaves[name]) for name in chosen}
    replica = Replica((function, loss), written=written)
    run, of_outputs = replica.roots

    def call(parameters: Parameters, inputs: Any) -> Any:
        replica.rewind({})
        values = [
            like(leaf, parameters[name]) if name in parameters else cast(leaf.detach(), replica.clones.dtype)
            for name, leaf in leaves.items()
        ]
        pairs = zip(values, leaves.values(), strict=True)
        values = [own_memory(value) if id(leaf) in written else value for value, leaf in pairs]
        replica.given.update(map(id, values))
        given = iter(values)
        return run(map_leaves(lambda _: next(given), tree), inputs)

    named_as_written = _written(leaves, aliases, written)
    return Program(
        aliases, call, replica, of_outputs, _guard(leaves, replica), owner=function, written=named_as_written
    )


def own_memory(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter in memory that a pass may write to. Modes that watch see a call of this very function."""
    if has_torch_function_unary(parameter):
        return handle_torch_function(own_memory, (parameter,), parameter)
    return parameter.clone()


def _guard(own: Parameters, replica: Replica) -> Guard:
    """Of the parameters, which passes never write to: not where they have memory of their own for it, either."""
    written = replica.clones.written
    every = sorted(
        (p for p in own.values() if not is_sharded(p)), key=lambda p: id(p) not in written
    )  # of views of one memory, one that is not known
    return Guard([*every, *replica.clones.shared()])


def _written(own: Parameters, selected: Parameters, written: frozenset[int]) -> tuple[str, ...]:
    return tuple(name for name, p in own.items() if id(p) in written and name in selected)


def _alias(parameter: torch.Tensor) -> torch.Tensor:
    """A real leaf, on the parameter's storage unless that is complex."""
    if parameter.is_inference():
        raise ValueError(
            "The model's parameters were made in torch.inference_mode(), which rules out gradients. Expected a model "
            "made outside of it. Make one there, and load the state_dict of this one."
        )
    return real(parameter.detach()).requires_grad_()


def called(model: nn.Module, inputs: Any) -> Any:
    """model(x), model(*tuple) or model(**dict)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    return model(inputs)
