"""Losses of the user's own: population values where they are a mean over samples, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from lnp_torch import losses

SAMPLES, CLASSES = 24, 4


class Weighted(nn.Module):
    """A mean with weights for classes that it keeps, inside a module."""

    def forward(self, outputs, targets):
        return (
            torch.tensor([1.0, 2.0, 0.5, 1.0])[targets] * F.cross_entropy(outputs, targets, reduction="none")
        ).mean()


def contrastive(outputs, targets):
    normal = F.normalize(outputs, dim=1)
    return F.cross_entropy(normal @ normal.roll(1, 0).T / 0.5, torch.arange(len(outputs)))


def ranking(outputs, targets):
    return F.softplus(outputs[:, None, 0] - outputs[None, :, 0]).mean()


def neighbours(outputs, targets):
    return F.cross_entropy(outputs, targets) + 0.1 * (outputs[0::2, 0] * outputs[1::2, 0]).mean()


def opposite(outputs, targets):
    half = len(outputs) // 2
    return F.cross_entropy(outputs, targets) + 0.1 * (outputs[:half, 0] * outputs[-half:, 0]).mean()


def gated(outputs, targets):
    """Couples samples where outputs are far from where they begin."""
    return F.cross_entropy(outputs, targets) + (F.relu(outputs - 1e-3).sum(0) ** 2).mean()


def whole_batches(outputs, targets):
    return F.cross_entropy(outputs.view(SAMPLES, CLASSES), targets)


MEANS = {
    "lambda": lambda o, t: F.cross_entropy(o, t),
    "label smoothing": lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1),
    "focal": lambda o, t: ((1 - torch.exp(-(ce := F.cross_entropy(o, t, reduction="none")))) ** 2 * ce).mean(),
    "module": Weighted(),
    "in float16": lambda o, t: F.cross_entropy(o.half().float(), t),
}
OTHERS = {
    "sum": lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    "logarithm": lambda o, t: F.cross_entropy(o, t).log(),
    "batch statistics": lambda o, t: F.cross_entropy((o - o.mean(0)) / o.std(0), t),
    "class balance": lambda o, t: F.cross_entropy(o, t, weight=1 / torch.bincount(t, minlength=CLASSES).float()),
    "largest": lambda o, t: F.cross_entropy(o, t, reduction="none").max(),
    "noise": lambda o, t: F.cross_entropy(o + torch.randn_like(o), t),
    **{f.__name__: f for f in (contrastive, ranking, neighbours, opposite, gated, whole_batches)},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def made():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        model[2].weight *= 0.01
        model[2].bias.fill_(-1.0)  # outputs near -1, where `gated` couples nothing
    return model, (torch.randn(SAMPLES, 5), torch.arange(SAMPLES) * 5 % 7 % CLASSES)


@pytest.mark.parametrize("name", MEANS)
def test_means(name):
    model, batch = made()
    d = lnp.decompose(model, batch, MEANS[name])
    assert d.population is not None, d.notes


@pytest.mark.parametrize("name", OTHERS)
def test_no_means(name):
    model, batch = made()
    d = lnp.decompose(model, batch, OTHERS[name])
    assert d.population is None
    assert any("whether the loss is a mean over samples" in note for note in d.notes)


def test_targets_of_another_length():
    model, (x, y) = made()
    d = lnp.decompose(model, (x, (y, torch.ones(3))), lambda o, t: F.cross_entropy(o, t[0]) * t[1].mean())
    assert d.population is None


def test_a_shared_step():
    model, (x, y) = made()
    for name, loss_of in (("lambda", MEANS["lambda"]), ("contrastive", contrastive)):
        with lnp_torch.shared(model) as step:
            loss = loss_of(model(x), y)
        assert (step.backward(loss, y, loss_of).population is not None) is (name == "lambda")


def test_found_once(monkeypatch):
    model, batch = made()
    tried, found = [], losses.mean_test.found_mean
    monkeypatch.setattr(
        losses.mean_test, "found_mean", lambda *args, **fatal: (tried.append(args), found(*args, **fatal))[1]
    )
    for _ in range(3):  # made anew each time, as in a loop
        lnp.decompose(model, batch, lambda o, t: F.cross_entropy(o, t) + 0)
    assert len(tried) == 1


def test_what_a_closure_holds_matters():
    model, batch = made()

    def measured(factor):
        return lnp.decompose(model, batch, lambda o, t: F.cross_entropy(o, t) + factor * o.mean(0).square().sum())

    assert measured(0.0).population is not None
    assert measured(1.0).population is None
