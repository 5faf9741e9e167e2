"""PyTorch's losses and the users' own, against a dense Jacobian: values, and what their mean is taken over."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from integrations.torch_reference import dense

VALUES = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")
SAMPLES, CLASSES = 6, 3
LABELS = torch.tensor([0, 2, -100, 1, 2, 2])
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def contrastive(outputs, targets):
    """InfoNCE between the two halves of each sample's outputs: every sample is in every term."""
    a, b = (F.normalize(part, dim=1) for part in outputs.chunk(2, 1))
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)))


def own(outputs, targets):
    return ((outputs.sum(1) - targets) ** 4).mean() + outputs.abs().max()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def soft():
    return torch.softmax(normal(SAMPLES, CLASSES), 1)


SUM = "the loss is a sum"
CLASS = "weights its terms by class"
ASSUMED = "assumed"
CASES = {
    "labels, ignored": (nn.CrossEntropyLoss(), LABELS, 5, None),
    "labels, another one ignored": (nn.CrossEntropyLoss(ignore_index=2), LABELS.clamp(min=0), 3, None),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, 5, None),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LABELS, 5, CLASS),
    "soft targets": (nn.CrossEntropyLoss(), soft(), SAMPLES, None),
    "function": (F.cross_entropy, LABELS, 5, None),
    "partial": (partial(F.cross_entropy, ignore_index=2, label_smoothing=0.2), LABELS.clamp(min=0), 3, None),
    "partial sum": (partial(F.cross_entropy, reduction="sum"), LABELS, 1, SUM),
    "negative log likelihood": (nn.NLLLoss(), LABELS, 5, None),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS, 1, SUM),
    "binary cross-entropy": (nn.BCEWithLogitsLoss(), soft(), SAMPLES * CLASSES, None),
    "binary cross-entropy by name": ("binary_cross_entropy", soft(), SAMPLES * CLASSES, None),
    "mean squared": (nn.MSELoss(), soft(), SAMPLES * CLASSES, None),
    "squared, sum": (partial(F.mse_loss, reduction="sum"), soft(), 1, SUM),
    "mean absolute": (nn.L1Loss(), soft(), SAMPLES * CLASSES, None),
    "Huber": (nn.HuberLoss(delta=0.3), soft(), SAMPLES * CLASSES, None),
    "smooth L1": (F.smooth_l1_loss, soft(), SAMPLES * CLASSES, None),
    "Kullback-Leibler": (nn.KLDivLoss(reduction="batchmean"), soft(), SAMPLES, None),
    "Poisson": (nn.PoissonNLLLoss(), soft(), SAMPLES * CLASSES, None),
    "own": (own, soft().sum(1), SAMPLES, ASSUMED),
    "own with positional arguments bound": (
        partial(lambda factor, f, y: factor * F.mse_loss(f, y), 2.0),
        soft(),
        18,
        ASSUMED,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss(name):
    loss, targets, terms, note = CASES[name]
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    x = normal(SAMPLES, 4)
    d = lnp.decompose(model, (x, targets), loss, estimator="exact")
    out = model(x)
    function = nn.BCEWithLogitsLoss() if isinstance(loss, str) else loss
    expected = dense(model, out, function(out, targets), terms)
    assert {value: getattr(d, value) for value in VALUES} == pytest.approx(expected, rel=1e-10)
    assert d.loss_terms == terms
    assert bool(d.notes) == bool(note)
    assert note is None or note in d.notes[0]


def test_a_loss_that_couples_samples_leaves_the_network_apart():
    model, x = nn.Linear(4, 6).double(), normal(SAMPLES, 4)
    d = lnp.decompose(model, (x, torch.zeros(SAMPLES)), contrastive, estimator="exact", population=True)
    out = model(x)
    expected = dense(model, out, contrastive(out, None), SAMPLES)
    assert {value: getattr(d, value) for value in VALUES} == pytest.approx(expected, rel=1e-10)
    assert d.probes == 6
    assert d.population is None
    assert any("population" in note for note in d.notes)


@pytest.mark.parametrize(("loss", "given"), [(nn.MSELoss(), True), (nn.MSELoss(reduction="sum"), False), (own, False)])
def test_the_population_needs_a_mean_over_samples(loss, given):
    model, x = nn.Linear(4, 1).double(), normal(SAMPLES, 4)
    targets = normal(SAMPLES, 1) if given or loss is not own else normal(SAMPLES)
    assert (lnp.decompose(model, (x, targets), loss, population=True).population is not None) is given


def test_values_per_sample_are_no_loss():
    with pytest.raises(ValueError, match=r"Expected a scalar\. Average it"):
        lnp.decompose(nn.Linear(4, 3).double(), (normal(6, 4), soft()), nn.MSELoss(reduction="none"))
