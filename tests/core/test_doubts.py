"""Losses that are probably not meant get a note, and right uses get none; and which loss it was is told."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.losses import doubts, kinds
from lnp.losses.evidence import IN_WORDS, LossInputs, described, evidence

RNG = np.random.default_rng(0)
N, CLASSES = 24, 4
LABELS = RNG.integers(0, CLASSES, N)
ONE_HOT = np.eye(CLASSES)[LABELS]
LOGITS = RNG.normal(0, 1.5, (N, CLASSES))
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
SMOOTHED = 0.9 * ONE_HOT + 0.1 / CLASSES
ONE = RNG.normal(0, 1, (N, 1))
SIGMOID = 1 / (1 + np.exp(-RNG.normal(0, 2, (N, 1))))
BINARY = (RNG.random((N, 1)) < 0.5) * 1.0


@pytest.mark.parametrize(("away", "same"), [(0.9e-3, True), (1.1e-3, False)])
def test_a_gradient_has_a_form_up_to_a_thousandth(away, same):
    assert doubts._proportional(np.array([2.0, 2 * away]), np.array([1.0, 0.0])) is same


def test_classes_are_on_the_last_axis_where_nothing_is_said():
    assert LossInputs(np.zeros((2, 5, 3)), np.zeros((2, 5)), True).classes == 3


def notes(outputs, targets, loss=None):
    """Of a model that gives these outputs."""
    model = lnp_numpy.OperatorModel(outputs, np.eye(outputs.size))
    found = lnp.decompose(model, (np.zeros((len(outputs), 1)), targets), loss).notes
    return [note for note in found if note in ALL]


ALL = [text for name, text in vars(doubts).items() if name.isupper() and isinstance(text, str)]


def softmax(f):
    return np.exp(f) / np.exp(f).sum(axis=-1, keepdims=True)


def of_logits(f, y):
    """A cross-entropy of logits of the user's own, with its gradient."""
    y = y if y.ndim == f.ndim else np.eye(f.shape[-1])[y]
    return -np.mean(np.sum(y * np.log(softmax(f)), axis=-1)), (softmax(f) - y) / len(f)


def of_probabilities(f, y):
    y = np.eye(f.shape[-1])[y]
    return -np.mean(np.sum(y * np.log(f), axis=-1)), -y / f / len(f)


def of_binary_logits(f, y):
    y = y.reshape(f.shape)
    return np.mean(np.logaddexp(0, f) - y * f), (1 / (1 + np.exp(-f)) - y) / f.size


def broadcast(f, y):
    """What (f - y) ** 2 makes of (N, 1) and (N,)."""
    return np.mean((f - y) ** 2), 2 * np.mean(f - y, axis=1, keepdims=True) / len(f)


def aligned(f, y):
    y = y.reshape(f.shape)
    return np.mean((f - y) ** 2), 2 * (f - y) / f.size


def brier(f, y):
    return aligned(f, np.eye(f.shape[-1])[y])


