"""Lightning trains modules with every kind of state; a callback that watches changes nothing."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from integrations.test_torch_undisturbed import built
from integrations.torch_state import LAYERS, identities, outside, same
from lnp_torch.lightning import LNPCallback

STEPS = 3


class Module(LightningModule):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss
        self.encoder = model[0]  # a second name
        self.losses = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        loss = self.loss(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def trained(layer, watch, folder):
    """All that is there after a Trainer has trained."""
    model, (x, y), loss = built([layer], "centred")
    module = Module(model, loss)
    before = identities(module)
    callback = LNPCallback(None, 1, rtol=0.5, loss=loss, on_error="raise") if watch else None
    trainer = Trainer(
        max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback] if watch else [],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
    after = identities(module)
    assert {name: after[name] for name in before} == before
    assert not watch or len(callback.tracker.history) == STEPS
    return module.losses, module.model, loss, outside()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_with_state(layer, tmp_path):
    assert same(*(trained(layer, watch, tmp_path) for watch in (True, False)))
