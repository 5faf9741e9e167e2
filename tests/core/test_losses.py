"""Which loss is meant, and how many terms it averages."""

import sys
from types import ModuleType

import numpy as np
import pytest

from lnp.losses import kinds
from lnp.losses.evidence import in_words
from lnp_numpy.losses import value_and_gradient


def some_loss(outputs, targets):
    return 0.0


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "integer", "meant"),
    [
        (None, (4, 3), (4,), True, "cross_entropy"),
        (None, (4, 3), (4, 3), False, "mse"),
        ("mse", (4, 3), (4,), True, "mse"),
        ("huber", (4, 3), (4, 3), False, "huber"),
        ("binary_cross_entropy", (4, 3), (4, 3), True, "binary_cross_entropy"),
        ("cross_entropy", (4, 3), (4, 3), False, "cross_entropy"),
        (some_loss, (), None, False, some_loss),
    ],
)
def test_resolve(loss, outputs, targets, integer, meant):
    assert kinds.resolve(loss, outputs, targets, integer) == meant


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "error", "words"),
    [
        ("nll", (4, 3), (4,), ValueError, "Unknown loss 'nll'.*'cross_entropy', 'mse'.*Pass"),
        (3, (4, 3), (4,), TypeError, "loss is 3 of type int.*Expected"),
        (None, (4, 3), None, ValueError, "cannot be inferred.*Pass loss="),
        (None, (4, 3), (4,), ValueError, r"float targets of shape \(4,\).*outputs of shape \(4, 3\).*Reshape"),
    ],
)
def test_resolve_errors(loss, outputs, targets, error, words):
    with pytest.raises(error, match=words):
        kinds.resolve(loss, outputs, targets, False)


@pytest.mark.parametrize(
    ("outputs", "targets", "integer", "second", "axis"),
    [
        ((4, 3), (4,), True, False, 1),
        ((4, 5, 3), (4, 5), True, False, 2),
        ((4, 3, 5), (4, 5), True, True, 1),
        ((4, 5, 3), (4, 5), True, True, 2),
        ((4, 3), (4, 3), False, True, 1),
        ((4, 5, 3), (4, 5, 3), False, False, 2),
        ((4, 3, 5), (4, 3, 5), False, True, 1),
        ((4, 3), (4,), True, True, 1),
    ],
)
def test_class_axis(outputs, targets, integer, second, axis):
    assert kinds.class_axis(outputs, targets, integer, second_axis=second) == axis


def test_classes_are_on_the_second_axis_only_where_that_is_asked_for():
    with pytest.raises(ValueError, match=r"Labels of shape \(4, 5\)"):
        kinds.class_axis((4, 3, 5), (4, 5), True)


@pytest.mark.parametrize(
    ("outputs", "targets", "integer", "words"),
    [
        ((4,), (4,), True, "without an axis for classes.*Expected|without an axis for classes.*expects"),
        ((4, 3), (4, 2), False, "Soft targets.*Reshape"),
        ((4, 3, 3), (4, 3), True, "could be on axis 1 or on the last axis.*Pass"),
        ((4, 3), (5,), True, r"Labels of shape \(5,\).*Reshape"),
        ((4, 3), (4, 1), True, r"Labels of shape \(4, 1\).*Reshape"),
    ],
)
def test_class_axis_errors(outputs, targets, integer, words):
    with pytest.raises(ValueError, match=words):
        kinds.class_axis(outputs, targets, integer, second_axis=True)


def test_same_shape():
    kinds.check_same_shape((4, 1), (4, 1))
    with pytest.raises(ValueError, match=r"\(4,\) do not match outputs of shape \(4, 1\).*Reshape"):
        kinds.check_same_shape((4, 1), (4,))


def test_label_terms():
    labels = np.array([[0, -100, 2], [-100, -100, -1]])
    assert kinds.label_terms(np, labels) == 3
    assert kinds.label_terms(np, labels, ignore_index=2) == 5


