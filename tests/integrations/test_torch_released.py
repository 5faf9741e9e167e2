"""What a measurement leaves in memory while the garbage collector does not run: a graph that holds itself stays."""

import gc
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x.unflatten(1, (3, 2)))[0][:, -1])

    return Last()


class Clipped(torch.autograd.Function):
    """A backward pass that somebody wrote, which is looked at in every measurement."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, d):
        return d


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return Clipped.apply(self.layer(x))


class Mixing(nn.Module):
    """Samples that interact."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


class General(nn.Module):
    """A parameter without a rule."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return (x @ self.a).sinh() + torch.cumsum(self.b, 0)


IMAGES = torch.randn(12, 1, 6, 6)
CASES = {
    "rules": (mlp, {}),
    "population": (mlp, {"population": True}),
    "random probes": (lambda: nn.Linear(6, 40), {"rtol": 0.001, "max_probes": 4}),
    "batch statistics": (cnn, {}),
    "recurrent": (recurrent, {}),
    "a backward pass of its own": (Written, {}),
    "interacting": (Mixing, {}),
    "the general way": (General, {}),
    "micro-batches": (mlp, {"microbatch": 5}),
}


def tensors_left(run):
    """Tensors that are there after a run and were not before, without the garbage collector."""
    run()  # what is kept for later measurements
    gc.collect()
    before = set(map(id, _tensors()))
    gc.disable()
    try:
        run()
        return [tuple(t.shape) for t in _tensors() if id(t) not in before]
    finally:
        gc.enable()


def _tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that some modules warn of when they are looked at
        return [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]


@pytest.mark.parametrize("name", CASES)
def test_a_measurement_leaves_no_tensor(name):
    make, options = CASES[name]
    model, x = make(), IMAGES if name == "batch statistics" else torch.randn(12, 6)
    y = torch.randint(0, 3, (12,))
    assert tensors_left(lambda: lnp.decompose(model, (x, y), **options)) == []


def test_a_shared_step_leaves_no_tensor():
    model, x, y = mlp(), torch.randn(12, 6), torch.randint(0, 3, (12,))

    def step():
        model.zero_grad()
        watched = lnp_torch.shared(model)
        with watched:
            loss = F.cross_entropy(model(x), y)
        watched.backward(loss, y, "cross_entropy")

    step()
    gradients = Counter(
        tuple(p.shape) for p in model.parameters()
    )  # the step's own, in new memory or in that of old ones
    assert not Counter(tensors_left(step)) - gradients
