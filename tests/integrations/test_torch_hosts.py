"""A run that is watched ends as one that is not, bit by bit: weights, optimizer, random states, logged losses."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lnp
from integrations.torch_runs import (
    INPUTS,
    STEPS,
    TARGETS,
    Module,
    hugging_face,
    language_model,
    lightning,
    loader,
    network,
    optimizers,
    randomness,
    same,
    seed_everything,
    texts,
)
from lnp_torch.lightning import LNPCallback
from lnp_torch.transformers import attach, detach

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the hosts' advice on workers and accelerators
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROBE = (INPUTS[:10], TARGETS[:10])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- plain loops ---------------------------------------------------------------------------------------------------


def plain(tracker=None, optimizer="sgd", accumulate=1, autocast=None):
    seed_everything()
    model = network()
    opt = optimizers(optimizer, model.parameters())
    losses, step = [], 0
    for index, batch in enumerate(loader()):
        if tracker is not None:
            tracker.observe(step, model, batch)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(batch[0]), batch[1]) / accumulate
        loss.backward()
        losses.append(loss.item())
        if (index + 1) % accumulate == 0:
            opt.step(), opt.zero_grad()
            step += 1
    return losses, model.state_dict(), opt.state_dict(), randomness()


PLAIN = {
    "sgd with momentum": {},
    "AdamW, accumulated": {"optimizer": "adamw", "accumulate": 4},
    "bfloat16": {"autocast": torch.bfloat16},
}
TRACKERS = {
    "every step": lambda: lnp.Tracker(schedule=1, by_layer=True),
    "another batch": lambda: lnp.Tracker(schedule=1, batch=PROBE),
    "a loader": lambda: lnp.Tracker(schedule=1, batch=loader()),
    "population": lambda: lnp.Tracker(schedule=1, population=True),
}


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("options", PLAIN)
def test_a_plain_loop_is_not_changed(options, tracker):
    watched = TRACKERS[tracker]()
    assert same(plain(watched, **PLAIN[options]), plain(None, **PLAIN[options]))
    assert len(watched.history) == (2 if "accumulated" in options else STEPS)


def test_a_difference_would_be_seen():
    class Careless(lnp.Tracker):
        def observe(self, step, model, batch=None, **values):
            torch.rand(())
            return super().observe(step, model, batch, **values)

    assert not same(plain(Careless(schedule=1)), plain())


# --- Lightning -----------------------------------------------------------------------------------------------------


LIGHTNING = {
    "plain": {},
    "clipping": {"gradient_clip_val": 0.1},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("options", LIGHTNING)
def test_lightning_is_not_changed(options, tmp_path):
    callback = LNPCallback(tmp_path / "run.jsonl", schedule=1, loss="cross_entropy")
    watched = lightning(tmp_path / "a", callback, **LIGHTNING[options])
    assert same(watched[:4], lightning(tmp_path / "b", **LIGHTNING[options])[:4])
    steps = STEPS // LIGHTNING[options].get("accumulate_grad_batches", 1)
    history = lnp.History.read(tmp_path / "run.jsonl")
    assert history["step"].tolist() == list(range(steps))
    # the very loss of the training step: in its precision, and with its dropout mask
    accumulated = LIGHTNING[options].get("accumulate_grad_batches", 1)
    assert history["loss"].tolist() == pytest.approx(watched[0][::accumulated], rel=1e-6)
    assert set(history["parameters"]) == {sum(p.numel() for p in network().parameters())}


def test_lightning_measures_what_decompose_does(tmp_path):
    module, seen = Module(), []

    class Beside(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            seen.append(lnp.decompose(pl_module, tuple(batch), seed=trainer.global_step).chi_pos)

    callback = LNPCallback(schedule=1)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback, Beside()],
                         enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, loader())
    assert callback.tracker.history["chi_pos"].tolist() == seen


def test_lightning_loggers_get_steps_that_self_log_would_drop(tmp_path):
    *_, trainer = lightning(tmp_path, LNPCallback(schedule=[0, 3, 5]))
    trainer.logger.save()
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows if row["lnp/chi_pos"]] == ["0", "3", "5"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_lightning_resumes_without_duplicates(tmp_path, on_disk):
    path = tmp_path / "run.jsonl" if on_disk else None
    *_, trainer = lightning(tmp_path, LNPCallback(path, schedule=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = LNPCallback(path, schedule=3)
    lightning(tmp_path, resumed, epochs=2, resume=tmp_path / "last.ckpt")
    assert resumed.tracker.history["step"].tolist() == [0, 2, 4, 6, 9, 12, 15]


def test_lightning_prepares_batches_of_another_form(tmp_path):
    class Named(Module):
        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    data = DataLoader([{"x": x, "y": y} for x, y in zip(INPUTS, TARGETS, strict=True)], batch_size=24)
    callback = LNPCallback(schedule=1, prepare=lambda module, batch: (module.net, (batch["x"], batch["y"])))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
                         enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(Named(), data)
    assert len(callback.tracker.history) == 3


def test_lightning_takes_a_tracker_or_its_options():
    tracker = lnp.Tracker(schedule=1)
    assert LNPCallback(tracker).tracker is tracker
    with pytest.raises(TypeError, match="received a tracker, and options"):
        LNPCallback(tracker, by_layer=True)


# --- Hugging Face --------------------------------------------------------------------------------------------------


def squared(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own: the mean of squared probabilities that are missing to one."""
    chosen = outputs.logits[..., :-1, :].softmax(-1).gather(-1, labels[..., 1:].clamp(min=0)[..., None])[..., 0]
    kept = labels[..., 1:].ne(-100)
    return (((1 - chosen) ** 2) * kept).sum() / num_items_in_batch


