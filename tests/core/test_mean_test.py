"""Which losses are found to be means over samples, on stand-ins."""

from __future__ import annotations

import numpy as np
import pytest

from lnp.losses.mean_test import Leaf, found_mean, is_mean, tells

N, K = 10, 4
OUTPUTS = [Leaf((N, K), "float64", measured=True)]
FLOATS, LABELS = [Leaf((N, K), "float64")], [Leaf((N,), "int64")]


def numeric(loss):
    """(outputs, targets) -> the loss gradient, by central differences."""

    def gradient(outputs, targets):
        f, found = outputs[0], np.zeros(outputs[0].shape)
        for at in np.ndindex(f.shape):
            step = np.zeros(f.shape)
            step[at] = 1e-5
            found[at] = (loss(f + step, targets[0]) - loss(f - step, targets[0])) / 2e-5
        return found

    return gradient


def cross_entropy(f, y, weights=(1.0,) * K):
    weights = np.asarray(weights)
    picked = (f - np.log(np.exp(f).sum(1, keepdims=True)))[np.arange(len(f)), y]
    return -(weights[y] * picked).sum() / weights[y].sum()


LOSSES = {
    "mean": (lambda f, y: ((f - y) ** 2).mean(), FLOATS, True),
    "four times the mean": (lambda f, y: 4 * ((f - y) ** 2).mean(), FLOATS, True),
    "cross-entropy": (cross_entropy, LABELS, True),
    "sum": (lambda f, y: ((f - y) ** 2).sum(), FLOATS, False),
    "class weights": (lambda f, y: cross_entropy(f, y, (1.0, 5.0, 0.2, 3.0)), LABELS, False),
    "largest": (lambda f, y: ((f - y) ** 2).sum(1).max(), FLOATS, False),
    "correlation": (lambda f, y: -np.corrcoef(f.ravel(), y.ravel())[0, 1], FLOATS, False),
    "neighbours": (lambda f, y: ((f[1:] - f[:-1]) ** 2).mean(), FLOATS, False),
    "the size of the batch": (lambda f, y: ((f - y) ** 2).mean() * len(f), FLOATS, False),
    "nothing": (lambda f, y: 0.0, FLOATS, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_are_means(name):
    loss, targets, expected = LOSSES[name]
    assert found_mean(np, numeric(loss), OUTPUTS, targets) is expected


def test_whatever_a_loss_raises_it_is_no_mean():
    def whole(f, y):
        assert len(f) == N, "another batch"
        return f.mean()

    assert not found_mean(np, numeric(whole), OUTPUTS, FLOATS)
    with pytest.raises(AssertionError):
        found_mean(np, numeric(whole), OUTPUTS, FLOATS, fatal=(AssertionError,))


def test_targets_that_do_not_run_over_the_samples():
    loss = lambda f, y: ((f - y.sum()) ** 2).mean()
    assert not found_mean(np, numeric(loss), OUTPUTS, [Leaf((3,), "float64")])
    assert found_mean(np, numeric(loss), OUTPUTS, [Leaf((), "float64")])
    first = lambda f, y: ((f - y) ** 2).mean()
    assert found_mean(np, numeric(first), OUTPUTS, FLOATS * 2)
    assert not found_mean(np, numeric(first), OUTPUTS, [*FLOATS, Leaf((3 * N,), "float64")])


def test_more_outputs_than_samples():
    mean = numeric(lambda f, y: ((f - y) ** 2).mean())
    assert found_mean(np, mean, [Leaf((3, 9), "float64", measured=True)], [Leaf((3, 9), "float64")])


def test_stand_ins_are_of_the_batchs_dtypes():
    seen, others = [], []

    def gradient(outputs, targets):
        seen.append(
            ([f.dtype.name for f in outputs], [y.dtype.name for y in targets], targets[0].max(), len(outputs[0]))
        )
        others.append(outputs[1].max())
        return outputs[0]

    leaves = [Leaf((N, K), "float32", measured=True), Leaf((N, 2), "int32")]
    found_mean(np, gradient, leaves, [Leaf((N, 3), "int8"), Leaf((N,), "bool")])
    assert seen[0][:2] == (["float32", "int32"], ["int8", "bool"])
    assert seen[0][2] < K
    assert seen[0][3] == 6
    assert 0 < others[0] < K  # labels, for what the loss is not differentiated by


def test_stand_ins_are_such_as_losses_take():
    """Outputs once as probabilities are and once of either sign; labels of the fewest classes, numbers between 0 and 1,
    and truth values, which go with nothing else.
    """
    seen = []

    def gradient(outputs, targets):
        seen.append((outputs[0], targets))
        return outputs[0].reshape(len(outputs[0]), -1)

    shape = (N, 5, 3)
    leaves = [Leaf(shape, "float64", measured=True), Leaf((N, 4), "float64", measured=True)]
    found_mean(np, gradient, leaves, [Leaf(shape, dtype) for dtype in ("int64", "float64", "bool")])
    (within, given), (either, _) = (one for one in seen if len(one[0]) == 6)
    labels, numbers, truths = given
    assert (within > 0).all() & (within < 1).all()
    assert either.min() < -1 < 1 < either.max()
    assert set(np.unique(labels)) == {0, 1, 2}
    assert (numbers > 0).all() & (numbers < 1).all() & (numbers != within).all()
    assert (truths.dtype.name, len(np.unique(truths))) == ("bool", 2)
    seen.clear()
    found_mean(np, gradient, [Leaf((N,), "float64", measured=True)], [Leaf((N, 20), "int64")])
    assert not seen[0][1][0].any()  # outputs without an axis have one class


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_difference_is_relative_to_the_gradient(scale):
    whole = scale * np.array([[1.0, -2.0], [3.0, 1.0], [0.5, 1.0]])
    assert is_mean(np, whole, 4 / 3 * whole * (1 + 0.9e-3), 4)
    assert not is_mean(np, whole, 4 / 3 * whole * (1 + 1.1e-3), 4)
    assert not is_mean(np, whole, whole, 4)
    assert is_mean(np, 0 * whole, 0 * whole, 4)
    assert not is_mean(np, whole, whole, 3)  # all samples, of which the loss is its own


def test_which_gradients_tell_something():
    assert tells(np, np.array([1.0, -1.0]))
    assert not tells(np, np.zeros(2))
    assert not tells(np, np.array([np.inf, 1.0]))
    assert not tells(np, np.array([np.nan, 1.0]))
