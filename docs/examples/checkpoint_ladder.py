"""Runs that are over: three sizes of a language model, trained by the Hugging Face Trainer on the source text of
Python's standard library, byte by byte. Their saved checkpoints are measured afterwards, on text that none has seen.

pip install '.[transformers,plot,report]'
python docs/examples/checkpoint_ladder.py [folder] [steps]

On the command line, with the same bytes in held_out.npy:

lnp measure width-16 width-32 width-64 --tokens held_out.npy --out histories
lnp compare histories
lnp report histories
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from ladder import BATCH, LENGTH, SYMBOLS, WIDTHS, measured, saved_steps, show, source_text
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import lnp


class Watched(TrainerCallback):
    """A tracker in the run, to lay beside what the checkpoints say. Without it nothing else changes."""

    def __init__(self, tracker: lnp.Tracker) -> None:
        self.tracker = tracker

    def on_step_begin(self, arguments, state, control, model, **others) -> None:
        self.tracker.observe(state.global_step, model)


def train(folder: Path, width: int, sequences: np.ndarray, batch: dict, steps: int) -> lnp.Tracker:
    """Train one size; about twelve checkpoints stay behind."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SYMBOLS, n_positions=LENGTH, n_embd=width, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    saved = saved_steps(steps)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-3, use_cpu=True,
        save_steps=saved[0], save_only_model=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        include_num_input_tokens_seen=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.as_tensor(sequences)]
    tracker = lnp.Tracker(None, saved, batch={name: torch.as_tensor(rows) for name, rows in batch.items()})
    trainer = Trainer(
        GPT2LMHeadModel(config), arguments, train_dataset=data, data_collator=default_data_collator,
        callbacks=[Watched(tracker)],
    )  # fmt: skip
    trainer.train()
    return tracker


def main(folder: Path, steps: int = 240, widths: Iterable[int] = WIDTHS) -> list[float]:
    sequences, held_out = source_text(folder)
    batch = {"input_ids": held_out, "labels": held_out}
    apart = []
    for width in widths:
        watched = train(folder / f"width-{width}", width, sequences, batch, steps)
        apart.append(measured(folder, width, watched, batch))
    show(folder)
    return apart


if __name__ == "__main__":
    torch.set_num_threads(1)  # products this small wait for each other on more
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 240)
