"""A failing measurement ends no run of PyTorch's hosts: one warning, and the run ends as the unwatched one does."""

from __future__ import annotations

import importlib
import types
import warnings

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_runs import (
    STEPS,
    Module,
    hugging_face,
    language_model,
    lightning,
    loader,
    network,
    randomness,
    same,
    seed_everything,
)
from lnp_torch.lightning import LNPCallback
from lnp_torch.transformers import attach, detach

REASON = "The parameters are sharded. Measure a checkpoint."


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def told():
    """What lnp warns of; the hosts have advice of their own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if str(w.message).startswith("lnp")]


@pytest.fixture
def refused(monkeypatch):
    monkeypatch.setattr(lnp_torch, "refusal", lambda model: REASON, raising=False)
    monkeypatch.setattr(lnp_torch, "evaluate", lambda *a, **k: pytest.fail("it was measured"))


def out_of_memory(outputs, targets):
    """A loss that does not fit, in the midst of a measurement."""
    torch.rand(3)
    raise torch.OutOfMemoryError(f"Tried to allocate {torch.randint(9, ()).item()} GiB")


def once(texts, reason, times):
    """Told once, and at the end how often it came again."""
    first, second = texts
    assert reason in first
    assert f"{times} times more" in second


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


def failing(monkeypatch, where):
    """Has the shared step raise before it is made or entered, or around its own backward pass."""
    module = importlib.import_module("lnp_torch.shared")  # the package has a function of this name

    def fail(*args, **kwargs):
        raise RuntimeError("it cannot be watched")

    if where == "made":
        monkeypatch.setattr(lnp_torch, "shared", fail)
    elif where == "entered":
        monkeypatch.setattr(module.SharedStep, "__enter__", fail)
    elif where == "before the backward pass":
        monkeypatch.setattr(module, "_loss_gradient", fail)
    else:
        monkeypatch.setattr(module, "decompose", fail)


WHERE = ["made", "entered", "before the backward pass", "after the backward pass"]


@pytest.mark.parametrize("where", WHERE)
def test_shared_steps(monkeypatch, where, told):
    failing(monkeypatch, where)
    tracker = lnp.Tracker(schedule=1)
    assert same(plain(sharing(tracker)), plain(unwatched))
    tracker.close()
    assert len(tracker.history) == 0
    once(told(), "it cannot be watched", STEPS - 1)
    with pytest.raises(RuntimeError, match="it cannot be watched"):
        plain(sharing(lnp.Tracker(schedule=1, on_error="raise")))


def test_an_error_in_the_users_own_backward_pass_passes_through(told):
    class Diverging(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            raise FloatingPointError("diverged")

    model = network()
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


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def trainer_of(folder, kind=transformers.Trainer):
    args = transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    return kind(language_model(), args)


def test_hugging_face(tmp_path, told):
    watch = lambda trainer: attach(trainer, tmp_path / "run.jsonl", schedule=1, loss=out_of_memory)
    *watched, _, tracker = hugging_face(tmp_path / "a", watch)
    assert same(watched, list(hugging_face(tmp_path / "b")[:4]))
    tracker.close()
    assert len(tracker.history) == 0
    once(told(), "OutOfMemoryError: Tried to allocate", 3)
    with pytest.raises(torch.OutOfMemoryError):
        hugging_face(tmp_path, lambda trainer: attach(trainer, schedule=1, loss=out_of_memory, on_error="raise"))


def test_what_hugging_face_reports_to(tmp_path, told):
    class Service(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "lnp/chi_pos" in logs:
                raise ConnectionError("no network")

    def watch(trainer):
        trainer.add_callback(Service())
        return attach(trainer, schedule=1, max_probes=2)

    *watched, _, tracker = hugging_face(tmp_path / "a", watch)
    assert same(watched, list(hugging_face(tmp_path / "b")[:4]))
    tracker.close()
    assert tracker.history["step"].tolist() == [0, 1, 2, 3]
    once(told(), "ConnectionError: no network", 3)


def test_a_refused_model_in_hugging_face(refused, tmp_path, told):
    *watched, _, tracker = hugging_face(tmp_path / "a", lambda trainer: attach(trainer, schedule=1))
    assert same(watched, list(hugging_face(tmp_path / "b")[:4]))
    tracker.close()
    once(told(), REASON, 4)
    for rank in (0, 1):  # at the first step, although nothing is due
        with pytest.raises(ValueError, match=REASON):
            hugging_face(tmp_path, lambda trainer: attach(trainer, schedule=[3], rank=rank, on_error="raise"))


def sharded(trainer, by):
    if by == "FSDP":
        trainer.is_fsdp_enabled = True
    else:
        trainer.is_deepspeed_enabled = True
        trainer.accelerator = types.SimpleNamespace(
            state=types.SimpleNamespace(deepspeed_plugin=types.SimpleNamespace(zero_stage=int(by)))
        )
    return trainer


@pytest.mark.parametrize("by", ["FSDP", "3"])
@pytest.mark.parametrize("first", [True, False])
def test_trainers_that_shard_are_left_alone(by, first, tmp_path, told):
    trainer = sharded(trainer_of(tmp_path), by)
    trainer.is_world_process_zero = lambda: first
    before = dict(vars(trainer))
    tracker = attach(trainer, schedule=1)
    assert vars(trainer) == before
    assert len(tracker.history) == 0
    assert ["shards the parameters" in text for text in told()] == [True] * first
    with pytest.raises(ValueError, match="shards the parameters"):
        attach(trainer, schedule=1, on_error="raise")
    assert vars(trainer) == before


def test_zero_2_shards_no_parameters(tmp_path, told):
    trainer = sharded(trainer_of(tmp_path), "2")
    attach(trainer, schedule=1)
    assert "training_step" in vars(trainer)
    assert told() == []


def test_detach_leaves_the_trainer_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path)
    before, step = dict(vars(trainer)), trainer.training_step
    attach(trainer, schedule=1)
    detach(trainer)
    assert vars(trainer) == before
    assert trainer.training_step == step
    detach(trainer)

    own = lambda model, inputs, *rest: torch.zeros(())
    trainer.training_step = own
    attach(trainer, schedule=[])
    assert trainer.training_step(None, {}) == 0
    with pytest.raises(ValueError, match=r"detach\(trainer\) first"):
        attach(trainer)
    detach(trainer)
    assert trainer.training_step is own
    with pytest.raises(ValueError, match="has not put there"):
        detach(trainer)
