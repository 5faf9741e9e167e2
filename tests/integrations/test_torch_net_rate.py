"""Net rates of watched PyTorch runs: the optimizer's learning rate, the samples' own losses, and nothing changed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from integrations.torch_runs import INPUTS, TARGETS, hugging_face, lightning, loader, same, seed_everything, texts
from lnp_torch.lightning import LNPCallback
from lnp_torch.optimizers import step_size
from lnp_torch.transformers import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the hosts' advice on workers and accelerators
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
X, Y = INPUTS[:12], TARGETS[:12]


def parts(loss, targets=Y, network=None):
    network = nn.Linear(6, 3) if network is None else network
    d = lnp.decompose(network, (X, targets), loss, sample_losses=True)
    with torch.no_grad():
        return d, np.asarray(d.sample_losses.parts), network(X)


class Counting(nn.Module):
    """A loss that branches on values, which cannot be mapped, and counts its calls."""

    calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        return F.cross_entropy(outputs, targets) if float(outputs.sum()) < 1e9 else outputs.sum()


class Growing(nn.Module):
    """A loss that weighs more at each call."""

    calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        return self.calls * F.cross_entropy(outputs, targets)


WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


@pytest.mark.parametrize(
    "loss",
    [None, F.cross_entropy, nn.CrossEntropyLoss(WEIGHTS), nn.CrossEntropyLoss(reduction="sum"), Counting(), Growing()],
)
def test_each_sample_s_part_of_the_loss(loss):
    torch.manual_seed(0)
    d, found, outputs = parts(loss)
    single = F.cross_entropy(outputs, Y, WEIGHTS if getattr(loss, "weight", None) is not None else None,
                             reduction="none").numpy()  # fmt: skip
    assert found == pytest.approx(single * d.loss / single.sum(), rel=1e-5)
    assert getattr(loss, "calls", 0) == 0


@pytest.mark.parametrize("loss", [lambda f, y: f.var(), lambda f, y: (f.mean(0) ** 2).sum()])
def test_a_loss_that_compares_samples_has_no_parts(loss):
    assert np.isnan(parts(loss)[1]).all()


def test_parameter_groups_and_momentum():
    a, b = (nn.Linear(2, 1).parameters() for _ in range(2))
    assert step_size(torch.optim.SGD([{"params": a}, {"params": b, "weight_decay": 1.0}], 0.1)) == (0.1, "")
    a, b = (nn.Linear(2, 1).parameters() for _ in range(2))
    rate, reason = step_size(torch.optim.SGD([{"params": a}, {"params": b, "lr": 1.0}], 0.1))
    assert rate is None and "learning rates of their own" in reason  # noqa: PT018


def loop(tracker=None):
    """SGD with momentum and a learning rate that is halved at each step; a network with dropout."""
    seed_everything()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    halved = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    if tracker is not None:
        tracker = tracker(optimizer)
    for step, (x, y) in enumerate(loader()):
        if tracker is not None:
            tracker.observe(step, model, (x, y))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step(), halved.step()
    return model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), tracker


def test_a_plain_loop_and_its_optimizer():
    *watched, tracker = loop(lambda o: lnp.Tracker(schedule=2, batch=(X, Y), learning_rate=o, on_error="raise"))
    assert same(watched, loop()[:3])
    rows = tracker.history.rows()
    # 0.1 (1 + 1/2) / (1 - 0.5) for the first two steps, a quarter of it for the next two
    assert [row.get("net/learning_rate_sum") for row in rows[:3]] == [None, *map(pytest.approx, (0.3, 0.075))]
    for before, row in itertools.pairwise(rows):
        assert row["net/loss_fall"] == pytest.approx(before["measured/loss"] - row["measured/loss"], abs=1e-6)
        assert row["net/rate_stderr"] > 0
        assert np.isfinite(row["net/chi_pos"])


def test_lightning(tmp_path):
    callback = LNPCallback(schedule=2, batch=(X, Y), on_error="raise")
    watched = lightning(tmp_path / "a", callback)
    assert same(watched[:4], lightning(tmp_path / "b")[:4])
    row = callback.tracker.history.rows()[-1]
    assert row["net/learning_rate_sum"] == pytest.approx(0.02)
    assert row["net/rate_stderr"] > 0
    assert "net/chi_pos" not in row
    assert any("AdamW rescales" in (row.get("notes") or "") for row in callback.tracker.history.rows())


def test_hugging_face(tmp_path):
    rows = texts()[:5]
    own = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    def tracked(trainer):
        return attach(trainer, schedule=2, batch=own, on_error="raise", max_probes=4)

    given = {"arguments": {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "linear"}}
    *watched, _, tracker = hugging_face(tmp_path / "a", tracked, **given)
    assert same(watched[:4], hugging_face(tmp_path / "b", **given)[:4])
    rows = tracker.history.rows()
    assert rows[1]["net/learning_rate_sum"] == pytest.approx(0.1 + 0.075)  # of four steps, down to zero
    assert rows[1]["measured/loss_terms"] == 5 * 3  # labels of its own, and not those of the update
    assert rows[1]["net/loss_fall"] == pytest.approx(rows[0]["measured/loss"] - rows[1]["measured/loss"], abs=1e-6)
    assert rows[1]["net/rate_stderr"] > 0
    assert "net/chi_pos" in rows[1]
