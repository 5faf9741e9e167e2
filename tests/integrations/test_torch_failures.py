"""A failing measurement ends no run of PyTorch's hosts: one warning, and the run ends as the unwatched one does."""

from __future__ import annotations

import types

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_runs import (
    REASON,
    STEPS,
    Module,
    lightning,
    loader,
    network,
    once,
    one_thread,
    out_of_memory,
    randomness,
    refusing,
    same,
    seed_everything,
    warned_of,
)
from lnp_torch.lightning import LNPCallback

told, refused = pytest.fixture(warned_of), pytest.fixture(refusing)
_one_thread = pytest.fixture(one_thread, autouse=True)


# --- plain loops -----------------------------------------------------------------------------------------------------


def plain(step_of, model=None):
    """`step_of(step, model, batch, loss_of, update)` takes each step."""
    seed_everything()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def update():
        optimizer.step(), optimizer.zero_grad()

    for step, batch in enumerate(loader()):
        step_of(step, model, batch, lambda batch=batch: F.cross_entropy(model(batch[0]), batch[1]), update)
    return model.state_dict(), optimizer.state_dict(), randomness()


def unwatched(step, model, batch, loss_of, update):
    loss_of().backward()
    update()


def observing(tracker):
    def step_of(step, model, batch, loss_of, update):
        tracker.observe(step, model, batch)
        unwatched(step, model, batch, loss_of, update)

    return step_of


def stepping(tracker):
    def step_of(step, model, batch, loss_of, update):
        with tracker.step(step, model, batch):
            unwatched(step, model, batch, loss_of, update)

    return step_of


@pytest.mark.parametrize("way", [observing, stepping])
def test_a_plain_loop(way, told):
    tracker = lnp.Tracker(schedule=1, loss=out_of_memory)
    assert same(plain(way(tracker)), plain(unwatched))
    tracker.close()
    assert len(tracker.history) == 0
    once(told(), "OutOfMemoryError: Tried to allocate", STEPS - 1)
    with pytest.raises(torch.OutOfMemoryError):
        plain(way(lnp.Tracker(schedule=1, loss=out_of_memory, on_error="raise")))


@pytest.mark.parametrize("way", [observing, stepping])
def test_a_refused_model_in_a_plain_loop(way, refused, told):
    tracker = lnp.Tracker(schedule=1)
    assert same(plain(way(tracker)), plain(unwatched))
    tracker.close()
    once(told(), REASON, STEPS - 1)
    for rank in (0, 1):
        with pytest.raises(ValueError, match=REASON):
            plain(way(lnp.Tracker(schedule=1, rank=rank, on_error="raise")))


def test_an_idle_rank_with_a_refused_model(refused, told):
    assert same(plain(observing(lnp.Tracker(schedule=1, rank=1))), plain(unwatched))
    assert told() == []


# --- shared steps ----------------------------------------------------------------------------------------------------


def sharing(tracker, **given):
    def step_of(step, model, batch, loss_of, update):
        with tracker.shared(step, model) as shared:
            loss = loss_of()
        shared.backward(loss, batch[1], F.cross_entropy, **given)
        update()

    return step_of


def fail(*args):
    raise RuntimeError("it cannot be watched")


def failing_shared_step(monkeypatch, where, on_error):
    """A tracker and arguments of `backward` for a shared step that fails there."""
    options, given = {}, {}
    if where == "made":
        monkeypatch.setattr(lnp_torch, "shared", fail)
    elif where == "entered":
        monkeypatch.setattr(type(lnp_torch.shared(network())), "__enter__", fail)
    elif where == "before its backward pass":
        given["loss_terms"] = -1
    else:
        options["by_layer"] = fail
    return lnp.Tracker(schedule=1, on_error=on_error, **options), given


WHERE = ["made", "entered", "before its backward pass", "after its backward pass"]
REASONS = {"before its backward pass": "loss_terms is -1"}


@pytest.mark.parametrize("where", WHERE)
def test_shared_steps(monkeypatch, where, told):
    tracker, given = failing_shared_step(monkeypatch, where, "warn")
    assert same(plain(sharing(tracker, **given)), plain(unwatched))
    tracker.close()
    assert len(tracker.history) == 0
    once(told(), REASONS.get(where, "it cannot be watched"), STEPS - 1)
    tracker, given = failing_shared_step(monkeypatch, where, "raise")
    with pytest.raises((RuntimeError, ValueError), match=REASONS.get(where, "it cannot be watched")):
        plain(sharing(tracker, **given))