SUSPICIOUS = {
    "probabilities, inferred": (PROBABILITIES, LABELS, None, doubts.TWICE),
    "probabilities, named": (PROBABILITIES, SMOOTHED, "cross_entropy", doubts.TWICE),
    "probabilities, own loss": (PROBABILITIES, LABELS, of_logits, doubts.TWICE),
    "probabilities, own loss of soft targets": (PROBABILITIES, SMOOTHED, of_logits, doubts.TWICE),
    "sigmoid": (SIGMOID, BINARY, "binary_cross_entropy", doubts.TWICE_BINARY),
    "sigmoid, own loss": (SIGMOID, BINARY, of_binary_logits, doubts.TWICE_BINARY),
    "sigmoid, own loss, flat": (SIGMOID, BINARY[:, 0], of_binary_logits, doubts.TWICE_BINARY),
    "one-hot, inferred": (LOGITS, ONE_HOT, None, doubts.ONE_HOT),
    "one-hot along the last axis, inferred": (np.stack([LOGITS] * 2), np.stack([ONE_HOT] * 2), None, doubts.ONE_HOT),
    "one-hot along the second axis, inferred": (
        np.stack([LOGITS, LOGITS], axis=2),
        np.stack([ONE_HOT, ONE_HOT[::-1]], axis=2),
        None,
        doubts.ONE_HOT,
    ),
    "indices as floats": (ONE, LABELS[:, None] * 1.0, None, doubts.WHOLE_NUMBERS),
    "no soft labels": (
        LOGITS,
        ONE_HOT + np.eye(CLASSES)[(LABELS + 1) % CLASSES],
        "cross_entropy",
        doubts.NO_SOFT_LABELS,
    ),
    "labels -1 and 1": (ONE, 2 * BINARY - 1, "binary_cross_entropy", doubts.NO_BINARY_LABELS),
    "one column": (ONE[:6], np.zeros(6, int), None, doubts.ONE_COLUMN),
    "one label": (LOGITS, np.full(N, 2), None, doubts.CONSTANT),
    "eight samples of one label": (LOGITS[:8], np.full(8, 2), None, doubts.CONSTANT),
    "one number": (ONE, np.full((N, 1), 1.5), None, doubts.CONSTANT),
    "broadcast": (ONE, RNG.normal(0, 1, N), broadcast, doubts.PAIRS),
    "broadcast labels": (ONE, LABELS, broadcast, doubts.PAIRS),
}
RIGHT = {
    "logits": (LOGITS, LABELS, None),
    "small logits": (LOGITS / 100, LABELS, None),
    "zeros": (0 * LOGITS, LABELS, None),
    "logarithms": (np.log(PROBABILITIES), LABELS, None),
    "label smoothing": (LOGITS, SMOOTHED, "cross_entropy"),
    "one-hot, named": (LOGITS, ONE_HOT, "cross_entropy"),
    "rows that are left out": (LOGITS, ONE_HOT * (np.arange(N) % 3 > 0)[:, None], "cross_entropy"),
    "ignored labels": (LOGITS, np.where(np.arange(N) % 3, LABELS, -100), None),
    "own loss of logits": (LOGITS, LABELS, of_logits),
    "own loss of probabilities": (PROBABILITIES, LABELS, of_probabilities),
    "Brier score": (PROBABILITIES, ONE_HOT, "mse"),
    "Brier score, own": (PROBABILITIES, LABELS, brier),
    "Brier score of equal probabilities": (np.full((N, CLASSES), 0.25), LABELS, brier),
    "one-hot, regression named": (LOGITS, ONE_HOT, "mse"),
    "0 and 1, one output": (ONE, BINARY, None),
    "0 and 1, probabilities": (SIGMOID, BINARY, None),
    "several labels": (LOGITS, (RNG.random((N, CLASSES)) < 0.4) * 1.0, "binary_cross_entropy"),
    "several labels, small logits": (
        np.abs(LOGITS) / 100,
        (RNG.random((N, CLASSES)) < 0.4) * 1.0,
        "binary_cross_entropy",
    ),
    "regression": (ONE, RNG.normal(0, 1, (N, 1)), None),
    "regression to probabilities": (LOGITS, PROBABILITIES, None),
    "counts, regression named": (ONE, LABELS[:, None] * 1.0, "mse"),
    "one number, regression named": (ONE, np.full((N, 1), 1.5), "mse"),
    "seven samples of one label": (LOGITS[:7], np.full(7, 2), None),
    "residuals": (ONE, np.zeros((N, 1)), None),
    "ones of a discriminator": (ONE, np.ones((N, 1)), "binary_cross_entropy"),
    "flat targets, aligned": (ONE, RNG.normal(0, 1, N), aligned),
    "flat labels, aligned": (ONE, LABELS, aligned),
    "tokens": (np.stack([LOGITS, LOGITS]), np.stack([LABELS, LABELS]), None),
    "one sample": (LOGITS[:1], LABELS[:1], None),
}


@pytest.mark.parametrize("case", SUSPICIOUS)
def test_suspicious(case):
    *given, expected = SUSPICIOUS[case]
    assert expected in notes(*given)


@pytest.mark.parametrize("case", RIGHT)
def test_no_false_alarm(case):
    assert notes(*RIGHT[case]) == []


