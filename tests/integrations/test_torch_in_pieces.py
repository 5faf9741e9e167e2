"""Micro-batches: the whole batch's numbers, whatever the loss couples, and no more than a piece in one forward pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lnp

NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "loss_terms")
torch.manual_seed(5)
X, Y = torch.randn(13, 6, dtype=torch.float64), torch.arange(13) % 3
SIZES = (1, 4, 6, 50)  # the last piece holds one sample of 13 in two of them


def agree(found, expected, rtol=1e-12):
    for name in NUMBERS:
        assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)), rel=rtol), name


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def contrastive(outputs, targets):
    return torch.logsumexp(outputs @ outputs.T, dim=1).mean()


LOSSES = {"cross-entropy": None, "contrastive": contrastive, "sum": nn.CrossEntropyLoss(reduction="sum")}


class Rows(TorchFunctionMode):
    """Watches how many samples go through a linear layer at once."""

    most = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.most = max(self.most, len(args[0]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_any_loss(loss, size):
    with Rows() as rows:
        found = lnp.decompose(network(), (X, Y), LOSSES[loss], microbatch=size, estimator="exact")
    agree(found, lnp.decompose(network(), (X, Y), LOSSES[loss], estimator="exact"))
    assert rows.most == min(max(size, 2), 13)  # of which two are compared


class Language(nn.Module):
    """Looks up tokens and positions, and computes a loss of its own."""

    def __init__(self, couples):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(12, 5), nn.Embedding(7, 5)
        self.head, self.couples = nn.Linear(5, 12), couples

    def forward(self, input_ids, labels):
        hidden = self.tokens(input_ids) + self.positions(torch.arange(7)[None])
        logits = self.head(hidden.tanh())
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.couples:
            loss = loss + torch.logsumexp(logits.mean(1) @ logits.mean(1).T, dim=1).mean()
        return {"loss": loss, "logits": logits}


TOKENS = torch.randint(0, 12, (13, 7))
LABELS = torch.where(torch.rand(13, 7) < 0.5, -100, TOKENS)
LABELS[4] = -100  # of which none counts
SEQUENCES = {"input_ids": TOKENS, "labels": LABELS}


@pytest.mark.parametrize("size", SIZES)
def test_a_model_s_own_loss(size):
    with Rows() as rows:
        found = lnp.decompose(Language(False).double(), SEQUENCES, microbatch=size, estimator="exact")
    whole = lnp.decompose(Language(False).double(), SEQUENCES, estimator="exact")
    agree(found, whole)
    assert found.population.rate == pytest.approx(whole.population.rate)
    assert found.population.rate_stderr == pytest.approx(whole.population.rate_stderr)
    assert rows.most == min(max(size, 3), 13)  # of which a mean over samples is seen
    assert found.loss_name == whole.loss_name == "the model's own loss"
    assert found.notes == whole.notes  # samples are taken apart by rules, also where a piece holds one


class Summed(Language):
    """Divides a sum by a number of terms that is given, as where gradients are accumulated."""

    def __init__(self):
        super().__init__(False)

    def forward(self, input_ids, labels):
        logits = super().forward(input_ids, labels)["logits"]
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 500,
            "logits": logits,
        }


@pytest.mark.parametrize("size", SIZES)
def test_a_model_s_own_sum(size):
    found = lnp.decompose(Summed().double(), SEQUENCES, microbatch=size, estimator="exact")
    agree(found, lnp.decompose(Summed().double(), SEQUENCES, estimator="exact"))


def test_a_model_s_own_loss_that_couples_samples():
    with_pieces = lnp.decompose(Language(True).double(), SEQUENCES, microbatch=4, estimator="exact", loss_terms=5)
    agree(with_pieces, lnp.decompose(Language(True).double(), SEQUENCES, estimator="exact", loss_terms=5))


def test_single_sequences_are_taken_apart_by_rules():
    one = {name: array[:1] for name, array in SEQUENCES.items()}
    assert not any("run on their own" in note for note in lnp.decompose(Language(False), one).notes)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(16), nn.Dropout(0.5)])
def test_what_belongs_to_the_batch_is_that_of_the_whole(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Tanh(), nn.Linear(16, 3)).double()
    torch.manual_seed(1)
    found = lnp.decompose(model, (X, Y), microbatch=4, estimator="exact")
    torch.manual_seed(1)
    agree(found, lnp.decompose(model, (X, Y), estimator="exact"))


def test_samples_that_interact_are_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x - x.mean(0))

    with pytest.raises(ValueError, match="microbatch=4 was asked for, but"):
        lnp.decompose(Mixing().double(), (X, Y), microbatch=4)
