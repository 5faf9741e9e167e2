"""Columns of a history: what becomes of values of several types, in one part and in several that are joined."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
from lnp.tracking.columns import _concatenated, as_array, expected


def objects(*values):
    return np.array(values, dtype=object)


def test_texts_of_numbers_that_are_not_finite_are_numbers_among_numbers_alone():
    column = as_array([1, 2.0, "NaN", None])
    assert column.dtype == np.float64
    np.testing.assert_array_equal(column, [1.0, 2.0, np.nan, np.nan])
    assert as_array(["NaN", [1]]).tolist() == ["NaN", [1]]


def test_parts_that_hold_nothing_stay_so():
    assert _concatenated([objects(None), objects(None, None)]).tolist() == [None] * 3
    assert _concatenated([np.array([1.0]), objects(None, "a")]).tolist() == [1.0, None, "a"]
    np.testing.assert_array_equal(_concatenated([np.array([1.0]), objects(None)]), [1.0, np.nan])


def test_what_is_said_of_a_column_that_is_not_there():
    assert expected(["step", "chi_pos"], "chi_poss") == "Did you mean chi_pos? Expected one of step, chi_pos."
    assert expected(["step"], "other") == "Expected one of step."


@pytest.mark.parametrize(
    ("steps", "text"), [([], "History(0 rows, 0 layers)"), ([3, 7], "History(2 rows, steps 3 to 7, 0 layers)")]
)
def test_a_history_in_one_line(steps, text):
    assert repr(lnp.History([{"step": step} for step in steps])) == text
