"""The examples of this framework train, are watched, and draw their figure."""

from __future__ import annotations

import pytest

from integrations.examples import run


@pytest.mark.parametrize(
    ("example", "name", "length"),
    [
        ("tensorflow_loop", "tensorflow", 40),
    ],
)
def test_examples(example, name, length, tmp_path):
    run(example, name, tmp_path, length)
