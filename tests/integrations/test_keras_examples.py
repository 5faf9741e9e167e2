"""The examples of this framework train, are watched, and draw their figure."""

from __future__ import annotations

import pytest

from integrations.examples import ladder, run


@pytest.mark.parametrize(
    ("example", "name", "length"),
    [
        ("keras_fit", "keras", 1),
    ],
)
def test_examples(example, name, length, tmp_path):
    run(example, name, tmp_path, length)


@pytest.mark.filterwarnings("ignore")  # Keras's own
def test_a_ladder_of_checkpoints(tmp_path, monkeypatch):
    (run,) = ladder("keras_ladder", tmp_path, monkeypatch, (4,))
    assert run["parameters"][0] > 0
