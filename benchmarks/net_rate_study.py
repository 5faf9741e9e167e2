"""What holds a position up late in training: the noise of the optimizer, told by the net rate.

A network of the gallery's teacher task is trained at a constant learning rate. From one of its states branches go on in
several ways; for each, the rate to first order at its end stands beside the speed at which the loss on held-out samples
has really fallen, and the position at averaged weights beside that of the branch.

    python benchmarks/net_rate_study.py        # two minutes on one core
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lnp

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "gallery"))
from teacher import Teacher, loss_of, student

WIDTH, START, LENGTH, RATE, BATCH = 128, 1500, 150, 0.3, 256
HELD_OUT = 16384
BRANCHES: dict[str, tuple[Callable[[int], float], int]] = {
    "as before": (lambda step: RATE, BATCH),
    "batch 2048": (lambda step: RATE, 2048),
    "learning rate 0.03": (lambda step: RATE / 10, BATCH),
    "learning rate to 0": (lambda step: RATE * (1 - (step + 0.5) / LENGTH), BATCH),
}


def train(
    model: torch.nn.Module,
    steps: int,
    rate: Callable[[int], float],
    batch: Callable[[], Any],
    tracker: lnp.Tracker | None = None,
) -> tuple[torch.nn.Module, AveragedModel]:
    """Gradient descent on new samples; with averages of the weights over some 20 steps."""
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    for step in range(steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(min(step, steps - 1))
        if tracker is not None:
            tracker.observe(step, model)
        if step < steps:
            optimizer.zero_grad()
            loss_of(model, batch()).backward()
            optimizer.step()
            averaged.update_parameters(model)
    return model, averaged


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    teacher, generator = Teacher(), torch.Generator().manual_seed(0)
    held_out = teacher.draw(HELD_OUT, torch.Generator().manual_seed(7))
    trunk, _ = train(student(WIDTH, 0), START, lambda step: RATE, lambda: teacher.draw(BATCH, generator))
    print(f"{'branch':20s} " + " ".join(f"{name:20s}" for name in (*COLUMNS, "averaged weights")))
    for name, (rate, batch) in BRANCHES.items():
        seen = torch.Generator().manual_seed(5)
        tracker = lnp.Tracker(schedule=[0, LENGTH], batch=held_out, learning_rate=rate)
        model = copy.deepcopy(trunk)
        _, averaged = train(model, LENGTH, rate, lambda batch=batch, seen=seen: teacher.draw(batch, seen), tracker)
        row = tracker.history.rows()[-1]
        mean = lnp.decompose(averaged, held_out).population
        values = [(row[f"{column}"], row[f"{column}_stderr"]) for column in COLUMNS]
        values.append((mean.chi_pos, mean.chi_pos_stderr))
        print(f"{name:20s} " + " ".join(f"{value:9.2e} +- {error:7.1e}" for value, error in values), flush=True)


COLUMNS = ("population/rate", "net/rate", "population/chi_pos", "net/chi_pos")

if __name__ == "__main__":
    main()
