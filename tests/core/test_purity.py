"""The core names no framework, and its record stays small."""

import ast
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import lnp
from lnp.contract.linearization import Linearization

FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "equinox", "tensorflow", "keras", "lnp_torch", "lnp_jax", "lnp_numpy"}
FILES = sorted(Path(lnp.__file__).parent.rglob("*.py"))
MOST_CALLABLES = 12


def named(source):
    """Modules that are imported, and every identifier."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_framework_is_named(path):
    assert not named(path.read_text(encoding="utf-8")) & FRAMEWORKS


@pytest.mark.parametrize(
    "source", ["import torch.nn", "from jax import numpy", "torch.ones(1)", "xp.torch", "def f():\n import keras"]
)
def test_names_are_seen(source):
    assert named(source) & FRAMEWORKS


def test_the_record_has_few_callables():
    hints = typing.get_type_hints(Linearization)
    callables = [field.name for field in fields(Linearization) if takes_calls(hints[field.name])]
    assert {"vjp", "signs", "inner_products", "jvp"} <= set(callables)
    assert len(callables) <= MOST_CALLABLES


def takes_calls(hint):
    return hint is Callable or any(
        typing.get_origin(part) is Callable or part is Callable for part in (hint, *typing.get_args(hint))
    )
