"""What is held fixed is what the network computes by itself: batch statistics, and parameters that it writes to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lnp
from integrations.torch_reference import assert_agrees, dense, with_batch_statistics
from lnp.per_sample.verdict import FROZEN_DIFFERS

N = 9
HELD = "batch normalisation in training mode keeps this batch's statistics"


@pytest.fixture
def batch():
    return torch.randn(N, 6, dtype=torch.float64) + 0.3, torch.arange(N) % 3


def as_it_is(model, batch):
    """The factors of the network's own function, by plain autograd."""
    model = copy.deepcopy(model)
    out = model(batch[0])
    return dense(model, out, F.cross_entropy(out, batch[1]), N)


def network(layer, *others):
    return nn.Sequential(layer, *others, nn.Tanh(), nn.Linear(8, 3)).double()


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        rows = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return self._conv_forward(x.reshape(-1, 1, 3, 2), rows.reshape_as(self.weight), self.bias).mean((2, 3))


class StandardisedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.batch_norm(self.weight.t(), None, None, training=True).t(), self.bias)


class PrunedLinear(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.rand(sizes[1], sizes[0]) > 0.3).double())

    def forward(self, x):
        gain = torch.full((6,), 1.5, dtype=x.dtype)
        return F.linear(x, F.batch_norm(self.weight * self.mask, None, None, gain, training=True), self.bias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [lambda: StandardisedConv(1, 8, 2), StandardisedLinear, PrunedLinear])
def test_statistics_of_parameters_are_no_batch_s(layer, training, batch):
    made = layer() if layer not in (StandardisedLinear, PrunedLinear) else layer(6, 8)
    model = network(made).train(training)
    d = lnp.decompose(model, batch, estimator="exact")
    assert_agrees(d, as_it_is(model, batch), torch.float64)
    assert HELD not in d.notes
    assert d.probes == 3, "the samples are taken apart"


def test_statistics_of_a_parameter_beside_those_of_the_batch(batch):
    def function(parameters, x):
        weight = F.batch_norm(parameters["weight"].t(), None, None, training=True).t()
        return F.batch_norm(x @ weight.t(), None, None, training=True) @ parameters["head"]

    def by_hand(parameters, x):
        weight = parameters["weight"]
        weight = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        hidden = x @ weight.t()
        mean, variance = hidden.detach().mean(0), hidden.detach().var(0, correction=0)
        return ((hidden - mean) / (variance + 1e-5).sqrt()) @ parameters["head"]

    parameters = {"weight": torch.randn(8, 6).double(), "head": torch.randn(8, 3).double()}
    d, expected = (lnp.decompose((f, parameters), batch, estimator="exact") for f in (function, by_hand))
    assert (d.rate, d.chi_net) == pytest.approx((expected.rate, expected.chi_net), rel=1e-10)
    assert HELD in d.notes


class TorchNorm(nn.BatchNorm1d):
    def forward(self, x):
        given = (self.weight, self.bias, self.running_mean, self.running_var)
        return torch.batch_norm(x, *given, True, 0.1, 1e-5, False)


class NativeNorm(nn.BatchNorm1d):
    def forward(self, x):
        given = (self.weight, self.bias, self.running_mean, self.running_var)
        return torch.native_batch_norm(x, *given, True, 0.1, 1e-5)[0] + self.running_mean


class OwnNorm(nn.BatchNorm1d):
    """Normalises by running statistics, through which the gradient flows."""

    def forward(self, x):
        mean, variance = 0.7 * self.running_mean + 0.3 * x.mean(0), 0.7 * self.running_var + 0.3 * x.var(0)
        self.running_mean, self.running_var = mean.detach(), variance.detach()
        return (x - mean) / (variance + self.eps).sqrt()


class Renormalised(nn.BatchNorm1d):
    def forward(self, x):
        mean, deviation = x.mean(0), x.std(0, correction=0) + 1e-3
        r, d = (deviation / self.running_var.sqrt()).detach(), (mean - self.running_mean).detach()
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
        return (x - mean) / deviation * r + d


@pytest.mark.parametrize("norm", [TorchNorm, NativeNorm, OwnNorm, Renormalised])
def test_normalisation_that_nobody_knows_is_measured_as_it_is(norm, batch):
    model = network(nn.Linear(6, 8), norm(8))
    expected = as_it_is(model, batch)
    d = lnp.decompose(model, batch, estimator="exact")
    assert_agrees(d, expected, torch.float64)
    assert any("they are not taken apart" in note for note in d.notes)
    again = lnp.decompose(model, batch, estimator="exact")
    assert d == again, "every measurement finds the buffers as they were"


