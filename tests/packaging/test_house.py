"""The house stays one that a stranger can walk: short files and functions, docstrings, imports without circles."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE, LONGEST_FUNCTION = 320, 45
EXPLAINED, WITHOUT = 5, 0.3
"""Lines from which on a function counts, and the share of those that may do without a docstring."""
PACKAGES = {"lnp": ROOT / "lnp", **{path.name: path for path in sorted((ROOT / "backends").glob("lnp_*"))}}

pytestmark = pytest.mark.skipif(not (ROOT / "lnp").exists(), reason="The tests lie apart from the tree.")


@cache
def modules() -> dict[str, ast.Module]:
    """{dotted name: syntax tree} of all product code."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{name}.{node.name}", node)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(node) is not None
    start = node.body[0].end_lineno if documented else node.lineno - 1
    return node.end_lineno - start


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long


def test_functions_are_short():
    assert not {name: length(node) for name, node in functions() if length(node) > LONGEST_FUNCTION}


def test_private_functions_are_explained():
    private = [node for _, node in functions() if node.name.startswith("_") and not node.name.startswith("__")]
    long = [node for node in private if length(node) > EXPLAINED]
    silent = [node.name for node in long if ast.get_docstring(node) is None]
    assert len(silent) <= WITHOUT * len(long), f"{len(silent)} of {len(long)}: {silent}"


def imported(name: str, tree: ast.Module) -> set[str]:
    """The modules of the product that a module imports when it is imported itself."""
    found = set()
    lazy = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    lazy |= {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in lazy:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules() else node.module)
        elif isinstance(node, ast.Import) and id(node) not in lazy:
            found |= {alias.name for alias in node.names}
    return {other for other in found if other in modules() and other != name}


def test_imports_have_no_circle():
    graph = {name: imported(name, tree) for name, tree in modules().items()}
    left = dict(graph)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"In a circle, or above one: {sorted(left)}"


def test_the_core_imports_no_backend():
    arrows = {name: imported(name, tree) for name, tree in modules().items() if name.split(".")[0] == "lnp"}
    assert not [(name, other) for name, others in arrows.items() for other in others if other.startswith("lnp_")]
