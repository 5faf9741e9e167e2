"""PyTorch's losses and the users' own, against a dense Jacobian: values, and what their mean is taken over."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from integrations.torch_reference import assert_agrees, dense
from lnp.losses.doubts import NO_LOGARITHMS

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


def network(outputs=CLASSES):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


SOFT = torch.softmax(normal(SAMPLES, CLASSES), 1)
SINGLE = LABELS.clamp(min=0)
HARD = F.one_hot(SINGLE)
ALL = SAMPLES * CLASSES
SUM, CLASS, PART = "the loss is a sum", "weighted by class", "a part of the loss"
CASES = {  # loss, targets, number of terms, a word of the only note
    "labels, ignored": (nn.CrossEntropyLoss(), LABELS, 5, None),
    "labels, another one ignored": (nn.CrossEntropyLoss(ignore_index=2), SINGLE, 3, None),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, 5, None),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LABELS, 5, CLASS),
    "class weights, smoothing": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), LABELS, 5, CLASS),
    "soft targets": (nn.CrossEntropyLoss(), SOFT, SAMPLES, None),
    "soft targets, class weights": (nn.CrossEntropyLoss(weight=WEIGHT), SOFT, SAMPLES, None),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS, 1, SUM),
    "sum, class weights": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), LABELS, 1, SUM),
    "function": (F.cross_entropy, LABELS, 5, None),
    "partial": (partial(F.cross_entropy, ignore_index=2, label_smoothing=0.2), SINGLE, 3, None),
    "partial, class weights": (partial(F.cross_entropy, weight=WEIGHT), LABELS, 5, CLASS),
    "partial sum": (partial(F.cross_entropy, label_smoothing=0.1, ignore_index=0, reduction="sum"), SINGLE, 1, SUM),
    "partial of a module": (partial(nn.CrossEntropyLoss(ignore_index=2)), SINGLE, 3, None),
    "negative log likelihood": (nn.NLLLoss(), LABELS, 5, None),
    "negative log likelihood, weighted": (partial(F.nll_loss, weight=WEIGHT), LABELS, 5, CLASS),
    "binary": (nn.BCEWithLogitsLoss(), SOFT, ALL, None),
    "binary, weighted": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), SOFT, ALL, None),
    "binary, sum": (nn.BCEWithLogitsLoss(reduction="sum"), SOFT, 1, SUM),
    "binary by name": ("binary_cross_entropy", SOFT, ALL, None),
    "binary by name, integer labels": ("binary_cross_entropy", HARD, ALL, None),
    "binary by name, boolean labels": ("binary_cross_entropy", HARD > 0, ALL, None),
    "mean squared": (nn.MSELoss(), SOFT, ALL, None),
    "mean squared, sum": (partial(F.mse_loss, reduction="sum"), SOFT, 1, SUM),
    "mean squared by name": ("mse", SOFT, ALL, None),
    "mean absolute": (nn.L1Loss(), SOFT, ALL, None),
    "Huber": (nn.HuberLoss(delta=0.3), SOFT, ALL, None),
    "Huber, sum": (nn.HuberLoss(reduction="sum"), SOFT, 1, SUM),
    "Huber by name": ("huber", 3 * SOFT, ALL, None),
    "smooth L1": (F.smooth_l1_loss, SOFT, ALL, None),
    "Kullback-Leibler": (nn.KLDivLoss(reduction="batchmean"), SOFT, SAMPLES, None),
    "Kullback-Leibler, elements": (partial(F.kl_div, reduction="mean"), SOFT, ALL, None),
    "Poisson": (nn.PoissonNLLLoss(), SOFT, ALL, None),
    "Gaussian": (partial(F.gaussian_nll_loss, var=torch.ones(SAMPLES, CLASSES).double()), SOFT, ALL, None),
    "margin": (nn.MultiMarginLoss(weight=WEIGHT), SINGLE, SAMPLES, None),
    "margin, several labels": (F.multilabel_margin_loss, HARD - 1, SAMPLES, None),
    "own": (own, SOFT.sum(1), SAMPLES, PART),
    "own, as a lambda": (lambda f, y: F.cross_entropy(f, y), LABELS, 5, None),
    "own, derived from PyTorch's": (type("Derived", (nn.MSELoss,), {})(), SOFT, ALL, None),
    "own, with positional arguments bound": (partial(lambda a, f, y: a * F.mse_loss(f, y), 2.0), SOFT, ALL, None),
}
FORMULAS = {  # what the names stand for
    "mse": nn.MSELoss(),
    "huber": nn.HuberLoss(delta=1),
    "binary_cross_entropy": lambda f, y: F.binary_cross_entropy(torch.sigmoid(f), y.double()),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of kl_div, on its name for this mean
@pytest.mark.parametrize("name", CASES)
def test_loss(name):
    loss, targets, terms, note = CASES[name]
    model, x = network(), normal(SAMPLES, 4)
    d = lnp.decompose(model, (x, targets), loss, estimator="exact", population=False)
    out = model(x)
    value = FORMULAS[loss](out, targets) if isinstance(loss, str) else loss(out, targets)
    assert_agrees(d, dense(model, out, value, terms), torch.float64)
    assert d.loss_terms == terms
    assert len([told for told in d.notes if told != NO_LOGARITHMS]) == bool(note)
    assert note is None or note in d.notes[0]


@pytest.mark.parametrize(
    ("loss", "targets", "terms"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([[0, 1]] * 5 + [[-100, 2]]), 11),
        (nn.CrossEntropyLoss(), torch.softmax(normal(SAMPLES, CLASSES, 2), 1), 12),
        (nn.BCEWithLogitsLoss(), torch.softmax(normal(SAMPLES, CLASSES, 2), 1), 36),
    ],
    ids=["labels", "soft targets", "binary"],
)
def test_classes_on_the_second_axis(loss, targets, terms):
    model, x = nn.Sequential(network(6), nn.Unflatten(1, (CLASSES, 2))), normal(SAMPLES, 4)
    d = lnp.decompose(model, (x, targets), loss, estimator="exact")
    out = model(x)
    assert_agrees(d, dense(model, out, loss(out, targets), terms), torch.float64)
    assert (d.loss_terms, d.notes) == (terms, ())


def test_a_loss_that_couples_samples_leaves_the_network_apart():
    model, x = network(6), normal(SAMPLES, 4)
    d = lnp.decompose(model, (x, torch.zeros(SAMPLES)), contrastive, estimator="exact", population=True)
    out = model(x)
    assert_agrees(d, dense(model, out, contrastive(out, None), SAMPLES), torch.float64)
    assert d.probes == 6
    assert d.population is None
    assert "population" in d.notes[0]


@pytest.mark.parametrize(
    ("loss", "targets", "known"),
    [
        ("mse", SOFT, True),
        (nn.MSELoss(), SOFT, True),
        (partial(F.cross_entropy, ignore_index=1), SINGLE, True),
        (nn.CrossEntropyLoss(weight=WEIGHT), LABELS, True),
        (nn.KLDivLoss(reduction="batchmean"), SOFT, True),
        (nn.MSELoss(reduction="sum"), SOFT, False),
        (partial(F.cross_entropy, reduction="sum"), SINGLE, False),
        (own, SOFT.sum(1), False),
    ],
)
def test_the_population_needs_a_mean_over_samples(loss, targets, known):
    d = lnp.decompose(network(), (normal(SAMPLES, 4), targets), loss, population=True)
    assert (d.population is not None) is known


def test_targets_that_are_broadcast_pair_every_sample_with_every_other():
    """Outputs (N, 1) and targets (N,): a frequent mistake, of which PyTorch warns. It is no mean over samples."""
    model, x, y = network(1), normal(SAMPLES, 4), normal(SAMPLES)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        d = lnp.decompose(model, (x, y), nn.MSELoss(), estimator="exact", population=True)
        out = model(x)
        expected = dense(model, out, F.mse_loss(out, y), SAMPLES**2)
    assert_agrees(d, expected, torch.float64)
    assert d.population is None


def test_the_old_way_to_ask_for_a_sum_is_not_taken_for_a_mean():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="size_average and reduce")
        d = lnp.decompose(network(), (normal(SAMPLES, 4), SOFT), partial(F.mse_loss, size_average=False))
    assert "assumed" in d.notes[0]


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="none"), partial(F.l1_loss, reduction="none")])
def test_values_per_sample_are_no_loss(loss):
    with pytest.raises(ValueError, match=r"The loss has shape \(6, 3\)\. Expected a scalar\. Average it"):
        lnp.decompose(network(), (normal(SAMPLES, 4), SOFT), loss)


@pytest.mark.parametrize("name", ["huber", "binary_cross_entropy"])
def test_named_losses_do_not_broadcast(name):
    with pytest.raises(ValueError, match="do not match outputs"):
        lnp.decompose(network(1), (normal(SAMPLES, 4), normal(SAMPLES)), name)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), partial(F.nll_loss, reduction="sum"), "cross_entropy"])
def test_labels_out_of_range_are_named(loss):
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        lnp.decompose(network(), (normal(SAMPLES, 4), SINGLE + 1), loss)


def test_loss_terms_that_are_given_need_no_notes():
    d = lnp.decompose(
        network(), (normal(SAMPLES, 4), SOFT), nn.MSELoss(reduction="sum"), loss_terms=ALL, population=False
    )
    assert (d.loss_terms, d.notes) == (ALL, ())


def masked_out(outputs, targets):
    outputs[:, 1] = -1e4
    return F.cross_entropy(outputs, targets)


def cooled(outputs, targets):
    outputs /= 2.0
    return F.cross_entropy(outputs, targets)


def with_an_axis(outputs, targets):
    return F.cross_entropy(outputs.unsqueeze_(1)[:, 0], targets)


def centred(outputs, targets):
    return outputs.sub_(outputs.mean(1, keepdim=True)).mul_(F.one_hot(targets, CLASSES)).square().mean()


@pytest.mark.parametrize("loss", [masked_out, cooled, with_an_axis, centred])
def test_a_loss_may_write_to_the_outputs(loss):
    model, x, labels = network(), normal(SAMPLES, 4), torch.tensor([0, 2, 0, 2, 2, 0])
    d = lnp.decompose(model, (x, labels), loss, estimator="exact")
    out = model(x)
    assert_agrees(d, dense(model, out, loss(out.clone(), labels), d.loss_terms), torch.float64)
    assert d.population is not None, "it is found to be a mean over samples"
    change = lnp.measured_loss_change(model, (x, labels), loss, learning_rate=1e-6)
    assert change == pytest.approx(-1e-6 * d.rate, rel=1e-4)