class UpdatesThenUses(nn.BatchNorm1d):
    def forward(self, x):
        F.batch_norm(x, self.running_mean, self.running_var, None, None, True, 0.3, self.eps)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class AddsTheRunningMean(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + self.running_mean


class TrainedThenEvaluated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + F.batch_norm(x, self.running_mean, self.running_var)


class CalledTwice(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(torch.tanh(2 * super().forward(x) + x))


@pytest.mark.parametrize("norm", [UpdatesThenUses, AddsTheRunningMean, TrainedThenEvaluated, CalledTwice])
def test_running_statistics_are_those_of_the_network_s_own_pass(norm, batch):
    model = network(nn.Linear(6, 8), norm(8, momentum=0.5))
    d = lnp.decompose(model, batch)
    assert d.loss == pytest.approx(as_it_is(model, batch)["loss"], rel=1e-12)
    assert HELD in d.notes
    change = lnp.measured_loss_change(model, batch, learning_rate=1e-7)
    assert change == pytest.approx(-1e-7 * d.rate, rel=1e-4)
    if norm is UpdatesThenUses:  # no gradient flows through its statistics
        exact = lnp.decompose(model, batch, estimator="exact")
        assert_agrees(exact, as_it_is(model, batch), torch.float64)


class Squared(TorchFunctionMode):
    """Somebody's own way to normalise, in the place of PyTorch's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        training = func is F.batch_norm and (kwargs or {}).get("training", args[5] if len(args) > 5 else False)
        return out.square() if training else out


def test_statistics_are_not_held_where_that_is_another_function(batch):
    model = network(nn.Linear(6, 8), nn.BatchNorm1d(8))
    with Squared():
        d, expected = lnp.decompose(model, batch, estimator="exact"), as_it_is(model, batch)
    assert_agrees(d, expected, torch.float64)
    assert FROZEN_DIFFERS in d.notes
    assert HELD not in d.notes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_a_narrow_model(dtype, training, batch):
    x, y = batch[0].to(dtype), batch[1]
    torch.manual_seed(0)
    model = network(nn.Linear(6, 8), nn.BatchNorm1d(8)).to(dtype).train(training)
    wide = copy.deepcopy(model).double()
    d = lnp.decompose(model, (x, y), estimator="exact")
    expected = lnp.decompose(wide, (x.double(), y), estimator="exact")
    assert (d.loss, d.rate, d.chi_net) == pytest.approx((expected.loss, expected.rate, expected.chi_net), rel=0.05)
    assert d.estimator == "exact"
    assert d.probes == 3, d.notes


class Clipped(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Decayed(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


class Renormed(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
        return super().forward(x)


class SpectralByHand(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("u", F.normalize(torch.randn(sizes[1]), dim=0))

    def forward(self, x):
        with torch.no_grad():
            v = F.normalize(self.weight.t() @ self.u, dim=0)
            self.u.copy_(F.normalize(self.weight @ v, dim=0))
            self.weight.div_(self.u @ self.weight @ v)
        return super().forward(x)


@pytest.mark.parametrize("layer", [Clipped, Decayed, Renormed, SpectralByHand])
def test_a_layer_that_writes_to_what_is_trained(layer, batch):
    model = network(layer(6, 8))
    before = copy.deepcopy(model.state_dict())
    expected = as_it_is(model, batch)
    d = lnp.decompose(model, batch, estimator="exact")
    assert_agrees(d, expected, torch.float64)
    assert d.probes == 3, "every pass begins with the same values"
    assert any("writes to 0.weight" in note for note in d.notes)

    moment = lnp.spectrum(model, batch).first_moment  # by products J u and J^T v
    assert moment == pytest.approx(d.rate / (d.chi_loss / N), rel=1e-9)
    rate = 1e-4
    change = lnp.measured_loss_change(model, batch, learning_rate=rate)
    assert change == pytest.approx(by_taking_the_step(model, batch, rate), rel=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def by_taking_the_step(model, batch, rate):
    """The loss change of one plain SGD step from where the parameters are, before the network writes to them."""
    here, there = copy.deepcopy(model), copy.deepcopy(model)
    loss = F.cross_entropy(here(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, list(here.parameters()))
    with torch.no_grad():
        for p, grad in zip(there.parameters(), grads, strict=True):
            p -= rate * grad
        return float(F.cross_entropy(there(batch[0]), batch[1]) - loss)


class InstanceNorm(nn.Module):
    """As adaptive instance normalisation is mostly written."""

    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv1d(1, 4, 3), nn.Parameter(torch.rand(4))
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        n, hidden = len(x), self.conv(x[:, None])
        gain = self.gain.repeat(n)
        hidden = F.batch_norm(hidden.reshape(1, n * 4, -1), None, None, gain, torch.zeros_like(gain), training=True)
        return self.head(hidden.reshape(n, -1))


class LayerNorm(nn.Linear):
    def forward(self, x):
        return F.batch_norm(super().forward(x).t(), None, None, training=True).t()


class GroupNorm(nn.Linear):
    def forward(self, x):
        groups = super().forward(x).reshape(1, 2 * len(x), 4)
        return F.batch_norm(groups, None, None, training=True).reshape(len(x), 8)


@pytest.mark.parametrize("layer", [InstanceNorm, LayerNorm, GroupNorm])
def test_statistics_of_single_samples_are_no_batch_s(layer, batch):
    model = network(layer() if layer is InstanceNorm else layer(6, 8))
    d = lnp.decompose(model, batch, estimator="exact")
    assert_agrees(d, as_it_is(model, batch), torch.float64)
    assert HELD not in d.notes
    assert d.probes == 3, "the samples are taken apart"


def test_statistics_of_a_batch_of_as_many_samples_as_channels_are_held(batch):
    model = nn.Sequential(nn.Linear(6, N), nn.BatchNorm1d(N), LayerNorm(N, 8), nn.Linear(8, 3)).double()
    d = lnp.decompose(model, batch, estimator="exact")
    reference = with_batch_statistics(model, lambda m: m(batch[0]))
    out = reference(batch[0])
    assert_agrees(d, dense(reference, out, F.cross_entropy(out, batch[1]), N), torch.float64)
    assert HELD in d.notes


def test_a_loss_of_the_model_s_own_comes_before_its_outputs(batch):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(nn.Linear(6, 8), nn.BatchNorm1d(8))

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = WithLoss()
    d = lnp.decompose(model, {"x": batch[0], "labels": batch[1]})
    assert d.rate == pytest.approx(lnp.decompose(model.net, batch).rate, rel=1e-9)
    assert HELD in d.notes
