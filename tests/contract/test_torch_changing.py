"""Networks that change their mind, in PyTorch."""

from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.test_torch import function, kit, module
from lnp.testing import changing_networks, check_change

NAMES = [network.early.name for network in changing_networks(bend=lambda backward: None)]


def moved(model, parameters):
    if isinstance(model, tuple):
        return model[0], {name: torch.tensor(array, requires_grad=True) for name, array in parameters.items()}
    with torch.no_grad():
        for name, array in parameters.items():
            attrgetter(name)(model).copy_(torch.tensor(array))
    return model


def bend(backward):
    class Bent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            return backward(d)

    return Bent.apply


BUILDS = (("module", module), ("function", function))
KITS = [replace(kit(name, build), moved=moved, bend=bend) for name, build in BUILDS]


@pytest.mark.parametrize("kit", KITS, ids=lambda kit: kit.name)
@pytest.mark.parametrize("name", NAMES)
def test_networks_that_change_their_mind(name, kit):
    check_change(kit, changing_networks(0, 12, bend)[NAMES.index(name)])


@settings(max_examples=30, derandomize=True)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), half=st.integers(2, 20))
def test_variants_of_them(name, seed, half):
    check_change(KITS[0], changing_networks(seed, 2 * half, bend)[NAMES.index(name)])
