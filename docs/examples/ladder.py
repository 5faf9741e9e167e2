"""What the ladders of checkpoints share: the text that they learn, and what is done with the checkpoints afterwards.

A ladder trains a small language model in three sizes on the source text of Python's standard library, byte by byte.
Checkpoints stay behind. They are measured on text that no model has seen, and laid beside what a tracker saw.

pip install '.[plot]'
"""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lnp
import lnp.plot
from lnp import cli

LENGTH, SYMBOLS = 32, 256
WIDTHS = (16, 32, 64)
BATCH = 16
HELD_OUT = 32
FACTORS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


def source_text(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(Sequences to train on, others that are written to held_out.npy), bytes of the shape (sequences, LENGTH)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    found = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    rows = found[: len(found) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
    held_out = rows[::50][:HELD_OUT]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "held_out.npy", held_out)
    return np.delete(rows, np.s_[::50], axis=0), held_out


def next_bytes(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets): of each position the byte that follows. So does `lnp measure --tokens`."""
    return sequences[:, :-1], sequences[:, 1:]


def saved_steps(steps: int) -> list[int]:
    """The steps of about twelve checkpoints, evenly spaced, the last one among them."""
    every = max(steps // 12, 1)
    return list(range(every, steps + 1, every))


def measured(folder: Path, width: int, watched: lnp.Tracker, batch: object, model: Callable | None = None) -> float:
    """Measure the checkpoints of one size; how far the rows are at most from those of a tracker in the run."""
    name = f"width-{width}"
    checkpoints = lnp.open_checkpoints(folder / name, model=model)
    path = folder / "histories" / f"{name}.jsonl"
    rows = lnp.measure_checkpoints(checkpoints, batches=batch, path=path).history.rows()
    told = {row["step"]: row for row in watched.history.rows()}
    pairs = [(row, told[row["step"]]) for row in rows if row["step"] in told]
    apart = max(abs(row[column] / other[column] - 1) for row, other in pairs for column in FACTORS)
    print(f"{name}: {len(rows)} checkpoints; {len(pairs)} of them as the tracker saw them, to {apart:.0e}", flush=True)
    return apart


def show(folder: Path) -> None:
    """What `lnp compare` says of the runs, and their page, ladder.html."""
    cli.main(["compare", str(folder / "histories"), "--out", str(folder / "ladder.png")])
    cli.main(["report", str(folder / "histories"), "--out", str(folder / "ladder.html"), "--title", "The ladder"])
