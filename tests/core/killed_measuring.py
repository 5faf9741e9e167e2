"""Processes that measure checkpoints are killed at random moments; prints what was lost. Run by test_checkpoints.py.

As in killed.py, one process imports lnp and forks the ones that are killed. A child says through a pipe which
checkpoint it begins; whichever it began before must have been kept.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

import lnp
import lnp_numpy
from core.killed import drained

STEPS = range(400)
BATCH = np.eye(2), np.ones((2, 1))


def measure(path: str, begun: int | None) -> lnp.History:
    """Measure all checkpoints, telling of each that it is begun."""

    def load(step):
        if begun is not None:
            os.write(begun, step.to_bytes(8, "little"))
            time.sleep(0.002)
        return lnp_numpy.LinearModel(weight=np.full((2, 1), step / 400))

    return lnp.measure_checkpoints(load, STEPS, BATCH, path).history


def killed_once(path: str, seconds: float) -> int:
    """The last checkpoint that the child has begun before it was killed; -1 for none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        measure(path, writing)
        os._exit(0)
    os.close(writing)
    first = os.read(reading, 8)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = drained(reading, int.from_bytes(first, "little") if first else -1)
    os.close(reading)
    return last


def main(path: str, times: int) -> None:
    generator, kept, lost, interrupted = random.Random(1), set(), 0, 0
    for _ in range(times):
        last = killed_once(path, generator.uniform(0, 0.1))
        now = {int(part.stem) for part in Path(f"{path}.parts").glob("*[0-9].json")}
        assert kept <= now, "what was measured is gone"
        lost += len([step for step in STEPS if step < last and step not in now])
        interrupted += last not in now and last >= 0
        kept = now
        if os.path.exists(path):
            steps = [row["step"] for row in lnp.History.read(path).rows()]
            assert set(steps) <= kept, "the history has what was not measured"
    history = measure(path, None)
    assert history["step"].tolist() == list(STEPS)
    assert np.allclose(history["loss"], (1 - np.arange(400) / 400) ** 2)
    print(json.dumps({"lost": lost, "interrupted": interrupted, "measured before": len(kept)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
