"""A copy of all that a model's code can write to, on the memory of the user's own parameters.

A measurement runs the copy, which is made anew for it. The user's modules, containers, buffers and hooks are never
touched, so that there is nothing to put back: not after an exception, not after Ctrl-C, not beside another thread.
Before each pass the copy is rewound, so that all passes of one measurement are the same function.

Copied are modules, containers, functions with closures, and objects of the user's, of whatever class. Shared are
parameters (their memory), and what is no part of the model: loaders, optimizers, hosts of training loops, locks, files.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lnp.state.places import ATTRIBUTES, LARGEST, PARTS, STATES, Part, empty_like, global_names, is_user_module, places
from lnp.state.preserve import PLAIN, SavedState
from lnp_torch import model_parts
from lnp_torch.clones import Clones
from lnp_torch.model_parts import GENERATOR, HOSTS, SCRIPTED, may_differ, own_class, unwrapped
from lnp_torch.sharded import active

FIXED = (type, types.ModuleType, torch.dtype, torch.device, torch.Size, enum.Enum)


class Replica:
    """Copies of the roots, made from one walk: what two of them share, their copies share.

    Parameters
    ----------
    roots:
        A model, a function that calls it, a loss.
    standing:
        Ids of the parameters for which the caller gives something at each pass.
    written:
        Ids of tensors that are known to be written to, see `Clones`.

    Attributes
    ----------
    roots:
        The copies.
    clones:
        Copies of tensors that are no parameters.
    given:
        Ids of the tensors that a pass begins with, its inputs excepted.
    begun:
        Whether a pass has begun; while it is being made ready, copies of buffers are no operations of the network.

    Raises
    ------
    ValueError
        If something is found that a pass may advance and nobody can copy: a Python generator.
    """

    def __init__(
        self, roots: Iterable[Any], standing: Iterable[int] = (), written: frozenset[int] = frozenset()
    ) -> None:
        self._memo: dict[int, tuple[Any, Any]] = {}
        self._held: list[tuple[Part, Any, list]] = []
        self._globals: dict[int, dict] = {}
        self._iterators: dict[int, Any] = {}
        self._empties: list[Any] = []
        self._restored: list[Any] = []
        self._standing, self.clones = frozenset(standing), Clones(written)
        self.given, self.begun = set[int](), True
        self.roots = tuple(self.of(root) for root in roots)
        self._held += [(PARTS[dict], made, PARTS[dict].take(made)) for made in self._globals.values()]
        self._changing = [held for held in self._held if held[0].refers and any(map(self._changes, held[2]))]
        found = {id(content) for _, _, content in self._changing}
        self._constant = [held for held in self._held if id(held[2]) not in found]
        self._shared = SavedState(self._restored, HOSTS)

    def rewind(self, standing: Mapping[int, torch.Tensor]) -> None:
        """Let everything hold what it held when the copy was made, with {id of a parameter: what stands for it}."""
        self.begun = False
        self.restore()
        for made in self._empties:
            made.clear()
        for part, made, content in self._constant:
            if not part.same(part.take(made), content):
                part.put(made, content)
        now: dict[int, Any] = {key: copy.copy(x) for key, x in self._iterators.items()}
        now |= {**self.clones.fresh(), **standing}
        self.given = set(map(id, now.values()))
        for part, made, content in self._changing:
            wanted = [now.get(id(value), value) for value in content]
            if not part.same(part.take(made), wanted):
                part.put(made, wanted)
        self.begun = True

    def restore(self) -> None:
        """Put back what cannot be copied: what classes hold, and the globals that their methods name."""
        self._shared.restore()

    def as_now(self) -> SavedState:
        """What cannot be copied, as it is now."""
        return SavedState(self._restored, HOSTS)

    def clear(self) -> None:
        """Let go of everything, without waiting for the garbage collector to find the circles."""
        for part, made, _ in self._held:
            if part.refers:
                part.put(made, [])
        self._memo.clear()
        self._held, self._changing, self._constant = [], [], []

    def of(self, x: Any) -> Any:
        """The copy of an object; the object itself where it is shared."""
        kind: Any = type(x)
        if kind in PLAIN:
            return x
        known = self._memo.get(id(x))
        if known is not None:
            return known[1]
        make = _maker(kind)
        return x if make is None else make(self, x)

    def _tensor(self, x: torch.Tensor) -> Any:
        if id(x) not in self._standing:
            self.clones.add(x)
        return self._keep(x, x)  # what stands for it is known at each pass

    def _iterator(self, x: Any) -> Any:
        made = self._keep(x, model_parts.copied_iterator(x))
        self._iterators[id(made)] = made
        return made

    def _empty(self, x: Any) -> Any:
        """A container, of which most hold nothing."""
        if x:
            return self._object(x)
        made = self._keep(x, type(x)())
        self._empties.append(made)
        return made

    def _changes(self, x: Any) -> bool:
        """Whether something else stands for an object in each pass."""
        return isinstance(x, torch.Tensor) or id(x) in self._iterators

    def _keep(self, x: Any, made: Any) -> Any:
        self._memo[id(x)] = x, made
        return made

    def _object(self, x: Any) -> Any:
        """An object with places of its own, a container among others."""
        if not isinstance(x, tuple(PARTS)) and not any(part.take(x) for part in places(x)):
            return x  # it has no state, and may be there to be recognised
        try:
            made = self._keep(x, empty_like(x))
        except TypeError:  # made in C, in a way that is its own
            self._restored.append(x)
            return x
        if is_user_module(type(x).__module__):
            self._restored.append(type(x))
        try:
            self._fill(x, made, places(x))
        except AttributeError:  # it lets nobody write what it holds: it is a value
            return self._keep(x, x)
        return made

    def _fill(self, x: Any, made: Any, parts: tuple[Part, ...]) -> None:
        for part in parts:
            content = [self.of(value) for value in part.take(x)] if part.refers else part.take(x)
            part.put(made, content)
            self._held.append((part, made, content))

    def _module(self, x: nn.Module) -> Any:
        """The copy of a module; a wrapper that would hook into the backward pass is left out."""
        inner = unwrapped(x)
        if inner is not x:
            return self._keep(x, self.of(inner))
        if isinstance(x, torch.jit.ScriptModule):  # what it holds is in C++, where nothing refers to copies
            made = self._keep(x, copy.deepcopy(x))
            self._fill(x, made, (SCRIPTED,))
            return made
        self.clones.buffers.update(id(buffer) for buffer in x._buffers.values())
        gathering = active()
        for hooks, kept in model_parts.without_sharding(x) if gathering is not None and not gathering.as_it_is else ():
            self._keep(hooks, type(hooks)((key, self.of(hook)) for key, hook in kept.items()))
        made = self._object(x)
        made.__class__ = own_class(type(x))
        if hasattr(type(x), "__del__"):  # what it does at its end is the user's own module's to do
            made.__class__ = type(type(x).__name__, (type(x),), {"__del__": lambda self: None})
        return made

    def _tuple(self, x: Any) -> Any:
        items = [self._item(i) for i in x]
        if all(new is old for new, old in zip(items, x, strict=True)):
            return x
        return self._keep(x, frozenset(items) if isinstance(x, frozenset) else tuple.__new__(type(x), items))

    def _item(self, x: Any) -> Any:
        """What stands in a tuple: one and the same at all passes. A parameter there is found by those who use it."""
        return self.clones.constant(x) if isinstance(x, torch.Tensor) and id(x) not in self._standing else self.of(x)

    def _method(self, x: types.MethodType) -> Any:
        """A method, bound to the copy of its object."""
        owner = self.of(x.__self__)
        of_class = getattr(type(x.__self__), x.__func__.__name__, None) is x.__func__
        function = x.__func__ if of_class else self.of(x.__func__)
        same = owner is x.__self__ and function is x.__func__
        return x if same else types.MethodType(function, owner)

    def _partial(self, x: functools.partial) -> Any:
        made = type(x)(self.of(x.func), *self._tuple(x.args), **{n: self.of(v) for n, v in x.keywords.items()})
        return self._keep(x, made)

    def _function(self, x: types.FunctionType) -> Any:
        """A function that refers to copies, by its closure, its defaults and the globals of the user's own code."""
        written = getattr(x, "_torchdynamo_orig_callable", None)
        if written is not None:  # compiled: it runs as it was written
            return self._keep(x, self.of(written))
        cells, own = x.__closure__ or (), is_user_module(x.__module__)
        if not own and not any(map(may_differ, [content for cell in cells for content in CELL.take(cell)])):
            return x
        known = self._globals.setdefault(id(x.__globals__), dict(x.__globals__)) if own else x.__globals__
        fresh = [cell for cell in cells if id(cell) not in self._memo]
        for cell in fresh:
            self._keep(cell, types.CellType())
        made = types.FunctionType(x.__code__, known, x.__name__, None, tuple(self.of(cell) for cell in cells))
        self._keep(x, made)
        for cell in fresh:
            self._fill(cell, self.of(cell), (CELL,))
        made.__defaults__, made.__kwdefaults__ = self.of(x.__defaults__), self.of(x.__kwdefaults__)
        for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(made, name, getattr(x, name))
        differs = own and self._other_globals(x, known)
        if not (cells or differs or x.__dict__ or made.__defaults__ is not x.__defaults__ or x.__kwdefaults__):
            return self._keep(x, x)
        self._fill(x, made, (ATTRIBUTES,))
        return made

    def _other_globals(self, x: types.FunctionType, known: dict) -> bool:
        """Whether copies stand for any of the globals that a function names; they are put into `known`."""
        found = {name: x.__globals__[name] for name in global_names(x) if name in x.__globals__}
        for name, value in found.items():
            known[name] = self.of(value)
        return any(known[name] is not value for name, value in found.items())

    def _bound(self, x: types.BuiltinMethodType) -> Any:
        """A method made in C, of a list for example."""
        owner = x.__self__
        if owner is None or isinstance(owner, FIXED) or (made := self.of(owner)) is owner:
            return x
        return self._keep(x, getattr(made, x.__name__))

    def _proxy(self, x: Any) -> Any:
        """A weak proxy of the copy."""
        try:
            target = x.__repr__.__self__  # of the object itself: there is no other way to it
        except ReferenceError:  # there is none any more
            return x
        made = self.of(target)
        return x if made is target else weakref.proxy(made)

    def _reference(self, x: weakref.ref) -> Any:
        target = x()
        made = target if target is None or isinstance(target, torch.Tensor) else self.of(target)
        return x if made is target else self._keep(x, weakref.ref(made))

    def _array(self, x: np.ndarray) -> Any:
        return x if x.nbytes > LARGEST or not x.flags.writeable else self._state(x)

    def _state(self, x: Any) -> Any:
        made = self._keep(x, copy.deepcopy(x))
        self._held += [(part, made, part.take(made)) for part in places(made)]
        return made

    def _generator(self, x: torch.Generator) -> Any:
        made = self._keep(x, torch.Generator(x.device))
        made.set_state(x.get_state())
        self._held.append((GENERATOR, made, GENERATOR.take(made)))
        return made


CELL = PARTS[types.CellType]
MAKERS: dict[Any, Callable[[Replica, Any], Any]] = {
    torch.Tensor: Replica._tensor,
    nn.Module: Replica._module,
    (tuple, frozenset): Replica._tuple,
    types.MethodType: Replica._method,
    types.BuiltinMethodType: Replica._bound,
    functools.partial: Replica._partial,
    types.FunctionType: Replica._function,
    weakref.ref: Replica._reference,
    np.ndarray: Replica._array,
    torch.Generator: Replica._generator,
    tuple(STATES): Replica._state,
}
"""How objects are copied that are no plain holders of other objects."""
EMPTIED = (dict, collections.OrderedDict, list, set)


@functools.lru_cache(maxsize=4096)
def _maker(kind: type) -> Callable[[Replica, Any], Any] | None:
    """How objects of a type are copied; None for those that are shared."""
    if issubclass(kind, FIXED):
        return None
    if kind in EMPTIED:
        return Replica._empty
    if kind in weakref.ProxyTypes:
        return Replica._proxy
    make = next((make for base, make in MAKERS.items() if issubclass(kind, base)), None)
    if make is None and hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
        return Replica._iterator
    return make or (Replica._object if model_parts.part_of_a_model(kind) else None)
