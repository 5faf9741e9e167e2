"""Runs an example of docs/examples for a few steps, as its reader would, and looks at what it left."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lnp

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(example: str, name: str, folder: Path, length: int, falls: bool = True, layers: bool = True) -> lnp.History:
    """The history of the example's run; its figure is there too."""
    command = [sys.executable, "-P", str(EXAMPLES / f"{example}.py"), str(folder), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    history = lnp.History.read(folder / f"{name}.jsonl")
    assert history["step"][0] == 0
    assert len(history) > 3
    assert not falls or history["loss"][-1] < history["loss"][0]
    assert not layers or len(history.layers) > 1
    return history


def ladder(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]) -> list[lnp.History]:
    """The histories of a ladder of two steps, measured from its checkpoints; they are those of a tracker in the run."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(EXAMPLES)
    apart = importlib.import_module(example).main(folder, 2, widths)
    assert max(apart) < 1e-6
    assert (folder / "ladder.png").read_bytes().startswith(b"\x89PNG")
    runs = [lnp.History.read(folder / "histories" / f"width-{width}.jsonl") for width in widths]
    assert [list(run["step"]) for run in runs] == [[1, 2]] * len(widths)
    assert all(run["loss"][1] < run["loss"][0] for run in runs)
    return runs
