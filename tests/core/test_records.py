"""Lines of a history's file: which are sealed, which records are by the schema."""

from __future__ import annotations

import pytest

from lnp.tracking import records
from lnp.tracking.records import LARGEST, MARK, decode_all, encode, fits, is_sealed


def test_a_line_whose_seal_is_written_otherwise_is_not_sealed():
    line = encode({"step": 3, "loss": 0.5}).rstrip(b"\n")
    assert is_sealed(line)
    assert not is_sealed(line.replace(MARK, b', "crc33": "'))
    assert not is_sealed(line[:-2] + b'"]')


def test_nested_values_have_no_meaning_that_was_sealed():
    assert not records._has_meaning({"step": 0, "loss": [1.0]}, "00000000")


def test_no_lines_have_no_seal():
    assert decode_all([], False) == ([], False)


@pytest.mark.parametrize(
    ("column", "values", "fitting"),
    [
        ("step", (0, 3), True),
        ("step", (3, -1), False),
        ("step", (LARGEST, 1), False),
        ("loss", (1, 10**309), False),
        ("loss", (1, -(10**309)), False),
        ("loss", (0.5, 1, None, "NaN"), True),
        ("loss", (0.5, True), False),
        ("mine", (1, 2.0, "a", True, None), True),
        ("mine", (1, "a"), True),
        ("mine", (1, [2]), False),
    ],
)
def test_what_may_be_in_a_column(column, values, fitting):
    rows = [{"step": 0} | {column: value} for value in values]
    assert fits(rows) is fitting