@pytest.mark.parametrize(("labels", "wrong"), [([0, 2, -100], False), ([3], True), ([-1], True), ([-100], False)])
def test_labels_out_of_range(labels, wrong):
    flag, message = kinds.labels_out_of_range(np, np.array(labels), 3)
    assert bool(flag) is wrong
    assert "[0, 3)" in message
    assert "Check the labels" in message
    assert "Check the labels" in kinds.labels_out_of_range(np, np.array(labels), 2)[1]
    assert "one output for each class" in kinds.labels_out_of_range(np, np.array(labels), 1)[1]


@pytest.mark.parametrize(
    ("outputs", "targets", "integer", "terms", "words"),
    [
        ((4, 3), np.array([0, -100, 1, 2]), True, 3, "labels"),
        ((4, 3), np.zeros((4, 3)), False, 12, "elements"),
        ((4, 3), np.zeros((4, 2)), False, 4, "samples"),
        ((4, 3), None, False, 4, "samples"),
        ((4, 3), np.zeros((4, 3), int), True, 12, "elements"),
    ],
)
def test_assumed_terms(outputs, targets, integer, terms, words):
    value, note = kinds.assumed_terms(np, outputs, targets, integer)
    assert value == terms
    assert words in note
    assert "pass loss_terms=" in note


FORMULAS = {
    "mse": lambda f, y: (f - y) ** 2,
    "huber": lambda f, y: (f - y) ** 2 / 2 if abs(f - y) < 1 else abs(f - y) - 0.5,
    "binary_cross_entropy": lambda f, y: -y * np.log(1 / (1 + np.exp(-f))) - (1 - y) * np.log(1 / (1 + np.exp(f))),
}
LOGITS = np.array([[0.3, -2.5, 1.7], [4.0, 0.1, -0.6]])


@pytest.mark.parametrize(
    "targets",
    [np.array([[0.2, 0.7, 0.0], [1.0, 0.5, 0.9]]), np.eye(2, 3, dtype=int), np.eye(2, 3) > 0],
    ids=["float", "integer", "boolean"],
)
@pytest.mark.parametrize("name", kinds.ELEMENTWISE)
def test_values_and_gradients_in_numpy(name, targets):
    value, gradient = value_and_gradient(name, LOGITS, targets)
    terms = [FORMULAS[name](f, float(y)) for f, y in zip(LOGITS.flat, targets.flat, strict=True)]
    assert value == pytest.approx(np.mean(terms))
    for index in np.ndindex(LOGITS.shape):
        step = np.zeros_like(LOGITS)
        step[index] = 1e-5
        up, down = (value_and_gradient(name, LOGITS + sign * step, targets)[0] for sign in (1, -1))
        assert gradient[index] == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_extreme_logits_do_not_overflow():
    value, gradient = value_and_gradient("binary_cross_entropy", np.array([[1e4, -1e4]]), np.array([[0.0, 0.0]]))
    assert (value, gradient.tolist()) == (5000, [[0.5, 0.0]])


@pytest.mark.parametrize("name", kinds.ELEMENTWISE)
def test_elementwise_losses_do_not_broadcast(name):
    with pytest.raises(ValueError, match="do not match outputs"):
        value_and_gradient(name, LOGITS, np.zeros((2, 1)))


class Stated:
    """A loss that says how many terms it averages."""

    separable = True

    def __call__(self, outputs, targets):
        return 0.0

    def loss_terms(self, outputs, targets):
        return 7, ("told by the loss",)


class Weighing(Stated):
    def sample_terms(self, outputs, targets):
        return np.array([3, 4])


def prepared(loss, outputs, targets, **options):
    """What a backend makes of a loss, with functions that only say which one they are."""

    def shape(values):
        return values.shape if isinstance(values, np.ndarray) else None

    integer = isinstance(targets, np.ndarray) and targets.dtype.kind in "iu"
    first = outputs if isinstance(outputs, np.ndarray) else outputs[0]
    given = kinds.Given(shape(outputs), shape(targets), integer, first.shape)
    elementwise = dict.fromkeys(kinds.ELEMENTWISE, "an elementwise one")
    chosen = {"elementwise": elementwise, "cross_entropy": lambda axis, labels: ("cross-entropy", axis, labels)}
    return kinds.prepare(np, loss, given, (outputs, targets), **chosen, **options)


LABELS = np.array([[0, 2], [-100, 1]])


