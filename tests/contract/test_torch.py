"""The PyTorch backend keeps the contract, with modules and with functions of parameters.

LNP_TEST_DEVICE=cuda runs it on a GPU.
"""

import os
import random
from operator import attrgetter

import numpy as np
import pytest
import torch
from array_api_compat import torch as xp
from torch import nn

from lnp.testing import CHECKS, Kit, frozen

DEVICE = os.environ.get("LNP_TEST_DEVICE", "cpu")


def tensor(array, **how):
    return torch.tensor(array, device=DEVICE, **how)


def host(value):
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


class Network(nn.Module):
    """A scenario as a module that also has what a measurement might disturb: gradients, a buffer, hooks, dropout."""

    def __init__(self, scenario):
        super().__init__()
        self.scenario = scenario
        self.names = list(scenario.parameters)
        for name, array in scenario.parameters.items():
            owner = self
            *path, last = name.split(".")
            for key in path:
                if key not in dict(owner.named_children()):
                    owner.add_module(key, nn.Module())
                owner = owner.get_submodule(key)
            parameter = nn.Parameter(tensor(array))
            parameter.grad = torch.ones_like(parameter)
            owner.register_parameter(last, parameter)
        self.register_buffer("calls", torch.zeros((), device=DEVICE))
        self.idle = nn.Dropout(0.5).eval()
        self.register_forward_hook(lambda module, args, output: output)

    def forward(self, inputs):
        self.calls += 1
        return self.scenario.apply(xp, {name: attrgetter(name)(self) for name in self.names}, inputs)


def batch_of(scenario):
    return tensor(scenario.inputs), tensor(scenario.targets)


def module(scenario):
    return Network(scenario), batch_of(scenario)


def function(scenario):
    parameters = {name: tensor(array, requires_grad=True) for name, array in scenario.parameters.items()}
    return (lambda p, x: scenario.apply(xp, p, x), parameters), batch_of(scenario)


def snapshot(model, batch):
    state = {
        "torch": frozen(torch.get_rng_state()),
        "cuda": [frozen(state) for state in torch.cuda.get_rng_state_all()] if DEVICE == "cuda" else [],
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
        "gradients enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled(DEVICE),
        "inputs": frozen(host(batch[0])),
        "targets": frozen(host(batch[1])),
    }
    if not isinstance(model, Network):
        tensors = model[1]
    else:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, inner in model.named_modules():
            state |= {
                f"{name}.training": inner.training,
                f"{name} hooks": (*inner._forward_hooks, *inner._backward_hooks),
            }
            state[f"{name} attributes"] = sorted(inner.__dict__)
    for name, parameter in tensors.items():
        state[name] = (
            frozen(host(parameter)),
            id(parameter),
            parameter.requires_grad,
            parameter._version,
            parameter._backward_hooks,
        )
        state[f"{name}.grad"] = None if parameter.grad is None else (frozen(host(parameter.grad)), id(parameter.grad))
    return state


def kit(name, build):
    return Kit(
        name=name,
        framework="torch",
        build=build,
        loss=lambda loss: lambda f, y: loss.value(xp, f, y),
        snapshot=snapshot,
        update=lambda update: {key: tensor(array) for key, array in update.items()},
        to_numpy=host,
    )


@pytest.mark.parametrize("kit", [kit("module", module), kit("function", function)], ids=lambda kit: kit.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, kit):
    check(kit)
