"""Measuring at averaged weights in PyTorch: an AveragedModel is a model, and nothing of it moves."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lnp
from integrations.torch_runs import INPUTS, TARGETS, same


def run(watched):
    """SGD with an average of the weights, at which a tracker measures while the run goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = lnp.Tracker(schedule=2, batch=(INPUTS[:16], TARGETS[:16]), learning_rate=optimizer, on_error="raise")
    for step in range(5):
        if watched:
            tracker.observe(step, averaged)
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
        averaged.update_parameters(model)
    return model, averaged, tracker


def test_an_averaged_model_is_measured_as_one_with_its_weights():
    model, averaged, tracker = run(watched=True)
    plain = [part.state_dict() for part in run(watched=False)[:2]]
    assert same([model.state_dict(), averaged.state_dict()], plain)  # n_averaged too
    model.load_state_dict(averaged.module.state_dict())
    d = lnp.decompose(averaged.eval(), (INPUTS, TARGETS))
    expected = lnp.decompose(model.eval(), (INPUTS, TARGETS))
    assert (d.loss, d.rate, d.chi_net, d.chi_pos) == (expected.loss, expected.rate, expected.chi_net, expected.chi_pos)
    assert "net/chi_pos" in tracker.history
    assert int(averaged.n_averaged) == 5