class TestPrepare:
    def test_labels_are_counted_for_each_sample(self):
        found = prepared(None, np.zeros((2, 2, 3)), LABELS)
        assert (found.function, found.terms, found.separable) == (("cross-entropy", 2, True), 3, True)
        assert found.sample_terms.tolist() == [2, 1]
        assert [bool(flag) for flag, _ in found.violations] == [False]
        assert bool(prepared(None, np.zeros((2, 2, 2)), LABELS).violations[0][0])
        assert found.name == "cross-entropy of logits, inferred from the targets"

    def test_soft_targets_and_elements_weigh_the_same(self):
        soft = prepared("cross_entropy", np.zeros((2, 4, 3)), np.full((2, 4, 3), 1 / 3))
        assert (soft.function, soft.terms, soft.sample_terms, soft.violations) == (
            ("cross-entropy", 2, False), 8, None, ()
        )  # fmt: skip
        plain = prepared("mse", np.zeros((2, 3)), np.zeros((2, 3)))
        assert (plain.function, plain.terms, plain.separable, plain.takes) == ("an elementwise one", 6, True, "mse")

    def test_a_loss_says_itself_what_it_averages(self):
        found = prepared(Stated(), np.zeros((2, 3)), LABELS)
        assert (found.terms, found.separable, found.notes) == (7, True, ("told by the loss",))
        assert found.sample_terms is None
        assert prepared(Weighing(), np.zeros((2, 3)), LABELS).sample_terms.tolist() == [3, 4]

    def test_the_users_own_number_of_terms_counts(self):
        kept = prepared(Weighing(), np.zeros((2, 3)), LABELS, loss_terms=7)
        assert (kept.terms, kept.notes, kept.sample_terms.tolist()) == (7, (), [3, 4])
        other = prepared(Weighing(), np.zeros((2, 3)), LABELS, loss_terms=5)
        assert (other.terms, other.sample_terms.tolist()) == (5, [1, 1])
        assert prepared(some_loss, np.zeros((2, 3)), np.zeros((2, 3)), loss_terms=5).notes == ()

    def test_a_library_knows_its_own_losses(self):
        own = kinds.Prepared(some_loss, 4, False, takes="mse")
        found = prepared(some_loss, np.zeros((2, 3)), np.zeros((2, 3)), known=lambda loss: own)
        assert (found.terms, found.takes) == (4, "mse")

    def test_others_are_assumed_to_average_what_the_targets_have(self):
        labels = prepared(some_loss, np.zeros((2, 2, 3)), LABELS)
        assert (labels.terms, labels.sample_terms.tolist(), labels.separable) == (3, [2, 1], False)
        assert "assumed" in labels.notes[0]
        assert labels.name.endswith("some_loss")
        assert prepared(some_loss, np.zeros((2, 3)), np.zeros((2, 3))).sample_terms is None
        classes = prepared(some_loss, np.zeros((2, 2)), LABELS)  # integers of the outputs' shape, which are no labels
        assert (classes.terms, classes.sample_terms) == (4, None)
        several = prepared(some_loss, (np.zeros((2, 3)), np.zeros(2)), LABELS)
        assert (several.terms, several.sample_terms, several.inputs) == (2, None, None)

    def test_a_named_loss_needs_single_arrays(self):
        with pytest.raises(ValueError, match="cannot be inferred"):
            prepared("mse", (np.zeros((2, 3)), np.zeros(2)), np.zeros((2, 3)))


def test_a_loss_is_called_as_its_library_offers_it(monkeypatch):
    """Not by the module in which it is defined, where that is the library's own."""
    public, private = ModuleType("made.losses"), ModuleType("made.src.losses.all")
    private.Loss = type("Loss", (), {"__module__": "made.src.losses.all", "__call__": lambda self: 0.0})
    package, below = ModuleType("made"), ModuleType("made.losses.all")
    for module in (package, public, below, private):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert in_words(private.Loss()) == "made.src.losses.all.Loss"
    for module in (below, public, package):  # the shorter, the rather
        module.Loss = private.Loss
        assert in_words(private.Loss()) == f"{module.__name__}.Loss"
    assert in_words(str.join) == "str.join"  # of no module
