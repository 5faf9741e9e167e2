"""Training runs of the hosts, small and seeded, and what they leave behind."""

from __future__ import annotations

import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lnp_torch

STEPS = 8
GENERATOR = np.random.default_rng(0)
INPUTS = torch.tensor(GENERATOR.standard_normal((64, 6)), dtype=torch.float32)
TARGETS = torch.tensor(GENERATOR.integers(3, size=64))


def seed_everything():
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002 - the state that users have
    random.seed(3)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def loader():
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8, shuffle=True)


def randomness():
    return torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002


def same(a, b):
    """Equal to the last bit, through containers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def optimizers(name, parameters):
    if name == "adamw":
        return torch.optim.AdamW(parameters, 1e-2)
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def lightning(folder, callback=None, epochs=1, resume=None, **options):
    seed_everything()
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        logger=pl.loggers.CSVLogger(folder), default_root_dir=folder, callbacks=[] if callback is None else [callback],
        log_every_n_steps=50, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=resume)
    state = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return module.losses, module.state_dict(), state, randomness(), trainer


def language_model():
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, attention_dropout=0.4, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts(count=32):
    tokens = np.random.default_rng(1).integers(11, size=(count, 6))
    rows = []
    for row in tokens:
        labels = row.copy()
        labels[-2:] = -100
        rows.append({"input_ids": row.tolist(), "attention_mask": [1] * 6, "labels": labels.tolist()})
    return rows


def hugging_face(folder, tracked=None, steps=4, resume=None, **options):
    arguments, more = options.get("arguments", {}), options.get("more", {})
    seed_everything()
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=2, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(language_model(), args, train_dataset=texts(), **more)
    tracker = None if tracked is None else tracked(trainer)
    trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.model.state_dict(), trainer.optimizer.state_dict(), randomness(), trainer, tracker


# --- failures ------------------------------------------------------------------------------------------------------

REASON = "The parameters are sharded. Measure a checkpoint."


def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def warned_of():
    """What lnp warns of; the hosts have advice of their own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if str(w.message).startswith("lnp")]


def refusing(monkeypatch):
    """Has the backend refuse every model."""
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
