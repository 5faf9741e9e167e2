"""Samples that weigh differently in the loss: padding, class weights, ignored labels of another kind."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch

SAMPLES, PLACES, CLASSES = 8, 5, 6
WEIGHT = torch.tensor([1.0, 5.0, 0.2, 1.0, 2.0, 0.5]).double()


def language_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES)).double()


def batch(ignored=-100):
    torch.manual_seed(1)
    tokens, labels = (torch.randint(1, CLASSES, (SAMPLES, PLACES)) for _ in range(2))
    for row, length in enumerate([5, 1, 2, 4, 5, 3, 1, 2]):
        labels[row, length:] = ignored
    return tokens, labels


def over_pairs(model, tokens, labels, weights, **loss):
    """sum_{n != m} G_n . G_m / sum_{n != m} w_n w_m, with the gradient G_n of sample n's sum."""
    own = []
    for x, y in zip(tokens, labels, strict=True):
        value = F.cross_entropy(model(x[None])[0], y, reduction="sum", **loss)
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    pairs = list(itertools.permutations(range(len(own)), 2))
    return float(sum(own[i] @ own[j] for i, j in pairs) / sum(weights[i] * weights[j] for i, j in pairs))


def flat(loss):
    return lambda outputs, labels: loss(outputs.flatten(0, 1), labels.flatten())


LOSSES = {
    "named": ("cross_entropy", -100, None),
    "the user's own": (flat(F.cross_entropy), -100, None),
    "another label is ignored": (flat(partial(F.cross_entropy, ignore_index=0)), 0, None),
    "a sum that is divided": (
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten(), reduction="sum") / (y != -100).sum(), -100, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_are_ignored(name):
    loss, ignored, _ = LOSSES[name]
    model, (tokens, labels) = language_model(), batch(ignored)
    expected = over_pairs(model, tokens, labels, (labels != ignored).sum(dim=1), ignore_index=ignored)
    found = lnp.decompose(model, (tokens, labels), loss, estimator="exact", population=True)
    assert found.population.rate == pytest.approx(expected, rel=1e-9)
    assert found.loss_terms == int((labels != ignored).sum())


def test_class_weights():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, CLASSES).double(), torch.randn(SAMPLES, 4).double(), torch.arange(SAMPLES) % CLASSES
    for ignored in (-100, 3):
        weights = torch.where(y == ignored, 0.0, WEIGHT[y])
        expected = over_pairs(model, x[:, None], y[:, None], weights, weight=WEIGHT, ignore_index=ignored)
        loss = nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=ignored)
        for meant in (loss, lambda o, y, ignored=ignored: F.cross_entropy(o, y, WEIGHT, ignore_index=ignored)):
            found = lnp.decompose(model, (x, y), meant, estimator="exact", population=True)
            assert found.population.rate == pytest.approx(expected, rel=1e-9)
        with lnp_torch.shared(model) as shared:
            value = loss(model(x), y)
        step = shared.backward(value, y, loss, estimator="exact", population=True)
        assert step.population.rate == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [("full", "pad", "full"), ("pad", "full", "pad")])
def test_the_verdict_does_not_depend_on_the_order_of_batches(order):
    """Whether a loss is a mean over samples is a matter of the loss; here it is a new one for each order."""
    loss, model = eval("lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten())"), language_model()
    tokens, padded = batch()
    labels = {"pad": padded, "full": torch.where(padded < 0, 1, padded)}
    for kind in order:
        found = lnp.decompose(model, (tokens, labels[kind]), loss, estimator="exact")
        weights = (labels[kind] >= 0).sum(dim=1)
        expected = over_pairs(model, tokens, labels[kind], weights)
        assert found.population.rate == pytest.approx(expected, rel=1e-9), found.notes


def test_a_user_who_counts_something_else():
    model, (tokens, labels) = language_model(), batch()
    plain = [lnp.decompose(model, (tokens, labels), "cross_entropy", loss_terms=n, population=True) for n in (23, 8)]
    assert plain[0].population.rate == lnp.decompose(model, (tokens, labels), population=True).population.rate
    assert plain[1].population.rate < plain[0].population.rate
