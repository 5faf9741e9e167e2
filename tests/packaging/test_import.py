"""What `import lnp` costs and brings along, in processes of their own, and what it offers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import entry_points, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import lnp

HEAVY = "torch jax tensorflow keras flax equinox haiku optax transformers matplotlib pandas sklearn rich scipy pytest"
DECOMPOSE = """
import numpy, lnp, lnp_numpy
model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
d = lnp.decompose(model, (numpy.eye(2), numpy.ones((2, 1))), by_layer=True)
str(d), d.to_dict(), d._repr_html_()
"""
BROUGHT = """
import sys, numpy
before = set(sys.modules)
import lnp
print(*(name for name in set(sys.modules) - before if name.partition(".")[0] != "lnp"))
"""


def run(code: str) -> str:
    """What the code prints in a new interpreter that does not look into the current folder."""
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_brings_little_beyond_numpy():
    """Small modules of the standard library, and not the large one that reads what is installed."""
    brought = run(BROUGHT).split()
    assert len(brought) < 60
    assert "importlib.metadata" not in brought


@pytest.mark.parametrize("code", ["import lnp", DECOMPOSE], ids=["import", "decompose"])
def test_no_framework_is_loaded(code):
    assert run(f"{code}\nimport sys\nprint(*sorted(set({HEAVY.split()}) & set(sys.modules)))").split() == []


def test_each_backend_of_an_installed_framework_loads():
    entries = {entry.name: entry for entry in entry_points(group="lnp.backends") if entry.dist.name == "lnp"}
    assert set(entries) == {"numpy", "torch", "jax", "tensorflow", "keras"}
    for name in filter(find_spec, entries):
        backend = entries[name].load()
        assert all(callable(getattr(backend, verb)) for verb in ("accepts", "evaluate", "linearize")), name


@pytest.mark.parametrize("framework", ["torch", "jax", "tensorflow", "keras"])
def test_a_missing_framework_is_named_with_the_way_to_install_it(framework):
    # A null entry in sys.modules makes the import fail as if nothing were installed.
    code = (
        f"import sys; sys.modules[{framework!r}] = None\n"
        f"import lnp\n"
        f"try: lnp.load({framework!r})\n"
        f"except ImportError as error: print(error)"
    )
    assert f"pip install 'lnp[{framework}]'" in run(code)


@pytest.mark.parametrize("name", lnp.__all__)
def test_public_names_exist_and_are_documented(name):
    documented = inspect.getdoc(getattr(lnp, name)) or ""
    # A dataclass without a docstring gets its signature as one.
    assert documented
    assert not documented.startswith(f"{name}(")


def test_every_module_of_the_tree_is_shipped():
    root = Path(__file__).parents[2]
    if not (root / "lnp").exists():
        pytest.skip("The tests lie apart from the tree.")
    for tree in (root / "lnp", *(path.parent for path in root.glob("backends/*/__init__.py"))):
        shipped = Path(find_spec(tree.name).origin).parent
        assert python_files(shipped) == python_files(tree), tree.name


def python_files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*.py")}


def test_licence_and_types_are_shipped():
    assert metadata("lnp")["License-Expression"] == "Apache-2.0"
    assert metadata("lnp").get_all("License-File") == ["LICENSE"]
    assert (Path(lnp.__file__).parent / "py.typed").exists()
