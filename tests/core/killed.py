"""Processes that append records and are killed at random moments; prints what was lost. Run by test_storage.py.

One process imports lnp and then forks the ones that are killed, since starting Python a hundred times takes most of a
minute. A child says through a pipe which records it has handed over, after each one; the parent kills it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

from lnp.tracking.history import History
from lnp.tracking.storage import Appender


def write(path: str, acknowledge: int) -> None:
    """Append records until the end."""
    step = (History.read(path).last_step if os.path.exists(path) else None) or 0
    file = Appender(path)
    while True:
        step += 1
        file.append({"step": step, "loss": 1.0 / step, "text": "x" * (97 * step % 10_000)})
        os.write(acknowledge, step.to_bytes(8, "little"))


def killed_once(path: str, seconds: float) -> int:
    """The last record that the child has acknowledged before it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        write(path, writing)
    os.close(writing)
    last = int.from_bytes(os.read(reading, 8), "little")
    deadline = time.monotonic() + seconds
    os.set_blocking(reading, False)
    while time.monotonic() < deadline:
        last = drained(reading, last)
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.set_blocking(reading, True)
    last = drained(reading, last)
    os.close(reading)
    return last


def drained(reading: int, last: int) -> int:
    try:
        while data := os.read(reading, 8):
            last = int.from_bytes(data, "little")
    except BlockingIOError:
        pass
    return last


def main(path: str, times: int) -> None:
    generator = random.Random(0)
    lost, extra, total = 0, 0, 0
    for number in range(times):
        if number % 5 == 0 and os.path.exists(path):
            os.remove(path)  # so that reading it stays quick
        acknowledged = killed_once(path, generator.uniform(0, 0.003))
        steps = History.read(path)["step"].tolist()
        assert steps == list(range(1, len(steps) + 1)), "records are missing in the middle"
        lost += max(0, acknowledged - len(steps))
        extra = max(extra, len(steps) - acknowledged)
        total = max(total, len(steps))
    print(json.dumps({"lost": lost, "extra": extra, "total": total}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
