"""What users pass: checked, and refused with what to do."""

import numpy as np
import pytest

from lnp.contract import validation

NAMES = ["head.weight", "head.bias", "body.weight"]


@pytest.mark.parametrize("batch", [(1, 2), [1, 2], ({"a": 1}, None)])
def test_unpack(batch):
    assert validation.unpack(batch) == tuple(batch)


@pytest.mark.parametrize(
    ("batch", "words"), [((1, 2, 3), "tuple of length 3"), (np.ones(2), "ndarray"), ([1], "length 1")]
)
def test_unpack_errors(batch, words):
    with pytest.raises(TypeError, match=f"{words}. Expected a pair.*Put the parts together"):
        validation.unpack(batch)


def test_outputs():
    assert validation.check_outputs([(4, 3)]) == 4
    assert validation.check_outputs([(4,), (4, 2, 2)]) == 4


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([], "no floating-point outputs.*Pass forward="),
        ([()], r"shapes \(\). Expected one sample axis.*Pass forward="),
        ([(4, 3), (5, 3)], r"\(4, 3\), \(5, 3\). Expected one sample axis"),
        ([(0, 3)], "batch is empty"),
        ([(4, 0)], "batch is empty"),
        ([(4, 3), (4, 0)], "batch is empty"),
        ([(4, 3), ()], r"\(4, 3\), \(\). Expected one sample axis"),
    ],
)
def test_outputs_errors(shapes, words):
    with pytest.raises(ValueError, match=words):
        validation.check_outputs(shapes)


def test_lengths():
    validation.check_lengths(4, (4, 2))
    validation.check_lengths(4, None)
    for targets in ((3,), ()):
        with pytest.raises(ValueError, match=r"outputs hold 4 samples.*Check that"):
            validation.check_lengths(4, targets)


def test_loss():
    validation.check_loss(())
    validation.check_loss((1,))
    with pytest.raises(ValueError, match=r"shape \(4,\). Expected a scalar. Average it"):
        validation.check_loss((4,))


@pytest.mark.parametrize(
    ("parameters", "chosen"),
    [
        (None, NAMES),
        ("head.*", NAMES[:2]),
        ("*.weight", [NAMES[0], NAMES[2]]),
        (lambda name: "bias" in name, [NAMES[1]]),
        ([NAMES[2], NAMES[0]], [NAMES[0], NAMES[2]]),
        (iter([NAMES[1]]), [NAMES[1]]),
    ],
)
def test_select(parameters, chosen):
    assert validation.select(iter(NAMES), parameters) == chosen


@pytest.mark.parametrize(
    ("names", "parameters", "words"),
    [
        ([], None, "no trainable parameter.*Unfreeze"),
        (NAMES, "tail.*", "picks no parameter.*head.weight"),
        (NAMES, lambda name: False, "picks no parameter"),
        (NAMES, ["head.weight", "tail"], r"\['tail'\].*does not have.*head.weight"),
        (NAMES, [], "picks no parameter"),
    ],
)
def test_select_errors(names, parameters, words):
    with pytest.raises(ValueError, match=words):
        validation.select(names, parameters)


def test_long_lists_of_names_are_cut():
    with pytest.raises(ValueError, match=r"layer7, \.\.\.") as error:
        validation.select([f"layer{i}" for i in range(30)], "none")
    assert "layer8" not in str(error.value)
    with pytest.raises(ValueError, match=r"layer7\b(?!,)"):
        validation.select([f"layer{i}" for i in range(8)], "none")
    with pytest.raises(ValueError, match=r"layer7, \.\.\."):
        validation.select([f"layer{i}" for i in range(9)], "none")