@pytest.mark.parametrize(("takes", "outputs", "expected"), [
    ("probabilities", LOGITS, (doubts.NO_PROBABILITIES,)),
    ("probabilities", PROBABILITIES, ()),
    ("probabilities", ONE, (doubts.ONE_COLUMN,)),
    ("binary_probabilities", ONE, (doubts.NO_PROBABILITIES,)),
    ("binary_probabilities", SIGMOID, ()),
    ("log_probabilities", LOGITS, (doubts.NO_LOGARITHMS,)),
    ("log_probabilities", np.log(PROBABILITIES), ()),
    ("log_probabilities", PROBABILITIES, (doubts.NO_LOGARITHMS,)),
])  # fmt: skip
def test_losses_of_probabilities(takes, outputs, expected):
    given = LossInputs(outputs, LABELS, True, takes)
    assert doubts.doubts(evidence(np, given, outputs)) == expected


SUM = doubts.SUM
SIXTEEN = np.linspace(0, 0.5, 16).reshape(8, 2)
EDGES = [
    # (what is looked for, its arrays, what is found): on either side of each bound, and rows of which one is wrong
    ("probabilities", [[[-SUM, 1 + SUM]]], ""),
    ("probabilities", [[[0.5, 0.5], [-0.006, 0.9]]], doubts.NO_PROBABILITIES),
    ("probabilities", [[[0.5, 0.5], [0.1, 1.006]]], doubts.NO_PROBABILITIES),
    ("log_probabilities", [np.log([[0.5, 0.492], [0.5, 0.508]])], ""),
    ("log_probabilities", [np.log([[0.5, 0.5], [0.5, 0.488]])], doubts.NO_LOGARITHMS),
    ("log_probabilities", [np.log([[0.5, 0.5], [0.5, 0.512]])], doubts.NO_LOGARITHMS),
    ("cross_entropy", [[[0.5, 0.5 + SUM / 2], [0, 1]]], doubts.TWICE),
    ("cross_entropy", [[[0.5, 0.5], [0.5, 0.506]]], ""),
    ("cross_entropy", [[[0.5, 0.5], [0.5, 0.494]]], ""),
    ("cross_entropy", [[[0.5, 0.5], [1.001, -0.001]]], ""),
    ("cross_entropy", [[[1.0], [1.0]]], ""),
    ("binary_cross_entropy", [-SIXTEEN, [[0.0, 1.0]]], ""),
    ("binary_cross_entropy", [-SIXTEEN, [[0.0, 1.5]]], doubts.NO_BINARY_LABELS),
    ("binary_cross_entropy", [-SIXTEEN, [[-0.1, 1.0]]], doubts.NO_BINARY_LABELS),
    ("binary_cross_entropy", [SIXTEEN], doubts.TWICE_BINARY),
    ("binary_cross_entropy", [2 * SIXTEEN], doubts.TWICE_BINARY),
    ("binary_cross_entropy", [2.1 * SIXTEEN], ""),
    ("binary_cross_entropy", [0.9 * SIXTEEN], ""),
    ("binary_cross_entropy", [1.1 * SIXTEEN - 0.01], ""),
    ("binary_cross_entropy", [SIXTEEN[:, 1:]], ""),
    ("class_probabilities", [[[0.5, 0.492], [0.5, 0.508], [0, 0], [1, 0]]], ""),
    ("class_probabilities", [[[0.5, 0.5], [0.5, 0.488]]], doubts.NO_SOFT_LABELS),
    ("class_probabilities", [[[0.5, 0.5], [0.5, 0.512]]], doubts.NO_SOFT_LABELS),
    ("class_probabilities", [[[0.5, 0.5], [1.5, -0.5]]], doubts.NO_SOFT_LABELS),
    ("one_hot", [[[1, 0, 0], [0, 1, 0]]], doubts.ONE_HOT),
    ("one_hot", [[[1, 1], [1, 1]], [[1, 0], [0, 1]]], doubts.ONE_HOT),
    ("one_hot", [[[1, 0]]], ""),
    ("one_hot", [[[1, 0], [0.5, 0.5]]], ""),
    ("one_hot", [[[1, 0], [1, 1]]], ""),
    ("whole_numbers", [[[0], [1], [2], [0], [1], [2]]], doubts.WHOLE_NUMBERS),
    ("whole_numbers", [[[999], [1], [2], [0], [1], [2], [1], [2]]], doubts.WHOLE_NUMBERS),
    ("whole_numbers", [[[1000], [1], [2], [0], [1], [2], [1], [2]]], ""),
    ("whole_numbers", [[[-1], [1], [2], [-1], [1], [2]]], ""),
    ("whole_numbers", [[[0], [1], [2.5], [0], [1], [2.5]]], ""),
    ("whole_numbers", [[[0], [1], [0], [0], [1], [1]]], ""),
    ("whole_numbers", [[[0], [1], [2], [0], [1]]], ""),
    ("constant", [True, [0, 0]], doubts.CONSTANT),
    ("constant", [False, [0, 0]], ""),
    ("constant", [True, [-100, -100]], ""),
    ("constant", [True, [[0, 1], [0, 1]]], doubts.CONSTANT),
    ("constant", [True, [[0, 0], [0, 0]]], ""),
]


