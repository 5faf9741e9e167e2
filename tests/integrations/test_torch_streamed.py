"""Loaders measured as one batch, in PyTorch: what their batches' losses average, and the errors of the probes."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lnp
from lnp_torch import backend

NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "loss_terms")
torch.manual_seed(5)
X, Y = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 12)).double()


def loader(x=X, y=Y, size=4):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def agree(found, expected, names=NUMBERS):
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-10), name


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(weight=torch.rand(12).double() + 0.1, ignore_index=3)])
def test_a_loader_is_measured_as_its_data_set(loss):
    found = lnp.decompose(network(), loader(), loss, batches=math.inf, estimator="exact")
    agree(found, lnp.decompose(network(), (X, Y), loss, estimator="exact"))


class Language(nn.Module):
    """Has a loss of its own: the mean over the labels that are not ignored."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 5), nn.Linear(5, 12)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids).tanh())
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_s_own_loss_counts_its_labels():
    model, tokens = Language().double(), torch.randint(0, 12, (10, 7))
    labels = torch.where(torch.rand(10, 7) < 0.5, -100, tokens)
    batches = [{"input_ids": tokens[s : s + 3], "labels": labels[s : s + 3]} for s in range(0, 10, 3)]
    found = lnp.decompose(model, batches, batches=4, estimator="exact")
    agree(found, lnp.decompose(model, {"input_ids": tokens, "labels": labels}, estimator="exact"))


def test_large_gradients_come_by_themselves(monkeypatch):
    expected = lnp.decompose(network(), loader(), batches=8, estimator="exact", by_layer=True)
    monkeypatch.setattr(backend, "LARGE", 30)
    found = lnp.decompose(network(), loader(), batches=8, estimator="exact", by_layer=True)
    agree(found, expected)
    assert found.layers["2"].rate == pytest.approx(expected.layers["2"].rate, rel=1e-10)


def test_random_probes_reach_the_tolerance_together():
    model = network()
    whole = lnp.decompose(model, (X, Y), estimator="exact")
    found = [lnp.decompose(model, loader(), batches=8, seed=s, rtol=0.05, estimator="per_sample") for s in range(40)]
    off = np.array([(d.chi_net - whole.chi_net) / d.chi_net_stderr for d in found])
    assert np.mean([d.chi_net_stderr / d.chi_net for d in found]) < 0.07
    assert 0.5 < np.sqrt(np.mean(off**2)) < 1.5
    assert max(d.probes for d in found) < 8


def test_nothing_of_the_model_or_its_random_state_is_changed():
    model = network()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    lnp.decompose(model, loader(), batches=3)
    lnp.decompose(model, ((torch.randn(4, 6, dtype=torch.float64), Y[:4]) for _ in range(3)), batches=3)
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
