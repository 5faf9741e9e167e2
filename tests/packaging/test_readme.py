"""README.md keeps its word: its Python blocks run, and its test command is the one that CI runs.

LNP_TEST_FRAMEWORK names the framework whose blocks are run (numpy by default). A block belongs to the framework that it
imports; one that imports none continues the block before it. The blocks of a framework run in order as one program, as
a reader would type them.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIBRARIES = {"transformers": "torch", "flax": "jax", "equinox": "jax", "haiku": "jax", "optax": "jax"}
TEST_COMMAND = "python3 -m venv .venv-test && .venv-test/bin/pip install nox && .venv-test/bin/nox"


def test_blocks_run(tmp_path):
    framework = os.environ.get("LNP_TEST_FRAMEWORK", "numpy")
    program = program_of(README, framework)
    assert program.strip(), f"README.md has no Python block for {framework}."
    script = tmp_path / "README.py"
    script.write_text(program, encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-P", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"Line numbers are README.md's.\n{done.stderr}"


def test_ci_runs_the_test_command():
    assert TEST_COMMAND in README.splitlines()
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == TEST_COMMAND


def test_blocks_are_sorted_by_framework():
    text = "\n".join(
        ["```python", "import torch", "```", "", "```python", "x = 1", "```", "```python", "import numpy", "```"]
    )
    assert program_of(text, "torch").splitlines() == ["", "import torch", "", "", "", "x = 1", "", "", "", ""]
    assert program_of(text, "numpy").splitlines()[8] == "import numpy"
    assert program_of(text, "jax").strip() == ""


def program_of(text: str, framework: str) -> str:
    """The framework's blocks, each on its own lines of the text, so that a traceback points into it."""
    lines = [""] * (text.count("\n") + 1)
    owner = "numpy"
    for block in re.finditer(r"^```python *\n(.*?)^``` *$", text, re.MULTILINE | re.DOTALL):
        owner = owner_of(block[1], owner)
        if owner == framework:
            first = text[: block.start(1)].count("\n")
            code = block[1].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


def owner_of(code: str, before: str) -> str:
    """The framework that the code imports; NumPy counts only where it is alone."""
    nodes = list(ast.walk(ast.parse(code)))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {module.partition(".")[0].removeprefix("lnp_") for module in modules}
    owners = {LIBRARIES.get(root, root) for root in roots} & {"torch", "jax", "tensorflow", "keras"}
    assert len(owners) < 2, f"This block of README.md imports {sorted(owners)} together:\n{code}"
    return owners.pop() if owners else "numpy" if "numpy" in roots else before
