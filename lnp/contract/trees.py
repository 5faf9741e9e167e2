"""Nested containers of arrays: what models take and return.

Frameworks without a public walker of their own use these functions. A container is a dict, list, tuple, named tuple or
dataclass instance; everything else is a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def children(tree: Any) -> dict[str, Any] | None:
    """The named children of a container, or None for a leaf."""
    if isinstance(tree, Mapping):
        return by_unique_name((str(key), value) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return {str(index): value for index, value in enumerate(tree)}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return None


def by_unique_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """{name: value} of all pairs, in their order: a name that is taken gets a mark.

    >>> by_unique_name([("a.w", 1), ("w", 2), ("a.w", 3)])
    {'a.w': 1, 'w': 2, 'a.w_': 3}
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        while name in found:
            name += "_"
        found[name] = value
    return found


def leaves(tree: Any) -> list[Any]:
    """Every leaf, depth first, in the order of the containers."""
    inner = children(tree)
    if inner is None:
        return [tree]
    return [leaf for child in inner.values() for leaf in leaves(child)]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure with `function` applied to each leaf; the original is not touched.

    >>> map_leaves(lambda x: 2 * x, {"a": 1, "b": (2, [3])})
    {'a': 2, 'b': (4, [6])}
    """
    if isinstance(tree, Mapping):
        mapped = {key: map_leaves(function, value) for key, value in tree.items()}
        return mapped if type(tree) is dict else _rebuild_mapping(tree, mapped)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = (field.name for field in dataclasses.fields(tree) if field.init)
        return dataclasses.replace(tree, **{name: map_leaves(function, getattr(tree, name)) for name in fields})
    return function(tree)


def _rebuild_mapping(tree: Mapping, mapped: dict) -> Any:
    """A mapping of the caller's own type, since models may rely on it; a plain dict if it cannot be built."""
    try:
        return type(tree)(mapped)  # type: ignore[call-arg]
    except TypeError:
        return mapped
