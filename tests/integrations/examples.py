"""Runs an example of docs/examples for a few steps, as its reader would, and looks at what it left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lnp

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(example: str, name: str, folder: Path, length: int, falls: bool = True) -> lnp.History:
    """The history of the example's run; its figure is there too."""
    command = [sys.executable, "-P", str(EXAMPLES / f"{example}.py"), str(folder), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    history = lnp.History.read(folder / f"{name}.jsonl")
    assert history["step"][0] == 0
    assert len(history) > 3
    assert not falls or history["loss"][-1] < history["loss"][0]
    assert len(history.layers) > 1
    return history
