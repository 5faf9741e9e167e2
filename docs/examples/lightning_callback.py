"""PyTorch Lightning on handwritten digits: one callback, with gradient clipping and accumulation on.

pip install '.[lightning,plot]' scikit-learn
python docs/examples/lightning_callback.py [folder] [epochs]
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lnp
import lnp.plot
from lnp_torch.lightning import LNPCallback


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)]
        self.net = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: tuple, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def main(folder: Path, epochs: int) -> lnp.Tracker:
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    images = ((images - images.mean()) / images.std()).float().reshape(-1, 1, 8, 8)
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True)

    updates = epochs * -(-len(loader) // 2)  # of two batches each
    schedule = lnp.schedule.log_windows(6, width=3, last=updates - 1)
    callback = LNPCallback(folder / "lightning.jsonl", schedule, by_layer=True)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[callback], gradient_clip_val=1.0, accumulate_grad_batches=2, accelerator="cpu",
        default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(), loader)
    lnp.plot.dashboard(callback.tracker, "PyTorch Lightning").savefig(folder / "lightning.png", dpi=110)
    return callback.tracker


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 30)
