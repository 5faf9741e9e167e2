"""Runs that are over: three sizes of a language model, trained by the Hugging Face Trainer on the source text of
Python's standard library, byte by byte. Their saved checkpoints are measured afterwards, on text that none has seen.

pip install '.[transformers,plot]'
python docs/examples/checkpoint_ladder.py [folder] [steps]

On the command line, with the same bytes in held_out.npy:

lnp measure width-16 width-32 width-64 --tokens held_out.npy --batch-size 12 --out histories
lnp compare histories
lnp report histories
"""

import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

import lnp
import lnp.plot
from lnp.runs.table import compare, to_text

LENGTH = 32


def source_text() -> np.ndarray:
    """The bytes of some modules of the standard library, in sequences, (sequences, LENGTH)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    found = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    return found[: len(found) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)


def train(folder: Path, width: int, sequences: np.ndarray, steps: int) -> None:
    """Train one size; about twelve checkpoints stay behind."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=width, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3, use_cpu=True,
        save_steps=max(steps // 12, 1), save_only_model=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        include_num_input_tokens_seen=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.as_tensor(sequences)]
    model = GPT2LMHeadModel(config)
    Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()


def main(folder: Path, steps: int) -> dict[str, lnp.History]:
    sequences = source_text()
    held_out, seen = sequences[::50][:12], np.delete(sequences, np.s_[::50], axis=0)
    np.save(folder / "held_out.npy", held_out)
    runs = {}
    for width in (16, 32, 64):
        name = f"width-{width}"
        train(folder / name, width, seen, steps)
        checkpoints = lnp.open_checkpoints(folder / name)
        batch = {"input_ids": held_out, "labels": held_out}
        path = folder / "histories" / f"{name}.jsonl"
        runs[name] = lnp.measure_checkpoints(checkpoints, batches=batch, path=path).history
    print(to_text(compare(runs)))
    lnp.plot.dashboard(runs, "measured from checkpoints").savefig(folder / "ladder.png", dpi=110)
    return runs


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 240)
