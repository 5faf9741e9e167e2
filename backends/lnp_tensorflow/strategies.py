"""`tf.distribute`: batches whose parts lie with several replicas, and calls inside of a strategy's scope."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from lnp.contract.trees import leaves, map_leaves

STRATEGIES, CREATORS = "_distribution_strategy_stack", "_variable_creator_stack"
"""Where a graph keeps what `strategy.scope()` has entered; there is no public way out of it."""


@contextlib.contextmanager
def as_one_replica() -> Iterator[None]:
    """Inside of it there is no strategy: variables are those of one replica, and Keras's losses are not divided by the
    number of replicas, which a step does because it adds up their gradients.
    """
    with _left(STRATEGIES) if tf.distribute.has_strategy() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def outside_of_scope() -> Iterator[None]:
    """The same in the scope of a strategy, where new variables are not mirrored either; in a replica's own step, and
    where there is no strategy, nothing.
    """
    in_scope = tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context()
    with _left(STRATEGIES, CREATORS) if in_scope else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _left(*stacks: str) -> Iterator[None]:
    """The graph of here without what it has entered."""
    graph = tf.compat.v1.get_default_graph()
    entered = {name: getattr(graph, name) for name in stacks}
    try:
        for name in stacks:
            setattr(graph, name, [])
        yield
    finally:
        for name, stack in entered.items():
            setattr(graph, name, stack)


def whole(batches: Any, variables: Any) -> Any:
    """Batches of a distributed data set, with the replicas' parts joined in their order, so that N is that of all.

    Raises
    ------
    ValueError
        If the model's strategy has more replicas than there are parts, as with several workers, and if a part has no
        axis of samples.
    """
    if not any(map(_is_split, leaves(batches))):
        return batches
    strategies = [v.distribute_strategy for v in variables if isinstance(v, tf.distribute.DistributedValues)]
    replicas = max((strategy.num_replicas_in_sync for strategy in strategies), default=1)

    def joined(leaf: Any) -> Any:
        if not _is_split(leaf):
            return leaf
        if len(leaf.values) < replicas:
            raise ValueError(
                f"The batch holds the parts of {len(leaf.values)} replicas, and the strategy has {replicas}: the other "
                "workers hold the rest. Expected the parts of all replicas. Measure one worker's part as a batch of "
                "its own, or the whole batch on one worker."
            )
        if not all(part.shape.rank for part in leaf.values):
            raise ValueError(
                "The batch holds one number for each replica. Expected arrays that run over samples. Leave it out."
            )
        return tf.concat(leaf.values, axis=0)

    return map_leaves(joined, batches)


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, tf.distribute.DistributedValues) and not isinstance(leaf, tf.Variable)
