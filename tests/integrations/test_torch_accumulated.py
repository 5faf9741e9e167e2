"""Lightning's accumulated updates, measured whole: the rate is that of the step that was really taken."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lnp
from lnp_torch.lightning import LNPCallback

pytestmark = [  # the host's advice on workers and accelerators
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
RATE = 0.05


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.starts = []

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.starts.append([p.detach().clone() for p in self.net.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


def fitted(tmp_path, size, samples=26, **options):
    """The rates of all updates, and what the parameters really moved by, ||update||^2 / learning rate^2."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(samples, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, (samples,), generator=generator),
    )
    module, callback = Module(), LNPCallback(schedule=1, accumulated=True, estimator="exact", **options)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accumulate_grad_batches=size,
        default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, batch_size=4))
    assert [str(w.message) for w in caught if str(w.message).startswith("lnp")] == []
    ends = [*module.starts[1:], [p.detach() for p in module.net.parameters()]]
    moved = [
        sum(float((a - b).square().sum()) for a, b in zip(start, end, strict=True)) / RATE**2
        for start, end in zip(module.starts, ends, strict=True)
    ]
    return callback.tracker.history, moved


@pytest.mark.parametrize(
    "options", [{}, {"loss": "cross_entropy", "prepare": lambda module, batch: (module.net, batch)}]
)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_rate_is_that_of_the_accumulated_step(size, options, tmp_path):
    """Of 7 batches, of which the last has two samples, and the last update fewer batches than it is divided by."""
    history, moved = fitted(tmp_path, size, **options)
    assert history["step"].tolist() == list(range(-(-7 // size)))
    assert history["rate"].tolist() == pytest.approx(moved, rel=1e-9)
    assert history["samples"].tolist() == {1: [4] * 6 + [2], 3: [12, 12, 2], 4: [16, 10]}[size]


def test_a_run_that_is_watched_so_ends_as_one_that_is_not(tmp_path):
    ends = []
    for callbacks in ([], [LNPCallback(schedule=1, accumulated=True)]):
        torch.manual_seed(0)
        module = Module()
        data = TensorDataset(torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,)))
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, accumulate_grad_batches=2,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
        ends.append([*module.net.parameters(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


def test_the_decomposition_of_a_mean_of_means_is_that_of_the_joint_loss(tmp_path):
    """Factors of the first update, against one batch whose loss is written as Lightning adds it up."""
    history, _ = fitted(tmp_path, 3)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(26, 5, generator=generator, dtype=torch.float64), torch.randint(3, (26,), generator=generator)

    def loss(outputs, targets):
        return sum(F.cross_entropy(outputs[4 * i : 4 * i + 4], targets[4 * i : 4 * i + 4]) / 3 for i in range(3))

    d = lnp.decompose(Module().net, (x[:12], y[:12]), loss, loss_terms=12, estimator="exact")
    for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
        assert history[name][0] == pytest.approx(getattr(d, name), rel=1e-9), name
