"""Which arrays a function gives to Flax Linen and Haiku as their state, seen while it runs.

A function hides what it calls: `module.apply` in a lambda, a partial, a closure, a compiled function. The modules
themselves know which of their arrays are no parameters (batch statistics, counters, caches); they are asked when they
are called, and the arrays recognised by their identity.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from lnp.contract.validation import select
from lnp.state.fingerprint import fingerprint
from lnp.state.preserve import reachable_objects
from lnp_jax.model import Arrays, Structure
from lnp_jax.python_state import hashable
from lnp_jax.state_guard import FOREIGN, functions_behind

REMEMBERED = 256
LIBRARIES = ("flax.linen", "haiku")
NAMED = 4
"""Parameters that a note names."""

_FOUND: OrderedDict[tuple, tuple[frozenset[str], bool]] = OrderedDict()
"""{structure and what it holds: (names of arrays that are states, whether others may be)}."""


@dataclass
class _Seen:
    """What modules have said in one run.

    Attributes
    ----------
    modules:
        Whether any has run.
    states:
        {where: array that is no parameter}, as they were when the run began.
    collections:
        Names of Linen's collections, without "params".
    """

    modules: bool = False
    states: dict[Any, Any] = field(default_factory=dict)
    collections: set[str] = field(default_factory=set)

    def linen(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """Around each method of a Linen module: the outermost has the variables of all."""
        module = context.module
        if module.scope is not None and not module.path:
            self.modules = True
            for name, variables in module.variables.items():
                if name != "params":
                    self.collections.add(name)
                    for number, leaf in enumerate(jax.tree.leaves(variables)):
                        self.states.setdefault((id(module), name, number), leaf)
        return call(*args, **kwargs)

    def haiku(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """Around each method of a Haiku module: of being made and of being asked, too."""
        if context.method_name in ("__init__", "state_dict"):
            return call(*args, **kwargs)
        self.modules = True
        for name, leaf in context.module.state_dict().items():
            self.states.setdefault(name, leaf)
        return call(*args, **kwargs)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, modules say what their states are."""
        with contextlib.ExitStack() as stack:
            for name, interceptor in zip(LIBRARIES, (self.linen, self.haiku), strict=True):
                if name in sys.modules:
                    stack.enter_context(sys.modules[name].intercept_methods(interceptor))
            yield


def without_states(structure: Structure, arrays: Arrays, inputs: Any) -> Structure:
    """The structure with nothing trained that a function gives to Linen or Haiku as a state. Where such a state is
    made of what the function is given in a way that cannot be followed, a note says what was taken for parameters.
    """
    if structure.kind != "function" or not any(name in sys.modules for name in LIBRARIES):
        return structure
    key = _key(structure, inputs)
    if key is None or key not in _FOUND:
        found = _states(structure, arrays, inputs)
        if key is not None:
            _FOUND[key] = found
            while len(_FOUND) > REMEMBERED:
                _FOUND.popitem(last=False)
    else:
        found = _FOUND[key]
    states, unsure = found
    trained = [name for name in structure.trained if name not in states]
    if len(trained) < len(structure.trained):
        select(trained, None)
    notes = (_unsure(trained),) if unsure else ()
    return replace(structure, trained=tuple(trained), notes=notes)


def _unsure(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        "the function gives its modules states that it makes of what it was given, which cannot be followed: taken for "
        f"parameters were {', '.join(names[:NAMED])}{more}; pass parameters= to choose"
    )


def _key(structure: Structure, inputs: Any) -> tuple | None:
    """What the answer is remembered for: the structure, and what its functions hold in Python, which may change."""
    if not hashable(structure):
        return None
    roots = [root for root in (structure.static, structure.forward) if root is not None]
    return structure, jax.tree.structure(inputs), fingerprint(roots, FOREIGN)


def _states(structure: Structure, arrays: Arrays, inputs: Any) -> tuple[frozenset[str], bool]:
    """(Names of arrays that are states, whether there are states that were not recognised).

    Compiled functions hand on other objects than they are given, or have run before: what remains open then is looked
    at in a run without compilation.
    """
    seen, states, missed = _run(structure, arrays, inputs)
    if missed or (not seen.modules and _of_a_library(structure.static)):
        with jax.disable_jit():  # loops that depend on values cannot be run so: what was seen until then counts
            seen, states, missed = _run(structure, arrays, inputs, Exception)
    by_name = _in_collections(structure, seen.collections)
    return states | by_name, missed and not by_name


def _run(
    structure: Structure, arrays: Arrays, inputs: Any, *failing: type[Exception]
) -> tuple[_Seen, frozenset[str], bool]:
    """(What was seen, names of the arrays that are states, whether others are), in one run without numbers.

    It may end in errors that are `failing`.
    """
    seen, states, missed = _Seen(), set(), False

    def run(arrays: Arrays, inputs: Any) -> Any:
        nonlocal missed
        names = {id(array): name for name, array in arrays.items()}
        with seen.watching():
            try:
                return structure.call(arrays, inputs)
            finally:
                for leaf in seen.states.values():
                    states.update([names[id(leaf)]] if id(leaf) in names else [])
                    missed |= id(leaf) not in names and isinstance(leaf, jax.core.Tracer)

    with contextlib.suppress(*failing):
        jax.eval_shape(lambda arrays, inputs: run(arrays, inputs), arrays, inputs)
    return seen, frozenset(states), missed


def _in_collections(structure: Structure, collections: set[str]) -> frozenset[str]:
    """Names of the arrays that lie in these collections of variables beside "params"."""
    tree = jax.tree.unflatten(structure.treedef, structure.names) if not structure.fixed else None
    if not isinstance(tree, Mapping) or "params" not in tree:
        return frozenset()
    return frozenset(name for key in tree if key in collections for name in jax.tree.leaves(tree[key]))


def _of_a_library(function: Any) -> bool:
    """Whether modules or transformed functions of Linen or Haiku can be reached from a function."""
    reached = reachable_objects([function, *functions_behind([function])], FOREIGN)
    held = [kind for x in reached for kind in (x if isinstance(x, type) else type(x)).__mro__]
    modules = {kind.__module__ for kind in held} | {getattr(x, "__module__", None) for x in reached}
    return any(str(name).startswith(LIBRARIES) for name in modules)
