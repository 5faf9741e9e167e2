"""Arrays of which other processes hold parts (`jax.distributed`)."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax

from lnp_jax.model import separate

PATIENCE = 300
"""Seconds that a process waits for the others to measure with it."""
LATE = (
    "Arrays of this model or batch lie on devices of several processes, and {seconds} seconds have passed without all "
    "of them measuring: nothing has been touched. Expected the same call in every process, at the same step. Call lnp, "
    "or the tracker, in all of them; it keeps the rows of one."
)
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


def process_number() -> int | None:
    """This process among those that `jax.distributed` has joined, or None."""
    joined = getattr(jax.distributed, "is_initialized", bool)()
    return jax.process_index() if joined and jax.process_count() > 1 else None


def needs_all(model: Any) -> bool:
    """Whether other processes hold parts of the model, and have to measure it too."""
    with contextlib.suppress(Exception):  # what is no model is refused when it is measured
        arrays = model[1] if isinstance(model, tuple) else separate(model, None, None)[1]
        return any(map(spans, jax.tree.leaves(arrays)))
    return False


def meet(tree: Any) -> None:
    """Wait for the other processes, where they hold parts of these arrays.

    Raises
    ------
    RuntimeError
        If they do not come: what is computed with them would never end.
    """
    if not any(map(spans, jax.tree.leaves(tree))):
        return
    try:
        from jax._src.distributed import global_state  # there is no public way to wait with a time limit

        wait = global_state.client.wait_at_barrier
    except (ImportError, AttributeError):
        return
    for _ in range(3):  # who has missed a meeting is told so at once at the next one, and then all meet again
        started = time.monotonic()
        try:
            return wait("lnp", PATIENCE * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error) and time.monotonic() - started >= 0.9 * PATIENCE:
                raise RuntimeError(LATE.format(seconds=PATIENCE)) from error


def spans(leaf: Any) -> bool:
    """Whether other processes hold parts or copies of an array."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and not leaf.is_fully_addressable


def refuse_spanning(tree: Any) -> None:
    """Raise ValueError if processes share an array."""
    if any(map(spans, jax.tree.leaves(tree))):
        raise ValueError(SPANS)