LABELLED = np.array([0, 1, CLASSES, -100, 2, 0, 3])
PICKED = np.arange(CLASSES) == LABELLED[:, None]
COUNTED = PICKED.any(axis=1, keepdims=True)
ROWS = PROBABILITIES[: len(LABELLED)]
TAKEN_TWICE = COUNTED * (softmax(ROWS) - PICKED)
F = np.arange(6.0)[:, None]
EDGES += [
    ("gradient", [ROWS, TAKEN_TWICE, LABELLED], doubts.TWICE),
    ("gradient", [ROWS, 1e-4 * TAKEN_TWICE, LABELLED], doubts.TWICE),
    ("gradient", [ROWS[:1], TAKEN_TWICE[:1], LABELLED[:1]], doubts.TWICE),
    ("gradient", [np.eye(3), np.zeros((3, 3)), np.arange(3)], ""),
    ("gradient", [ROWS[:5], TAKEN_TWICE[:5], LABELLED], doubts.TWICE),
    ("gradient", [ROWS, softmax(ROWS) - np.eye(CLASSES)[0], np.zeros(9)], doubts.TWICE),
    ("gradient", [ROWS[3:4], TAKEN_TWICE[3:4], LABELLED[3:4]], ""),
    ("gradient", [ROWS, 1.01 * TAKEN_TWICE + 0.01, LABELLED], ""),
    ("pairs", [F, F - 2, [1, 2, 3, 2], 2], doubts.PAIRS),
    ("pairs", [F, F - 1.5, np.full(6, 1.5), 1.5], ""),
    ("pairs", [F, F - F[::-1], F[::-1, 0], 2.5], ""),
]


@pytest.mark.parametrize("case", range(len(EDGES)), ids=[name for name, *_ in EDGES])
def test_bounds(case):
    name, arrays, expected = EDGES[case]
    assert doubts.doubts({name: tuple(map(np.asarray, arrays))}) == ((expected,) if expected else ())


