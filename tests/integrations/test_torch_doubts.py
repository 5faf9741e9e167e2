"""Which loss was measured is told, and those that were probably not meant get a note: PyTorch's own and the user's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from lnp.losses import doubts

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(24, 6, generator=GENERATOR), torch.randint(0, 4, (24,), generator=GENERATOR)
IMAGES, PIXELS = torch.randn(3, 2, 4, 5, generator=GENERATOR), torch.randint(0, 4, (3, 4, 5), generator=GENERATOR)


def net(*layers, size=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, size), *layers)


def pixels(*layers):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 1), *layers)


def own(outputs, targets):
    return F.cross_entropy(outputs, targets)


CASES = {
    "twice": (net(nn.Softmax(-1)), (INPUTS, LABELS), nn.CrossEntropyLoss(), doubts.TWICE),
    "twice, function": (net(nn.Softmax(-1)), (INPUTS, LABELS), F.cross_entropy, doubts.TWICE),
    "twice, own": (net(nn.Softmax(-1)), (INPUTS, LABELS), own, doubts.TWICE),
    "twice, inferred": (net(nn.Softmax(-1)), (INPUTS, LABELS), None, doubts.TWICE),
    "twice, images": (pixels(nn.Softmax(1)), (IMAGES, PIXELS), nn.CrossEntropyLoss(), doubts.TWICE),
    "twice, images, own": (pixels(nn.Softmax(1)), (IMAGES, PIXELS), own, doubts.TWICE),
    "twice, dictionary": (net(nn.Softmax(-1)), (INPUTS, LABELS), None, doubts.TWICE),
    "no logarithms": (net(), (INPUTS, LABELS), nn.NLLLoss(), doubts.NO_LOGARITHMS),
    "sigmoid": (net(nn.Sigmoid()), (INPUTS, INPUTS[:, :4].abs() % 1), nn.BCEWithLogitsLoss(), doubts.TWICE_BINARY),
    "one-hot": (net(), (INPUTS, F.one_hot(LABELS, 4).float()), None, doubts.ONE_HOT),
    "broadcast": (net(size=1), (INPUTS, INPUTS[:, 0]), nn.MSELoss(), doubts.PAIRS),
    "right": (net(), (INPUTS, LABELS), nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.arange(1.0, 5)), None),
    "right, images": (pixels(), (IMAGES, PIXELS), nn.CrossEntropyLoss(), None),
    "right, logarithms": (net(nn.LogSoftmax(-1)), (INPUTS, LABELS), nn.NLLLoss(), None),
    "right, one-hot": (net(), (INPUTS, F.one_hot(LABELS, 4).float()), nn.MSELoss(), None),
    "right, flat": (net(nn.Flatten(0), size=1), (INPUTS, INPUTS[:, 0]), nn.MSELoss(), None),
}
ALL = {text for name, text in vars(doubts).items() if name.isupper() and isinstance(text, str)}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", CASES)
def test_notes(name):
    model, batch, loss, expected = CASES[name]
    forward = (lambda model, inputs: {"logits": model(inputs)}) if "dictionary" in name else None
    d = lnp.decompose(model, batch, loss, forward=forward)
    assert [note for note in d.notes if note in ALL] == ([] if expected is None else [expected])
    assert d.evidence == {}


def test_targets_without_rows_are_left_alone():
    """Sparse ones, which only the user's loss can read."""

    def squared(outputs, targets):
        return (outputs - targets.to_dense()).square().mean()

    batch = INPUTS, F.one_hot(LABELS, 4).float()
    expected = lnp.decompose(net(), batch, "mse")
    d = lnp.decompose(net(), (INPUTS, batch[1].to_sparse()), squared)
    assert (d.loss, d.rate) == pytest.approx((expected.loss, expected.rate))
    assert d.notes == ()


def test_names():
    model, batch = net(), (INPUTS, LABELS)
    assert lnp.decompose(model, batch).loss_name == "cross-entropy of logits, inferred from the targets"
    assert lnp.decompose(model, batch, nn.CrossEntropyLoss()).loss_name.endswith(".CrossEntropyLoss")
    assert lnp.decompose(model, batch, own).loss_name.endswith("test_torch_doubts.own")

    def computed(model, inputs):
        outputs = model(inputs["x"])
        return {"loss": F.cross_entropy(outputs, inputs["labels"]), "outputs": outputs}

    d = lnp.decompose(model, {"x": INPUTS, "labels": LABELS}, forward=computed)
    assert d.loss_name == "the model's own loss"


@pytest.mark.parametrize(("given", "name"), [
    ((), "the loss of the training step"), ((LABELS, F.cross_entropy), "torch.nn.functional.cross_entropy"),
])  # fmt: skip
def test_a_training_step_tells_as_much(given, name):
    model = net(nn.Softmax(-1))
    with lnp_torch.shared(model) as step:
        loss = F.cross_entropy(model(INPUTS), LABELS)
    d = step.backward(loss, *given)
    assert d.loss_name == name
    assert (doubts.TWICE in d.notes) == bool(given)
