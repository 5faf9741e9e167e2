"""How long a run of a million records takes to write, open, compare and draw.

    python benchmarks/long_history.py [records] [folder]

It makes a file of made-up records (600 bytes each) in the folder, by default a temporary one, and prints seconds. It
needs Matplotlib (`pip install 'lnp[plot]'`). Not a test: what it prints depends on the machine.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import lnp.plot
from lnp.runs.table import compare, to_text
from lnp.tracking import storage
from lnp.tracking.history import History

WHOLE = ("rate", "chi_net_stderr", "chi_pos_stderr", "seconds")
POPULATION = ("rate", "chi_pos", "noise_scale", "rate_stderr", "chi_pos_stderr", "gradient_noise")


def write(path: Path, records: int) -> None:
    """Records of a run whose loss falls like a power of the step, with noise."""
    noise = np.random.default_rng(0).normal(1, 0.1, records)
    with path.open("wb") as file:
        for step, e in enumerate(noise.tolist()):
            x = 1 / (1 + step / 1000)
            row = {"step": step, "time": 1.8e9 + step / 10, "loss": 2.3 * x * e + 0.1, "chi_loss": x * e}
            row |= {
                "chi_net": 20 - 10 * x,
                "chi_pos": 0.1 * x * e,
                "loss_terms": 128,
                "probes": 2,
                "samples": 128,
                "outputs": 10,
            }
            row |= {"estimator": "per_sample", **dict.fromkeys(WHOLE, 0.01 * x * e)}
            row |= {f"population/{name}": 0.1 * x * e for name in POPULATION}
            file.write(storage.encode(row))


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def main(records: int, folder: Path) -> None:
    path = folder / "long.jsonl"
    with timed(f"write {records} records"):
        write(path, records)
    print(f"file: {path.stat().st_size / 1e6:.0f} MB")
    with timed("open"):
        history = History.read(path)
    with timed("compare"):
        print(to_text(compare({"long": history})))
    with timed("draw"):
        lnp.plot.dashboard({"long": history}).savefig(folder / "long.png", dpi=100)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as made:
        main(count, Path(sys.argv[2]) if len(sys.argv) > 2 else Path(made))
