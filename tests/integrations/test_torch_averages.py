"""What a loss averages is seen in the calls that do it, and outputs are what the loss was computed from."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_reference import assert_agrees, dense

SAMPLES, TOKENS, CLASSES = 6, 4, 3
F64 = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def language_model():
    return nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


WORDS = torch.randint(0, 7, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(0, CLASSES, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(3))
LABELS[0, 1:] = 1
MASK = LABELS.ne(1).double()
KEPT, ALL = int(MASK.sum()), SAMPLES * TOKENS


def each(outputs, labels):
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")


def shifted(outputs, labels, ignored=1, **more):
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=ignored, **more)


class Loss(nn.Module):
    def forward(self, outputs, labels):
        return F.nll_loss(outputs.log_softmax(-1).movedim(-1, 1), labels, ignore_index=1)


def connectionist(outputs, labels, **more):
    lengths = torch.full((SAMPLES,), TOKENS)
    return F.ctc_loss(outputs.log_softmax(-1).movedim(1, 0), labels[:, :2].clamp(min=1), lengths, lengths // 2, **more)


LOSSES = {  # loss, n, a word of the only note
    "mean": (lambda o, y: each(o, y).mean(), ALL, None),
    "mean of means": (lambda o, y: each(o, y).view(SAMPLES, TOKENS).mean(1).mean(), ALL, None),
    "mean of sums": (lambda o, y: each(o, y).view(SAMPLES, TOKENS).sum(1).mean(), SAMPLES, None),
    "ignored label": (lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten(), ignore_index=1), KEPT, None),
    "module": (Loss(), KEPT, None),
    "shifted": (shifted, int(MASK[:, 1:].sum()), None),
    "shifted, summed, divided": (
        lambda o, y: shifted(o, y, reduction="sum") / y[:, 1:].ne(1).sum(), int(MASK[:, 1:].sum()), None
    ),
    "in place": (lambda o, y: each(o, y).sum().div_(ALL), ALL, None),
    "times one by n": (lambda o, y: each(o, y).sum() * (1 / ALL), ALL, None),
    "another dtype": (lambda o, y: each(o.float(), y).sum().double() / ALL, ALL, None),
    "masked": (lambda o, y: (each(o, y) * MASK.flatten()).sum() / MASK.sum(), KEPT, f"divided by {KEPT}"),
    "by the samples": (lambda o, y: each(o, y).sum() / SAMPLES, SAMPLES, f"divided by {SAMPLES}"),
    "sum": (lambda o, y: each(o, y).sum(), 1, "is a sum"),
    "half": (lambda o, y: 0.5 * each(o, y).mean(), ALL, None),
    "of heads": (
        lambda o, y: torch.stack([F.cross_entropy(o[:, place], y[:, place]) for place in range(TOKENS)]).mean(),
        ALL, None,
    ),
    "of single samples": (
        lambda o, y: sum(F.cross_entropy(a, b) for a, b in zip(o, y, strict=True)) / SAMPLES, ALL, None
    ),
    "halves": (lambda o, y: (each(o, y)[:12].mean() + each(o, y)[12:].mean()) / 2, ALL, None),
    "added": (
        lambda o, y: each(o, y).mean() + o.square().mean(dim=-1).mean(), ALL, f"averages over {ALL} and {3 * ALL} terms"
    ),
    "two heads, added": (
        lambda o, y: F.cross_entropy(o[:, 0], y[:, 0]) + 0.4 * F.cross_entropy(o[:, 1], y[:, 1]), SAMPLES,
        "2 averages over 6 terms each",
    ),
    "of parts of different sizes": (
        lambda o, y: (each(o, y)[:9].mean() + each(o, y)[9:].mean()) / 2, 9, "averages over 9 and 15 terms"
    ),
    "of two kinds": (
        lambda o, y: each(o, y).mean() + 0.1 * o.square().mean(), ALL, f"averages over {ALL} and {3 * ALL} terms"
    ),
    "and something else": (lambda o, y: each(o, y).mean() + o.abs().max(), ALL, "a part of the loss"),
    "normalised inside": (lambda o, y: ((o / o.abs().mean()) ** 2).mean(), 3 * ALL, None),
    "no average": (lambda o, y: torch.logsumexp(each(o, y), 0), ALL, "assumed"),
    "weighted": (
        lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten(), weight=torch.tensor([1.0, 2.0, 3.0]).double()),
        ALL, "weighted by class",
    ),
    "several labels": (lambda o, y: F.multilabel_soft_margin_loss(o[:, 0], F.one_hot(y[:, 0], 3)), SAMPLES, None),
    "distances": (
        lambda o, y: F.cosine_embedding_loss(o[:, 0], o[:, 1], y[:, 0].clamp(min=1)), SAMPLES, None
    ),
    "triplets": (lambda o, y: F.triplet_margin_loss(o[:, 0], o[:, 1], o[:, 2]), SAMPLES, None),
    "connectionist": (connectionist, SAMPLES, None),
    "connectionist, summed": (lambda o, y: connectionist(o, y, reduction="sum"), 1, "is a sum"),
    "teacher": (
        lambda o, y: F.kl_div(o.log_softmax(-1), torch.full_like(o, 1 / 3), reduction="batchmean"), SAMPLES, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_number_of_terms(name):
    loss, terms, note = LOSSES[name]
    model = language_model()
    d = lnp.decompose(model, (WORDS, LABELS), loss, estimator="exact", population=False)
    out = model(WORDS)
    tolerance = torch.float32 if name == "another dtype" else F64
    assert_agrees(d, dense(model, out, loss(out, LABELS), terms), tolerance)
    assert d.loss_terms == terms
    assert len(d.notes) == bool(note), d.notes
    assert note is None or note in d.notes[0]
    with lnp_torch.shared(model) as step:
        value = loss(model(WORDS), LABELS)
    shared = step.backward(value, LABELS, loss, estimator="exact", population=False)
    assert shared.loss_terms == terms


# --- Outputs -------------------------------------------------------------------------------------------------------

Named = namedtuple("Named", "logits aux_logits")


@dataclass
class Returned:
    logits: torch.Tensor
    loss: torch.Tensor
    value: torch.Tensor


class Heads(nn.Module):
    """A body and two heads, returned as `made` says."""

    def __init__(self, made):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)
        self.made = made
        self.double()

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.made(self.first(h), self.second(h))


def both(a, b, labels):
    return F.cross_entropy(a, labels) + 0.4 * F.mse_loss(b, F.one_hot(labels, CLASSES).double())


HEADS = {  # what is returned, the user's loss of it
    "named tuple": (Named, lambda o, y: both(o.logits, o.aux_logits, y)),
    "names that mean something elsewhere": (
        lambda a, b: {"logits": a, "loss": b}, lambda o, y: both(o["logits"], o["loss"], y)
    ),
    "actor and critic": (lambda a, b: {"logits": a, "value": b}, lambda o, y: both(o["logits"], o["value"], y)),
    "dataclass": (lambda a, b: Returned(a, b, a.detach()), lambda o, y: both(o.logits, o.loss, y)),
    "with an output that the loss leaves out": (
        lambda a, b: {"hidden": b.repeat(2, 1) ** 2, "logits": a, "aux_loss": b},
        lambda o, y: both(o["logits"], o["aux_loss"], y),
    ),
    "tuple": (lambda a, b: (a, b), lambda o, y: both(*o, y)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_loss_gets_what_the_model_returned(name):
    made, loss = HEADS[name]
    model, x, labels = Heads(made), normal(SAMPLES, 4), torch.arange(SAMPLES) % CLASSES
    d = lnp.decompose(model, (x, labels), loss, estimator="exact")
    h = torch.tanh(model.body(x))
    out = torch.cat([model.first(h), model.second(h)], 1)
    expected = dense(model, out, both(out[:, :CLASSES], out[:, CLASSES:], labels), SAMPLES)
    assert_agrees(d, expected, F64)
    with lnp_torch.shared(model) as step:
        value = loss(model(x), labels)
    assert_agrees(step.backward(value, labels, loss, estimator="exact"), expected, F64)
    change = lnp.measured_loss_change(model, (x, labels), loss, learning_rate=1e-6)
    assert change == pytest.approx(-1e-6 * d.rate, rel=1e-4)


def own_named(a, b, labels):
    return {"loss": both(a, b, labels), "logits": a, "others": [b, a.detach()]}


def own_first(a, b, labels):
    return both(a, b, labels), a, b


def own_of_another(a, b, labels):
    """The second output is computed from the first, and the loss from both."""
    c = b * a.sigmoid()
    return {"loss": both(a, c, labels), "logits": a, "c": c}


def own_of_hidden(a, b, labels):
    """The logits are no part of the loss, other outputs are."""
    return {"loss": both(b, 2 * b, labels), "logits": a, "hidden": b}


OWN = {
    own_named: lambda a, b: [a, b], own_first: lambda a, b: [a, b],
    own_of_another: lambda a, b: [a, b * a.sigmoid()], own_of_hidden: lambda a, b: [b],
}  # fmt: skip


class OwnLoss(Heads):
    def forward(self, x, targets):
        h = torch.tanh(self.body(x))
        return self.made(self.first(h), self.second(h), targets)


@pytest.mark.parametrize("own", OWN, ids=lambda own: own.__name__)
def test_outputs_are_what_a_models_own_loss_was_computed_from(own):
    model, x, labels = OwnLoss(own), normal(SAMPLES, 4), torch.arange(SAMPLES) % CLASSES
    d = lnp.decompose(model, {"x": x, "targets": labels}, estimator="exact")
    h = torch.tanh(model.body(x))
    outputs = OWN[own](model.first(h), model.second(h))
    trace = sum(
        gradient.square().sum().item()
        for one in torch.cat([output.flatten() for output in outputs])
        for gradient in torch.autograd.grad(one, list(model.parameters()), retain_graph=True, allow_unused=True)
        if gradient is not None
    )
    returned = model(x, labels)
    loss = returned[0] if isinstance(returned, tuple) else returned["loss"]
    loss.backward()
    rate = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert d.rate == pytest.approx(rate, rel=1e-10)
    assert d.chi_net == pytest.approx(trace / d.loss_terms, rel=1e-10)
    assert d.loss == pytest.approx(loss.item())
    assert not any("do not come from the outputs" in note for note in d.notes)
    assert math.isclose(d.chi_loss * d.chi_net * d.chi_pos, rate, rel_tol=1e-10)
    assert d.population is not None, d.notes


def test_a_models_own_loss_is_a_mean_only_where_it_is_shown():
    """In each batch anew: the first one says nothing of the next."""

    def gated(a, b, labels):
        coupled = (a.mean(0) ** 2).sum() if bool((labels == 0).any()) else 0.0
        return {"loss": F.cross_entropy(a, labels) + coupled, "logits": a}

    model, x = OwnLoss(gated), normal(SAMPLES, 4)
    found = [
        lnp.decompose(model, {"x": x, "targets": labels}).population is not None
        for labels in (torch.arange(SAMPLES) % 2 + 1, torch.zeros(SAMPLES).long(), torch.arange(SAMPLES) % 2 + 1)
    ]
    assert found == [True, False, True]


@pytest.mark.parametrize(
    "batch", [{"x": normal(SAMPLES, 4)}, {"x": normal(SAMPLES, 4), "labels": torch.zeros(SAMPLES)}]
)
def test_a_model_without_a_loss_is_refused(batch):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4, dtype=F64))
    model.forward = lambda x, labels=None: {"logits": x * model.weight}
    with pytest.raises(ValueError, match=r"returned no loss for it that can be differentiated\. Expected a model that"):
        lnp.decompose(model, batch)
    model.forward = lambda x, labels=None: {"loss": (x * model.weight).sum()}
    with pytest.raises(ValueError, match="none of the outputs that it was computed from"):
        lnp.decompose(model, batch)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy, nn.MSELoss()])
def test_pytorchs_losses_take_one_tensor(loss):
    batch = normal(SAMPLES, 4), torch.arange(SAMPLES) % CLASSES
    with pytest.raises(TypeError, match="a loss that takes what the model returns, whole"):
        lnp.decompose(Heads(Named), batch, loss)
