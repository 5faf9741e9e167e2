"""The properties with PyTorch modules. LNP_TEST_DEVICE=cuda tries them on a GPU."""

import os

import pytest
import torch
from array_api_compat import torch as xp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lnp.testing import Kit
from properties.common import EPSILON, NAMES, PROPERTIES

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
