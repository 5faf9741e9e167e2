"""The graph that autograd has recorded, walked from a result back to what it was computed from."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch

Edge = tuple[Any, int]
"""(operation, which of its results), or ("leaf", id of a tensor) for what no operation has made."""


def edge(tensor: torch.Tensor) -> Edge:
    """Where a tensor stands in the graph."""
    return ("leaf", id(tensor)) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def sources(found: Edge) -> list[Edge]:
    """What an operation took."""
    node = found[0]
    if node == "leaf":
        return []
    return [
        ("leaf", id(following.variable)) if hasattr(following, "variable") else (following, number)
        for following, number in node.next_functions
        if following is not None
    ]


def reached(starts: Iterable[Edge], ends: Container[Edge]) -> tuple[list[Edge], bool]:
    """(the ends that are met first, whether anything that is differentiated is reached past them)."""
    stack, visited, met, past = list(starts), set(), [], False
    while stack:
        here = stack.pop()
        if here in visited:
            continue
        visited.add(here)
        if here in ends:
            met.append(here)
        elif here[0] == "leaf":
            past = True
        else:
            stack.extend(sources(here))
    return met, past