@pytest.mark.parametrize("shape", [(3, 5, 7), (40, 6), (2, 4, 3, 3), (9, 2, 200), (50, 70_000)])
@pytest.mark.parametrize("axis", [-1, 1])
def test_rows_of_outputs_and_labels_belong_together(shape, axis):
    """Labels say which row they are of; few numbers come to the host, of all samples where they are few."""
    labels = np.arange(np.prod(shape) // shape[axis]).reshape(np.delete(shape, axis))
    outputs = np.broadcast_to(np.expand_dims(labels, axis), shape).astype(float)
    rows, _, kept = evidence(np, LossInputs(outputs, labels, True, axis=axis), outputs)["gradient"]
    some = min(len(rows), len(kept))
    assert some >= 2
    assert (rows[:some] == kept[:some, None]).all()
    assert rows.shape[1] == shape[axis]
    assert rows.size <= max(2**14, 2 * shape[axis])


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((20, 6), -1, range(20)),
        ((70, 6), 1, range(0, 64, 2)),
        ((8, 64, 5), -1, [64 * n + s for n in range(0, 8, 2) for s in range(0, 64, 8)]),
        ((8, 5, 64), 1, [64 * n + s for n in range(0, 8, 2) for s in range(0, 64, 8)]),
        ((2, 3, 5), 2, range(6)),
        ((3, 9000), 1, range(2)),
    ],
)
def test_rows_are_evenly_spaced(shape, axis, expected):
    labels = np.arange(np.prod(shape) // shape[axis]).reshape(np.delete(shape, axis))
    outputs = np.broadcast_to(np.expand_dims(labels, axis), shape).astype(float)
    rows, gradient, kept = evidence(np, LossInputs(outputs, labels, True, axis=axis), outputs)["gradient"]
    assert rows[:, 0].tolist() == gradient[:, 0].tolist() == list(expected)
    assert kept[: len(rows)].tolist() == list(expected)


@pytest.mark.parametrize(
    ("outputs", "targets", "axis"),
    [((4, 3, 5), (4, 5), 1), ((4, 5, 3), (4, 5), -1), ((4, 5, 5), (4, 5), -1), ((4, 3), (4,), -1), ((4,), (4,), -1)],
)
def test_the_axis_of_classes_is_the_one_that_labels_leave_out(outputs, targets, axis):
    arrays = np.zeros(outputs), np.zeros(targets, int)
    given = described(of_logits, "", None, arrays, True, True)[1]
    assert given.axis == axis
    assert given.labels is (len(outputs) > 1)
    assert not LossInputs(*arrays, integer=False, axis=axis).labels
    assert not LossInputs(arrays[0], arrays[0], integer=True, axis=axis).labels


def test_what_is_not_looked_at():
    named = LossInputs(LOGITS, ONE_HOT, False, "mse")
    assert evidence(np, named, LOGITS) == {}
    assert evidence(np, None, LOGITS) == {}
    assert evidence(np, LossInputs(LOGITS[:, 0], LABELS, True, axis=0), LOGITS[:, 0]) == {}
    of_others = LossInputs(LOGITS, ONE_HOT, False)  # a loss of several outputs has a gradient of another size
    assert evidence(np, of_others, np.zeros((N, CLASSES + 1))) == {}
    assert set(evidence(np, of_others, LOGITS)) == {"gradient"}


def test_rows_of_binary_labels_run_along_the_last_axis():
    outputs = RNG.normal(size=(3, 5, 2))
    given = LossInputs(outputs, outputs > 0, True, "binary_cross_entropy")
    assert [rows.shape[-1] for rows in evidence(np, given, outputs)["binary_cross_entropy"]] == [2, 2]


def test_samples_that_have_one_output_and_one_target():
    found = [LossInputs(np.zeros((n, 1)), np.zeros(n), False).one_each for n in (2, 3)]
    assert found == [False, True]
    assert not LossInputs(np.zeros((3, 2)), np.zeros(3), False).one_each


def test_names():
    def told(loss, targets=ONE_HOT):
        model = lnp_numpy.OperatorModel(LOGITS, np.eye(LOGITS.size))
        return lnp.decompose(model, (LOGITS, targets), loss).loss_name

    assert told(None, LABELS) == "cross-entropy of logits, inferred from the targets"
    assert told(None) == "mean squared error, inferred from the targets"
    assert told("cross_entropy") == "cross-entropy of logits"
    assert told("binary_cross_entropy") == "binary cross-entropy of logits"
    assert told("huber") == "Huber loss"
    assert told(of_logits, LABELS).endswith("test_doubts.of_logits")


def test_each_of_our_own_losses_has_words():
    assert set(IN_WORDS) == set(kinds.NAMES)


def test_notes_of_both_batches():
    model = lnp_numpy.LinearModel(weight=np.zeros((3, CLASSES)))
    x = RNG.normal(size=(N, 3))
    both = lnp.cross_response(model, (x, ONE_HOT), (x, ONE_HOT), "cross_entropy")
    assert both.trained.loss_name == both.measured.loss_name == "cross-entropy of logits"
    assert both.trained.evidence == {}
    spectrum = lnp.spectrum(model, (x, ONE_HOT))
    assert doubts.ONE_HOT in spectrum.decomposition.notes
