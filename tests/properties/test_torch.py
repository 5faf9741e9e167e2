"""The properties with PyTorch modules. LNP_TEST_DEVICE=cuda tries them on a GPU."""

import os

import pytest
import torch
from array_api_compat import torch as xp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lnp
from lnp.testing import Kit
from properties.common import EPSILON, NAMES, PROPERTIES, agree

DEVICE = os.environ.get("LNP_TEST_DEVICE", "cpu")
ACTIVATIONS = {"tanh": torch.tanh, "sin": torch.sin, "softplus": nn.functional.softplus, "relu": torch.relu}


class Network(nn.Module):
    """The network from PyTorch's own layers; its weights are transposed."""

    def __init__(self, network, parameters):
        super().__init__()
        self.network = network
        for i, (rows, columns) in enumerate(zip(network.widths[:-1], network.widths[1:], strict=True)):
            self.add_module(f"layer{i}", nn.Linear(rows, columns, bias=network.bias))
            if network.normalise and i in network.hidden:
                self.add_module(f"norm{i}", nn.LayerNorm(columns, eps=EPSILON, bias=False))
        state = {
            name: torch.tensor(array).T if array.ndim == 2 else torch.tensor(array)
            for name, array in parameters.items()
        }
        self.to(next(iter(state.values())).dtype).load_state_dict(state)

    def forward(self, x):
        for i in self.network.hidden:
            z = self.get_submodule(f"layer{i}")(x)
            if self.network.normalise:
                z = self.get_submodule(f"norm{i}")(z)
            z = ACTIVATIONS[self.network.activation](z)
            x = x + z if self.network.skips(i) else z
        return self.get_submodule(f"layer{len(self.network.widths) - 2}")(x)


def build(scenario):
    model = Network(scenario.apply, scenario.parameters).to(DEVICE)
    return model, tuple(torch.tensor(array, device=DEVICE) for array in (scenario.inputs, scenario.targets))


kit = Kit(
    "torch", "torch", build, lambda loss: lambda f, y: loss.value(xp, f, y), dict, to_numpy=lambda x: x.cpu().numpy()
)


@pytest.mark.parametrize(("holds", "scenarios"), PROPERTIES, ids=NAMES)
@settings(max_examples=25, derandomize=True)
@given(data=st.data())
def test_property(holds, scenarios, data):
    holds(kit, data.draw(scenarios))


NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "loss_terms")
LOSSES = {
    "cross-entropy": None,
    "a weighted mean": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    "a sum": nn.CrossEntropyLoss(reduction="sum"),
    "of pairs": lambda outputs, targets: torch.logsumexp(outputs @ outputs.T, dim=1).mean(),
    "of the batch's own spread": lambda outputs, targets: (outputs - outputs.mean(0)).square().mean().sqrt(),
}


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=12, derandomize=True)
@given(samples=st.integers(2, 9), size=st.integers(1, 10), ignored=st.integers(0, 1), seed=st.integers(0, 2**16))
def test_parts_of_any_size_change_nothing(loss, samples, size, ignored, seed):
    """Micro-batches, for any loss; and the same parts as batches of a loader, for means over samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().to(DEVICE)
    x, y = torch.randn(samples, 4, dtype=torch.float64), torch.randint(0, 3, (samples,))
    y[:ignored] = -100
    batch, criterion = (x.to(DEVICE), y.to(DEVICE)), LOSSES[loss]
    criterion = criterion.to(DEVICE) if isinstance(criterion, nn.Module) else criterion
    whole = lnp.decompose(model, batch, criterion, estimator="exact")
    found = [lnp.decompose(model, batch, criterion, microbatch=size, estimator="exact")]
    parts = list(zip(batch[0].split(size), batch[1].split(size), strict=True))
    if loss in ("cross-entropy", "a weighted mean") and all((part[1] >= 0).any() for part in parts):
        found.append(lnp.decompose(model, parts, criterion, batches=len(parts), estimator="exact"))
    for one in found:
        for name in NUMBERS:
            agree(getattr(one, name), getattr(whole, name))
