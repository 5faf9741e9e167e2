"""What is no array is named, and an error of the user's own says what the model was called with."""

import datetime
import types

import numpy as np
import pytest

from lnp.contract.foreign import tell_inputs, why_foreign

X, Y = np.ones((3, 2)), np.zeros(3)
PAIR = X, Y


def told(batch, error=None):
    error = RuntimeError("mine") if error is None else error
    tell_inputs(batch, error)
    return getattr(error, "__notes__", [])


def test_inputs_and_targets_are_described():
    (text,) = told((PAIR,))
    assert text.startswith("lnp had called the model with inputs ndarray (3, 2) of float64, for targets ndarray (3,)")
    assert "batches" not in text
    assert told(((X, Y, "weights"),)) == told(((X, Y),)) == told(((X, Y), "more"))


@pytest.mark.parametrize("batches", [(), (X,), ({"x": X, "y": Y},), ((X,),)])
def test_what_is_no_pair_is_not_described(batches):
    assert told(batches) == []


def test_a_list_of_batches_is_known_by_its_pairs():
    (text,) = told(([PAIR, PAIR, PAIR],))
    assert text.endswith("If these are 3 batches, pass batches=3.")
    assert "pass batches" not in told((([X, Y], Y),))[0]
    assert "pass batches" not in told((([X, Y, X], [X, Y]),))[0]


def test_an_error_is_told_once():
    error = RuntimeError("mine")
    told((PAIR,), error)
    assert len(told((PAIR,), error)) == 1


def test_of_long_containers_six_are_shown():
    many = {str(number): X for number in range(9)}
    (text,) = told(((many, (X,) * 9),))
    assert text.count("ndarray") == 12
    assert "5: ndarray" in text
    assert "6: ndarray" not in text


FOREIGN = {
    "a list of 3 numbers": [1, 2.0, 3],
    "a list of 2 texts": ["a", b"b"],
    "nested lists of 2 rows": [[1, 2], [3, 4]],
    "a str": "text",
    "a numpy.ndarray of shape (2,) and dtype <U1": np.array(["a", "b"]),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_foreign_is_named(what):
    def named(inputs):
        return str(why_foreign(((inputs, Y),), None, RuntimeError("mine")))

    for inputs in (FOREIGN[what], {"x": X, "ids": FOREIGN[what]}, (X, FOREIGN[what])):
        assert named(inputs).startswith(f"The inputs are {what}, and measuring them failed: mine.")


@pytest.mark.parametrize("inputs", [[1, X], [X, "a"], [X, [1, X]], [], X, datetime.date(2000, 1, 1)])
def test_what_has_something_else_first_is_named_by_its_parts_or_not_at_all(inputs):
    said = why_foreign(((inputs, Y),), None, RuntimeError("mine"))
    assert said is None or said.startswith("The inputs are a str")


def test_rows_that_are_not_all_lists_are_named_one_by_one():
    said = why_foreign((([[1, 2], X], Y),), None, RuntimeError("mine"))
    assert said.startswith("The inputs are a list of 2 numbers, and measuring them failed")


def test_arrays_of_numpy_are_foreign_where_a_backend_says_how_to_convert_them():
    backend = types.SimpleNamespace(CONVERSION="framework.array(values)")
    said = why_foreign(((X, Y),), backend, RuntimeError("mine"))
    assert said.startswith("The inputs are a numpy.ndarray of shape (3, 2) and dtype float64")
    assert said.endswith("for example by framework.array(values).")
    assert why_foreign(((X, Y),), None, RuntimeError("mine")) is None


def test_a_data_frame_is_named():
    pandas = pytest.importorskip("pandas")
    said = why_foreign(((pandas.DataFrame(X), Y),), None, RuntimeError("mine"))
    assert said.startswith("The inputs are a pandas.DataFrame, and")
