"""Arrays on a mesh with explicit axes, whose types say how they lie: measured on the same devices with automatic axes.

What a measurement makes of a network, one sample at a time, lies otherwise than a batch, and explicit axes would demand
that each operation says how. A network that names such shardings itself is refused: it runs with explicit axes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

EXPLICIT = (
    "The arrays lie on a mesh with explicit axes, {what}. Expected automatic axes, or a network that runs with them. "
    "Make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * {axes}, and say how activations lie by "
    "jax.lax.with_sharding_constraint."
)
COMPILED = "and lnp was called inside of a compiled function"
ENTERED = "jax.set_mesh has entered it, and what lnp.kernel and lnp.linear_operator return is used in that context"
NAMED = "and the network does not run with automatic ones ({error})"


@dataclass(frozen=True)
class Automatic:
    """What stands in for a mesh with explicit axes while something is measured; without a mesh, nothing does."""

    mesh: Any = None

    @contextlib.contextmanager
    def axes(self) -> Iterator[None]:
        """Inside of it names of axes stand for automatic ones."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield

    def placed(self, tree: Any) -> Any:
        """The tree with its arrays on automatic axes, in the same memory."""
        return tree if self.mesh is None else jax.tree.map(_automatic, tree)

    def refuse_context(self) -> None:
        """Raise ValueError where functions of arrays would be used later in a context of explicit axes."""
        if self.mesh is not None and _of_context():
            raise ValueError(EXPLICIT.format(what=ENTERED, axes=len(self.mesh.axis_names)))

    def refuse(self, network: Callable, *arguments: Any) -> None:
        """Raise ValueError for a network that does not run with automatic axes."""
        if self.mesh is None:
            return
        try:
            jax.eval_shape(network, *arguments)
        except Exception as error:  # whatever JAX raises for a sharding that is named
            what = NAMED.format(error=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
            raise ValueError(EXPLICIT.format(what=what, axes=len(self.mesh.axis_names))) from error


def automatic(tree: Any) -> Automatic:
    """The automatic axes for these arrays, where some lie on explicit ones, or the context has such a mesh.

    Raises
    ------
    ValueError
        Inside of a compiled function, where arrays have the types that they have.
    """
    leaves = jax.tree.leaves(tree)
    found = [mesh for leaf in leaves if (mesh := _explicit_mesh(leaf)) is not None] or _of_context()
    if not found:
        return Automatic()
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError(EXPLICIT.format(what=COMPILED, axes=len(found[0].axis_names)))
    return Automatic(_with_automatic_axes(found[0]))


def _of_context() -> list[Any]:
    """The mesh that `jax.set_mesh` has entered, if it has explicit axes."""
    entered = getattr(jax.sharding, "get_mesh", None)
    here = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    explicit: Any = getattr(here, "explicit_axes", None)
    return [entered()] if entered is not None and explicit else []


def _explicit_mesh(leaf: Any) -> Any:
    """The mesh with explicit axes on which an array lies, or None; older releases of JAX know none."""
    if not isinstance(leaf, jax.Array):
        return None
    known: Any = jax.typeof(leaf) if isinstance(leaf, jax.core.Tracer) and hasattr(jax, "typeof") else leaf
    mesh = getattr(getattr(known, "sharding", None), "mesh", None)
    return mesh if getattr(mesh, "explicit_axes", ()) else None


def _automatic(leaf: Any) -> Any:
    mesh = _explicit_mesh(leaf)
    if mesh is None:
        return leaf
    return jax.device_put(leaf, jax.sharding.NamedSharding(_with_automatic_axes(mesh), leaf.sharding.spec))


def _with_automatic_axes(mesh: Any) -> Any:
    kinds = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
