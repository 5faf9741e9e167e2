"""docs/support.md marks nothing that no test covers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = ("torch", "jax", "tensorflow", "keras")


def entries() -> list[tuple[str, str]]:
    """(framework, name) of every field of the table."""
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:6] for line in text.splitlines() if line.startswith("|")]
    return [
        (framework, name)
        for row in rows
        for framework, field in zip(COLUMNS, row, strict=True)
        for name in re.findall(r"`(.+?)`", field)
    ]


@pytest.mark.parametrize("framework", COLUMNS)
def test_every_entry_names_a_test(framework):
    files = (ROOT / "tests").glob(f"*/test_{framework}_*.py")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = [name for column, name in entries() if column == framework]
    assert len(named) > 20
    assert [n for n in named if f'"{n}":' not in tests and f"def {n}(" not in tests] == []
