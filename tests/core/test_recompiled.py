"""What makes a compiling framework compile again and again is said, once in a warning and then in notes."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict

import pytest

from lnp.contract import recompiled


@pytest.fixture(autouse=True)
def _nothing_seen(monkeypatch):
    monkeypatch.setattr(recompiled, "_FUNCTIONS", OrderedDict())
    monkeypatch.setattr(recompiled, "_SHAPES", OrderedDict())


def made():
    return lambda x: x


def told(functions, measured="a model", shapes=(3,)):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes = recompiled.compiled(functions, measured, shapes, 32)
    return notes, [str(warning.message) for warning in caught]


def test_new_functions_of_the_same_code_are_said_from_the_third_repetition_on():
    found = [told([made(), None, 3]) for _ in range(6)]
    assert [len(notes) for notes, _ in found] == [0, 0, 0, 1, 1, 1]
    assert [len(warned) for _, warned in found] == [0, 0, 0, 1, 0, 0]
    assert "made.<locals>.<lambda> is a new function object, as 4 times before" in found[4][0][0]
    assert [len(told([functools.partial(made(), 1)])[0]) for _ in range(2)] == [1, 1]


def test_the_same_function_and_methods_are_not():
    function = made()
    assert not any(told([function])[0] for _ in range(9))
    assert not any(told([[].append, str.upper, "mse"])[0] for _ in range(9))


def test_other_shapes_are_said_from_sixteen_on():
    found = [told([], "a model", (size,)) for size in range(18)]
    assert [len(notes) for notes, _ in found] == [0] * 15 + [1] * 3
    assert [len(warned) for _, warned in found] == [0] * 15 + [1] + [0] * 2
    assert "for 17 different shapes" in found[16][0][0]
    assert "the last 32" in found[16][0][0]
    assert told([], "another model", (99,)) == ((), [])
    assert told([], "a model", (3,))[1] == []


def test_what_is_remembered_is_bounded():
    for model in range(258):
        told([], model)
    assert list(recompiled._SHAPES) == list(range(2, 258))
    memory = OrderedDict(a=1, b=2)
    recompiled.keep_last(memory, "c", 3, 2)
    assert memory == OrderedDict(b=2, c=3)
