"""The examples of this framework train, are watched, and draw their figure."""

from __future__ import annotations

import importlib

import pytest

import lnp
from integrations.examples import EXAMPLES, ladder, run


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


def test_the_numpy_example(tmp_path):
    """Here, for the core's session has no Matplotlib."""
    history = run("numpy_loop", "numpy", tmp_path, 200, layers=False)
    assert history["chi_pos"][-1] < 0.5 * history["chi_pos"][0]


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_a_ladder_of_checkpoints(tmp_path, monkeypatch):
    runs = ladder("checkpoint_ladder", tmp_path, monkeypatch, (8, 16))
    assert runs[0]["parameters"][0] < runs[1]["parameters"][0]
    assert [run["tokens_per_step"][0] for run in runs] == [16 * 32] * 2
    assert "ladder" in (tmp_path / "ladder.html").read_text()


def test_two_runs_are_put_next_to_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("two_runs").main(tmp_path, 20)
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frozen / all layers")]
    assert len(titles) == 3
    one, other = (lnp.History.read(path) for path in sorted(tmp_path.glob("*.jsonl")))
    assert one["loss"][0] == other["loss"][0]
    assert one["step"].tolist() == other["step"].tolist()
