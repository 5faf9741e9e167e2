"""What functions read from Python when they are traced: compiled code holds it as constants, and must not outlive it.

Two stages, for what can be reached from a function changes often without a meaning (a trainer counts its steps): where
what it holds is not what it held before, it is traced again; only where that gives another program, the code that was
compiled for the last one is not used. Arrays of JAX that a function has closed over count as they do in `jax.jit`: they
are looked at when something else has changed.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.contract import validation
from lnp.state.fingerprint import fingerprint
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import flatten
from lnp_jax.state_guard import FOREIGN, restoring_state

REMEMBERED = 256
CONSTANT = 2**22
"""Numbers of a constant whose values are looked at."""
ADDRESS = re.compile(r"0x[0-9a-f]+")

_PROGRAMS: OrderedDict[Hashable, tuple[tuple, str]] = OrderedDict()
"""{function and shapes: (fingerprint of what it holds, digest of its program)}."""


def with_python_state(structure: Structure, model: Any, arrays: Arrays, batch: Any, traced: bool) -> Structure:
    """The structure with the digest of its program, so that equal structures have equal programs.

    Inside compiled code nothing is traced for this: a program that is not known to be the same has no digest.
    """
    if not hashable(structure):
        return structure
    inputs, _ = validation.unpack(batch)
    roots = [structure.static, structure.forward, None if isinstance(model, tuple) else type(model)]
    # a new function each time: JAX would remember what it has traced for one that it knows
    trace = jax.make_jaxpr(lambda arrays, inputs: structure.call(arrays, inputs))
    program = None if traced else partial(trace, arrays, inputs)
    return replace(structure, program=_digest((structure, shapes_of((arrays, inputs))), roots, program))


def loss_state(loss: Any, structure: Structure, arrays: Arrays, batch: Any) -> str:
    """The digest of the loss's program, "" for one of lnp's own."""
    if not (callable(loss) and hashable((structure, loss))):
        return ""
    inputs, targets = validation.unpack(batch)

    def program() -> Any:
        outputs = jax.eval_shape(structure.call, arrays, inputs)
        given = jax.tree.map(jnp.asarray, targets)
        if hasattr(given, "shape"):
            validation.check_lengths(jax.eval_shape(flatten, outputs).shape[0], given.shape)
        return jax.make_jaxpr(restoring_state(loss))(outputs, given)

    return _digest((loss, structure, shapes_of((arrays, inputs, targets))), [loss], program)


def _digest(key: Hashable, roots: Sequence[Any], program: Callable[[], Any] | None) -> str:
    """The digest of a program, traced only where what its functions hold has changed."""
    now = fingerprint([root for root in roots if root is not None], FOREIGN)
    held, digest_before = _PROGRAMS.get(key, (None, "unknown"))
    if held == now:
        _PROGRAMS.move_to_end(key)
        return digest_before
    if program is None:
        return "unknown"
    digest = _digest_of(program)
    _PROGRAMS[key] = now, digest
    while len(_PROGRAMS) > REMEMBERED:
        _PROGRAMS.popitem(last=False)
    return digest


def _digest_of(trace: Callable[[], Any]) -> str:
    """A short text for a program's operations and constants."""
    program = trace()
    found = hashlib.sha256(ADDRESS.sub("", str(program.jaxpr)).encode())
    for constant in program.consts:
        if isinstance(constant, jax.Array | np.ndarray) and np.size(constant) <= CONSTANT:
            keys = jnp.issubdtype(constant.dtype, jax.dtypes.extended)
            found.update(np.asarray(jax.random.key_data(constant) if keys else constant).tobytes())
    return found.hexdigest()


def hashable(value: Any) -> bool:
    """Whether something can be remembered for it."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def shapes_of(tree: Any) -> tuple:
    """The structure of a tree, and shapes and types of its leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
