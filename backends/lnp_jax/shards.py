"""A measurement inside of `jax.shard_map`: of a device's own part of the batch, or of the whole by all together.

The whole batch has one record, the same on every device. What runs over samples is what each device computes of its
own, joined; J^T v is the sum over devices. So outputs travel, N K numbers for each cotangent, and gradients, as in
training. Outside of `shard_map` XLA adds up what each device holds, which moves less where outputs are large.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lnp.contract.linearization import Array, Linearization
from lnp_jax.bound_model import Network
from lnp_jax.programs import talking

TALKS = (
    "The {what} talks to other devices inside of jax.shard_map (by {operation}), where its derivative depends on who "
    "takes it. Expected one that computes on its own device alone. Measure outside of shard_map, with the batch and "
    "the parameters sharded by a NamedSharding."
)


@dataclass(frozen=True)
class Devices:
    """The devices along one or several axes of a mesh, each with a part of the batch, of equal size.

    Attributes
    ----------
    axis:
        The name or names; None for this device alone, whose part is the whole.
    """

    axis: str | tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """R."""
        return 1 if self.axis is None else int(jax.lax.psum(1, self.axis))

    def joined(self, tree: Any) -> Any:
        """Arrays over all samples, of those over a device's own."""
        if self.axis is None:
            return tree
        return jax.tree.map(lambda array: jax.lax.all_gather(array, self.axis, axis=0, tiled=True), tree)

    def own(self, array: Array) -> Array:
        """The rows of this device, of those of all."""
        if self.axis is None:
            return array
        rows = array.shape[0] // self.size
        return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(self.axis) * rows, rows)

    def targets(self, targets: Any, samples: int) -> Any:
        """Targets of all samples; what does not run over the samples is the same on every device."""

        def of_all(leaf: Any) -> Any:
            return self.joined(leaf) if jnp.ndim(leaf) and jnp.shape(leaf)[0] == samples else leaf

        return jax.tree.map(of_all, targets)

    def tree(self, tree: Any) -> Any:
        """Shapes and types of the outputs of all samples."""

        def of_all(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((leaf.shape[0] * self.size, *leaf.shape[1:]), leaf.dtype)

        return jax.tree.map(of_all, tree)

    def record(self, lin: Linearization) -> Linearization:
        """The record of the whole batch, of one with all outputs, whose operators are those of this device."""
        if self.axis is None:
            return lin

        def any_of(flag: Array) -> Array:
            return jax.lax.pmax(flag.astype(jnp.int32), self.axis) > 0

        def over_all(operator: Callable | None) -> Callable | None:
            return None if operator is None else lambda v: self.joined(operator(self.own(v)))

        jvp, coupled = lin.jvp, lin.coupled
        return replace(
            lin,
            vjp=lambda v: jax.lax.psum(lin.vjp(self.own(v)), self.axis),
            jvp=None if jvp is None else lambda u: self.joined(jvp(u)),
            gradient_pass=None,  # which knows the samples of this device alone
            subset=None,
            sample_square_norms=over_all(lin.sample_square_norms),
            group_square_norms=over_all(lin.group_square_norms),
            groups=lin.groups * self.size,
            coupled=None if coupled is None else lambda: any_of(coupled()),
            violations=tuple((any_of(flag), message) for flag, message in lin.violations),
        )

    def refuse_talking(self, net: Network, loss: Callable[[Array], Array], outputs: Array) -> None:
        """Raise ValueError where the network, or the loss of the outputs (N, K), talks to other devices by itself."""
        found = {"network": net.talks}
        if isinstance(outputs, jax.core.Tracer):
            found["loss"] = talking(jax.make_jaxpr(loss)(outputs).jaxpr)
        for what, operation in found.items():
            if operation:
                raise ValueError(TALKS.format(what=what, operation=operation))


_DEVICES: contextvars.ContextVar[Devices | None] = contextvars.ContextVar("devices", default=None)


def devices() -> Devices:
    """Those that measure together."""
    return _DEVICES.get() or Devices()


@contextlib.contextmanager
def together(axis: str | tuple[str, ...] | None) -> Iterator[None]:
    """Inside of it the devices along this axis of a mesh measure together.

    Raises
    ------
    ValueError
        Where no such axis is bound.
    """
    chosen = Devices(axis)
    try:
        chosen.size  # noqa: B018
    except NameError as error:
        raise ValueError(
            f"group={axis!r} is no axis that is bound here. Expected one of the mesh, inside of jax.shard_map. "
            "Outside leave group= out: a batch with a NamedSharding is measured whole."
        ) from error
    token = _DEVICES.set(chosen)
    try:
        yield
    finally:
        _DEVICES.reset(token)


def group_of(model: Any, asked: Any) -> None:
    """No processes have to be named: arrays are measured wherever they lie.

    Raises
    ------
    TypeError
        For a group; it says where an axis of a mesh is one.
    """
    if asked not in (None, "auto"):
        raise TypeError(
            f"group={asked!r} was given to lnp.decompose for JAX, which measures arrays wherever they lie. Expected "
            "none, or an axis of a mesh inside of jax.shard_map. Leave group= out, or call lnp_jax.decompose(apply, "
            "parameters, batch, key, group=axis) there."
        )
