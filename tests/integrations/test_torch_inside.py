"""Models and losses that differentiate inside: in every function, whether the caller has gradients on or off."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_reference import assert_agrees, dense

N = 6
POINTS = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VALUES = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mlp(inputs=2, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


class Residual(nn.Module):
    """u and the residual of the heat equation, by derivatives in the inputs."""

    def __init__(self):
        super().__init__()
        self.u = mlp()

    def forward(self, x):
        x = x.requires_grad_()
        u = self.u(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return torch.cat([u, first[:, 1:] - second[:, :1]], 1)


class Forces(Residual):
    """Minus the gradient of an energy, with gradients on whatever the caller has."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]


class Sensitive(nn.Module):
    """Differentiates in what comes from its parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), mlp(4)

    def forward(self, x):
        hidden = self.first(x).tanh()
        out = self.second(hidden)
        (slope,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
        return torch.cat([out, slope.square().sum(1, keepdim=True)], 1)


class ByFunctions(Residual):
    """By `torch.func`."""

    def forward(self, x):
        slopes = torch.func.vmap(torch.func.grad(lambda point: self.u(point)[0]))(x)
        return slopes * self.u(x)


def penalised(outputs, targets):
    """A loss with a penalty on its own derivative in the outputs."""
    value = (outputs - targets).square().mean()
    (slope,) = torch.autograd.grad(value, outputs, create_graph=True)
    return value + slope.square().sum()


def flat(outputs, targets):
    """A loss whose penalty is a gradient in the outputs' exponentials, written in place before."""
    outputs.exp_()
    (slope,) = torch.autograd.grad(outputs.log().sum(), outputs, create_graph=True)
    return F.mse_loss(outputs, targets) + slope.mean()


CASES = {
    "residual": (Residual, F.mse_loss),
    "forces": (Forces, F.mse_loss),
    "derivative in hidden values": (Sensitive, F.mse_loss),
    "functional": (ByFunctions, F.mse_loss),
    "penalty in the loss": (lambda: mlp(2, 2), penalised),
    "penalty in the loss, in place": (lambda: mlp(2, 2), flat),
    "in both": (Residual, penalised),
}


@pytest.fixture(params=CASES)
def case(request):
    make, loss = CASES[request.param]
    return make().double(), (POINTS.clone(), VALUES), loss


@pytest.fixture(params=["on", "off", "inference"])
def gradients(request):
    return {"on": torch.enable_grad, "off": torch.no_grad, "inference": torch.inference_mode}[request.param]


def test_every_function(case, gradients):
    model, batch, loss = case
    reference = copy.deepcopy(model)
    with gradients():
        d = lnp.decompose(model, batch, loss, estimator="exact")
        grouped = lnp.decompose(model, batch, loss, microbatch=2)
        moment = lnp.spectrum(model, batch, loss).first_moment
        kernel = lnp.kernel(model, batch, loss, progress=False)
        change = lnp.measured_loss_change(model, batch, loss, learning_rate=1e-6)
        before = lnp.snapshot(model)
        step = lnp.step_taken(before, model, batch, loss)
        cross = lnp.cross_response(model, batch, batch, loss, estimator="exact")
    out = reference(batch[0].clone())
    assert_agrees(d, dense(reference, out, loss(out.clone(), VALUES), d.loss_terms), torch.float64)
    assert grouped.rate == pytest.approx(d.rate, rel=1e-9)
    assert moment == pytest.approx(d.rate / (d.chi_loss / d.loss_terms), rel=1e-6)
    assert kernel.matrix.trace() == pytest.approx(d.chi_net * d.loss_terms, rel=1e-9)
    assert change == pytest.approx(-1e-6 * d.rate, rel=1e-3)
    assert (step.predicted, step.measured) == (0.0, 0.0)
    assert cross.rate == pytest.approx(d.rate, rel=1e-9)


def test_a_watched_step(case):
    model, batch, loss = case
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    tracker = lnp.Tracker(schedule=1, loss=loss, on_error="raise")
    for index in range(2):
        with tracker.step(index, model, batch):
            optimizer.zero_grad()
            loss(model(batch[0].clone()), VALUES).backward()
            optimizer.step()
    optimizer.zero_grad()
    with lnp_torch.shared(model) as step:
        value = loss(model(batch[0].clone()), VALUES)
    d = step.backward(value, VALUES, loss)
    for row in tracker.history.rows():
        assert row["update/measured"] == pytest.approx(row["update/predicted"], rel=1e-2)
    squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
    assert d.rate == pytest.approx(sum(squares), rel=1e-9)
