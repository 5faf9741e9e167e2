"""The two pages of docs/tracking.md: `python docs/images/watching.py` writes run.png and runs.png.

Networks of six widths learn handwritten digits, new ones at each step, each watched by a tracker with a held-out batch.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp.plot
from lnp.demo import data

WIDTHS, STEPS, BATCH, RATE, HELD_OUT = (4, 8, 16, 32, 64, 128), 2000, 64, 0.1, 2048
HERE = Path(__file__).parent


def watched(width: int) -> lnp.History:
    """What the tracker of one run saw."""
    torch.manual_seed(width)
    generator, digits = np.random.default_rng(width), data.digits()

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = data.draw(*digits, count, generator)
        return torch.from_numpy(images), torch.from_numpy(labels).long()

    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    schedule = lnp.schedule.log_windows(points_per_decade=6, last=STEPS)
    tags = {"parameters": sum(p.numel() for p in model.parameters())}
    tracker = lnp.Tracker(None, schedule, batch=draw(HELD_OUT), learning_rate=optimizer, tags=tags, by_layer=True)
    for step in range(STEPS + 1):
        tracker.observe(step, model)
        images, labels = draw(BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return tracker.history


def main() -> None:
    """Train, draw."""
    torch.set_num_threads(1)
    runs = {f"width {width}": watched(width) for width in WIDTHS}
    lnp.plot.dashboard(runs["width 64"], "width 64, digits").savefig(HERE / "run.png", dpi=110)
    lnp.plot.dashboard(runs).savefig(HERE / "runs.png", dpi=110)


if __name__ == "__main__":
    main()
