"""A plain PyTorch loop on handwritten digits. lnp adds a tracker, and one line to the loop.

pip install '.[torch,plot]' scikit-learn
python docs/examples/pytorch_loop.py [folder] [steps]
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import lnp
import lnp.plot


def main(folder: Path, steps: int) -> lnp.Tracker:
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = ((images - images.mean()) / images.std()).float()
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    trained, held_out = order[500:], (images[order[:500]], labels[order[:500]])
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    schedule = lnp.schedule.log_windows(6, width=3, last=steps - 1)
    tracker = lnp.Tracker(folder / "pytorch.jsonl", schedule, batch=held_out, learning_rate=optimizer, by_layer=True)
    for step in range(steps):
        tracker.observe(step, model)
        index = trained[torch.randint(len(trained), (128,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    lnp.plot.dashboard(tracker, "PyTorch").savefig(folder / "pytorch.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
