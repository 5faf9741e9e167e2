"""The names of a structure's leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lnp.contract.trees import children


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a structure by their dotted path; where two have the same one, they are numbered.

    >>> named({"layer": [1, 2], "scale": 3})
    {'layer.0': 1, 'layer.1': 2, 'scale': 3}
    >>> named({"layer": {"w": 1}, "layer.w": 2})
    {'layer.w': 1, 'layer.w~2': 2}
    """
    found: dict[str, Any] = {}
    for path, leaf in _paths(tree, ""):
        same = sum(other == path or other.rpartition("~")[0] == path for other in found)
        found[f"{path}~{same + 1}" if path in found else path] = leaf
    return found


def _paths(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) pairs."""
    inner = children(tree)
    if inner is None:
        yield prefix or "parameters", tree
        return
    if len(inner) < len(tree if isinstance(tree, Mapping) else inner):
        raise ValueError(
            f"The parameters have keys that are the same as text: {list(tree)}. Expected keys that differ as text. "
            "Give them other names."
        )
    for key, child in inner.items():
        yield from _paths(child, f"{prefix}.{key}" if prefix else key)