HUGGING_FACE = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": ({}, {"compute_loss_func": squared}),
    "bf16": ({"bf16": True}, {}),
    "clipping": ({"max_grad_norm": 0.01}, {}),
    "evaluation in between": ({"eval_strategy": "steps", "eval_steps": 1}, {"eval_dataset": texts(4)}),
}


@pytest.mark.parametrize("options", HUGGING_FACE)
def test_hugging_face_is_not_changed(options, tmp_path):
    arguments, more = HUGGING_FACE[options]
    given = {"arguments": arguments, "more": more}
    watch = lambda trainer: attach(trainer, tmp_path / "run.jsonl", schedule=1, max_probes=2)
    *watched, trainer, tracker = hugging_face(tmp_path / "a", watch, **given)
    assert same(watched, list(hugging_face(tmp_path / "b", **given)[:4]))
    assert tracker.history["step"].tolist() == [0, 1, 2, 3]
    assert [row["step"] for row in trainer.state.log_history if "lnp/chi_pos" in row] == [0, 1, 2, 3]


@pytest.mark.parametrize("options", ["label smoothing", "bf16"])
def test_hugging_face_minimises_the_loss_that_is_measured(options, tmp_path):
    arguments, more = HUGGING_FACE[options]
    model = {"more": more, "arguments": arguments}
    everything = {"log": True} if options == "bf16" else {}
    watch = lambda trainer: attach(trainer, schedule=1, max_probes=2, **everything)
    *_, trainer, tracker = hugging_face(tmp_path, watch, **model)
    (names, *_) = [{*row} - {"epoch", "step"} for row in trainer.state.log_history if "lnp/chi_pos" in row]
    factors = {"lnp/rate", "lnp/chi_loss", "lnp/chi_net", "lnp/chi_pos", "lnp/population/chi_pos"}
    assert names > factors if everything else names == factors
    with pytest.raises(ValueError, match="log is 'some'"):
        attach(trainer, log="some")
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    # the model has dropout: the measured mask is the one that the step then draws
    assert tracker.history["loss"].tolist() == pytest.approx(logged, rel=1e-3)
    assert set(tracker.history["loss_terms"]) == {4 * 3}


def test_hugging_face_resumes_without_duplicates(tmp_path):
    path = tmp_path / "run.jsonl"
    *_, tracker = hugging_face(tmp_path, lambda trainer: attach(trainer, path, schedule=1, max_probes=2))
    tracker.close()
    again = lambda trainer: attach(trainer, path, schedule=2, max_probes=2)
    *_, tracker = hugging_face(tmp_path, again, steps=6, resume=str(tmp_path / "checkpoint-2"))
    assert tracker.history["step"].tolist() == [0, 1, 2, 4]


def test_hugging_face_is_detached(tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(language_model(), args)
    attach(trainer, schedule=1)
    with pytest.raises(ValueError, match=r"detach\(trainer\) first"):
        attach(trainer)
    detach(trainer)
    assert "training_step" not in vars(trainer)
    with pytest.raises(TypeError, match="received a tracker, and options"):
        attach(trainer, lnp.Tracker(), by_layer=True)
