"""The files around the code agree with it, and name nothing that only one machine has."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import lnp

ROOT = Path(__file__).parents[2]
# In pieces, so that this file does not name them either.
HOSTS = ["pypi" + ".org", "files." + "pythonhosted", "download." + "pytorch.org", "conda." + "anaconda.org"]
HOMES = re.compile(r"(?<![\w.~-])/(root|home|work|Users|opt|mnt)/\w")


def test_one_version():
    changelog = re.search(r"^## \[(\S+)\]", read("CHANGELOG.md"), re.MULTILINE)[1]
    citation = re.search(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE)[1]
    assert {lnp.__version__, version("lnp"), changelog, citation} == {lnp.__version__}


def test_no_file_names_a_package_index_or_a_folder_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if HOMES.search(line) or any(host in line for host in HOSTS)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["see " + "/home" + "/me/lnp", "'" + "/root" + "/v'"])
def test_folders_of_one_machine_are_recognised(line):
    assert HOMES.search(line)


def test_thorough_tests_are_there():
    lines = (ROOT / "tests/thorough.txt").read_text(encoding="utf-8").splitlines()
    named = [re.split(r"\[| @", line)[0].split("::") for line in lines if line and not line.startswith("#")]
    gone = [f"{path}::{name}" for path, name in named if f"def {name}(" not in read(f"tests/{path}")]
    assert named, "it lists none"
    assert not gone, gone


def test_every_test_belongs_to_a_session():
    # noxfile.py runs three folders, one of them on GPUs, and what is named for a backend or for the parity of two.
    named = re.compile(
        r"(core|packaging|gpu)/|\w+/test_(numpy|torch|jax|tensorflow|keras)|properties/test_parity(_layers)?\.py"
    )
    tests = [path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert [path for path in tests if not named.match(path)] == []


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def text_files() -> list[Path]:
    """What git tracks or would track; everything where the tree is no repository, as in an unpacked sdist."""
    if (ROOT / ".git").exists():
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, capture_output=True, check=True, encoding="utf-8").stdout.split("\0")
        paths = [ROOT / name for name in names if name]
    else:
        paths = [path for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_name_what_they_need(path):
    text = path.read_text(encoding="utf-8")
    described = text.partition('"""')[2].partition('"""')[0]
    needed = re.search(r"^ *pip install '\.\[(.+?)\]'(.*)$", described, re.MULTILINE)
    assert needed, "its docstring names no packages"
    named = {*needed[1].split(","), *needed[2].split()}
    imported = {line.split()[1].partition(".")[0] for line in text.splitlines() if re.match(r"(import|from) \w", line)}
    packages = {"sklearn": "scikit-learn", "torch": "torch", "jax": "jax", "optax": "optax", "flax": "flax"}
    packages |= {name: name for name in ("tensorflow", "keras", "lightning", "transformers")}
    brought = {"torch"} if named & {"lightning", "transformers"} else set()  # by these extras
    assert {packages[name] for name in imported & set(packages)} <= named | brought
