"""A plain PyTorch loop on handwritten digits. Three lines are lnp's.

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
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    tracker = lnp.Tracker(folder / "pytorch.jsonl", lnp.schedule.log_windows(6, width=3, last=steps - 1), by_layer=True)
    for step in range(steps):
        index = torch.randint(len(images), (128,))
        batch = images[index], labels[index]
        tracker.observe(step, model, batch, learning_rate=3e-3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    lnp.plot.dashboard(tracker, "PyTorch").savefig(folder / "pytorch.png", dpi=110)
    return tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
