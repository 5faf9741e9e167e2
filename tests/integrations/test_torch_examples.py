"""The examples of this framework train, are watched, and draw their figure."""

from __future__ import annotations

import pytest

from integrations.examples import run


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