def test_an_error_in_the_users_own_backward_pass_passes_through(told):
    class Diverging(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            raise FloatingPointError("diverged")

    model = torch.nn.Linear(6, 3)
    for on_error in ("warn", "raise"):
        tracker = lnp.Tracker(schedule=1, on_error=on_error)
        with tracker.shared(0, model) as shared:
            loss = F.cross_entropy(model(Diverging.apply(torch.randn(8, 6).requires_grad_())), torch.arange(8) % 3)
        with pytest.raises(FloatingPointError):
            shared.backward(loss, torch.arange(8) % 3, F.cross_entropy)
    assert told() == []


def test_shared_steps_are_still_measured(told):
    tracker = lnp.Tracker(schedule=1)
    assert same(plain(sharing(tracker)), plain(unwatched))
    assert tracker.history["step"].tolist() == list(range(STEPS))
    assert told() == []


def test_a_refused_model_in_shared_steps(refused, told):
    tracker = lnp.Tracker(schedule=1)
    assert same(plain(sharing(tracker)), plain(unwatched))
    tracker.close()
    once(told(), REASON, STEPS - 1)
    for rank in (0, 1):
        with pytest.raises(ValueError, match=REASON):
            plain(sharing(lnp.Tracker(schedule=1, rank=rank, on_error="raise")))


# --- Lightning -------------------------------------------------------------------------------------------------------


def unreadable(module, batch):
    raise KeyError("image")


LIGHTNING = {
    "loss": ({"loss": out_of_memory}, "OutOfMemoryError: Tried to allocate"),
    "prepare": ({"prepare": unreadable}, "KeyError: 'image'"),
    "batch": ({"prepare": lambda module, batch: (module, None)}, "Error"),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", LIGHTNING)
def test_lightning(kind, accumulated, tmp_path, told):
    options, reason = LIGHTNING[kind]
    more = {"accumulate_grad_batches": accumulated}
    watched = lightning(tmp_path / "a", LNPCallback(tmp_path / "run.jsonl", schedule=1, **options), **more)
    assert same(watched[:4], lightning(tmp_path / "b", **more)[:4])
    assert len(lnp.History.read(tmp_path / "run.jsonl")) == 0
    once(told(), reason, STEPS // accumulated - 1)


@pytest.mark.parametrize("kind", LIGHTNING)
def test_lightning_raises(kind, tmp_path, told):
    error = {"loss": torch.OutOfMemoryError, "prepare": KeyError, "batch": Exception}[kind]
    with pytest.raises(error):
        lightning(tmp_path, LNPCallback(schedule=1, on_error="raise", **LIGHTNING[kind][0]))


def test_lightnings_loggers(tmp_path, told, monkeypatch):
    log = pl.loggers.CSVLogger.log_metrics

    def only_its_own(self, metrics, step=None):
        if any(name.startswith("lnp/") for name in metrics):
            raise ConnectionError("no network")
        log(self, metrics, step)

    monkeypatch.setattr(pl.loggers.CSVLogger, "log_metrics", only_its_own)
    callback = LNPCallback(tmp_path / "run.jsonl", schedule=1)
    assert same(lightning(tmp_path / "a", callback)[:4], lightning(tmp_path / "b")[:4])
    assert len(lnp.History.read(tmp_path / "run.jsonl")) == STEPS
    once(told(), "ConnectionError: no network", STEPS - 1)
    assert "without the values of step 0 in CSVLogger" in told()[0]


def test_lightning_and_a_refused_module(refused, tmp_path, told):
    assert same(lightning(tmp_path / "a", LNPCallback(schedule=1))[:4], lightning(tmp_path / "b")[:4])
    once(told(), REASON, STEPS)
    module, first = Module(), LNPCallback(schedule=1, on_error="raise")
    for rank in (True, False):  # before the fit begins, in every process
        with pytest.raises(ValueError, match=REASON):
            first.on_fit_start(types.SimpleNamespace(is_global_zero=rank), module)
    LNPCallback(schedule=1).on_fit_start(types.SimpleNamespace(is_global_zero=False), module)
    assert len(told()) == 2


def test_lightning_goes_on_from_a_checkpoint_of_another_version(tmp_path, told):
    callback = LNPCallback(tmp_path / "run.jsonl", schedule=1)
    callback.load_state_dict({"version": 99})
    lightning(tmp_path, callback)
    assert len(lnp.History.read(tmp_path / "run.jsonl")) == STEPS
    assert "version 99" in told()[0]
