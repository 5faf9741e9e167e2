"""Arrays of which other processes hold parts (`jax.distributed`)."""

from __future__ import annotations

from typing import Any

import jax

SPANS = (
    "Arrays of this model or batch lie on devices of several processes, and lnp.kernel and lnp.linear_operator work in "
    "one: nothing has been touched. Expected arrays that this process holds whole. Take lnp.spectrum, which measures "
    "across processes, or a checkpoint that is loaded in one."
)


def fetched(tree: Any) -> Any:
    """The tree with its arrays on the host, in one transfer; what is spread over processes is first made whole, which
    all of them have to ask for.
    """
    leaves, treedef = jax.tree.flatten(tree)
    spread = [number for number, leaf in enumerate(leaves) if spans(leaf) and not leaf.is_fully_replicated]
    if spread:
        from jax.experimental.multihost_utils import process_allgather

        for number, whole in zip(spread, process_allgather([leaves[n] for n in spread], tiled=True), strict=True):
            leaves[number] = whole
    return jax.device_get(jax.tree.unflatten(treedef, leaves))


def spans(leaf: Any) -> bool:
    """Whether other processes hold parts or copies of an array."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and not leaf.is_fully_addressable


def refuse_spanning(tree: Any) -> None:
    """Raise ValueError if processes share an array."""
    if any(map(spans, jax.tree.leaves(tree))):
        raise ValueError(SPANS)
