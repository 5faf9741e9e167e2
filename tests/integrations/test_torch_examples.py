"""The examples of this framework train, are watched, and draw their figure."""

from __future__ import annotations

import runpy

import pytest

import lnp
from integrations.examples import EXAMPLES, run


@pytest.mark.parametrize(
    ("example", "name", "length"),
    [
        ("pytorch_loop", "pytorch", 40),
        ("lightning_callback", "lightning", 2),
        ("huggingface_trainer", "huggingface", 8),
    ],
)
def test_examples(example, name, length, tmp_path):
    run(example, name, tmp_path, length, falls=length > 10 or example == "lightning_callback")


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_a_ladder_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runpy.run_path(str(EXAMPLES / "checkpoint_ladder.py"))["main"](tmp_path, 2)
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    runs = [lnp.History.read(tmp_path / "histories" / f"width-{width}.jsonl") for width in (16, 32, 64)]
    assert [list(run["step"]) for run in runs] == [[1, 2]] * 3
    assert runs[0]["parameters"][0] < runs[1]["parameters"][0] < runs[2]["parameters"][0]
    assert [run["tokens_per_step"][0] for run in runs] == [16 * 32] * 3
    assert all(run["loss"][1] < run["loss"][0] for run in runs)
