"""A failing measurement ends no Trainer's run; what cannot be measured is said at attach; detach leaves no trace."""

from __future__ import annotations

import types

import pytest
import torch
import transformers

from integrations.torch_runs import (
    REASON,
    hugging_face,
    language_model,
    once,
    one_thread,
    out_of_memory,
    refusing,
    same,
    warned_of,
)
from lnp_torch.transformers import attach, detach

told, refused = pytest.fixture(warned_of), pytest.fixture(refusing)
_one_thread = pytest.fixture(one_thread, autouse=True)


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
    assert "without the values of step 0 in the trainer's log" in told()[0]


def test_batches_that_cannot_be_prepared(tmp_path, told, monkeypatch):
    def unreadable(*given):
        raise KeyError("labels")

    monkeypatch.setattr("lnp_torch.transformers._stand_in", unreadable)
    *watched, _, tracker = hugging_face(tmp_path / "a", lambda trainer: attach(trainer, schedule=1))
    assert same(watched, list(hugging_face(tmp_path / "b")[:4]))
    tracker.close()
    once(told(), "KeyError: 'labels'", 3)


def test_a_refused_model_in_hugging_face(refused, tmp_path, told):
    *watched, _, tracker = hugging_face(tmp_path / "a", lambda trainer: attach(trainer, schedule=1))
    assert same(watched, list(hugging_face(tmp_path / "b")[:4]))
    tracker.close()
    once(told(), REASON, 4)

    for first in (True, False):  # at the first step, although nothing is due

        def one_of_many(trainer, first=first):
            trainer.is_world_process_zero = lambda: first
            return attach(trainer, schedule=[3], on_error="raise")

        with pytest.raises(ValueError, match=REASON):
            hugging_face(tmp_path, one_of_many)


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
