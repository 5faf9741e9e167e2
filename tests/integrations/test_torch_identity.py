"""After any call a model holds the very same parameters, buffers and modules under every name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_state import identities


class TwoNames(nn.Module):
    """A module under two names, as encoders that share their embedding register it."""

    def __init__(self, layer):
        super().__init__()
        self.embed, self.encoder, self.head = layer, nn.Module(), nn.Linear(4, 3)
        self.encoder.embed = layer
        self.listed = nn.ModuleList([layer])

    def forward(self, x):
        return self.head(torch.tanh(self.encoder.embed(torch.tanh(self.embed(x)))))


class OneParameterTwice(nn.Module):
    """A parameter and a buffer that two modules have under different names."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.zeros(4))
        self.second.register_buffer("again", self.shift)

    def forward(self, x):
        self.shift += 1
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x + self.shift.detach() * 0)))))


def repeated():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))


def normed():
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 3))


MODELS = {
    "a module under two names": lambda: TwoNames(nn.Linear(4, 4)),
    "a normalisation under two names": lambda: TwoNames(nn.BatchNorm1d(4)),
    "a layer that comes twice": repeated,
    "a normalisation that comes twice": normed,
    "a parameter and a buffer under two names": OneParameterTwice,
    "a parametrized weight": lambda: TwoNames(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
}


def shared(model, batch):
    with lnp_torch.shared(model) as step:
        loss = F.cross_entropy(model(batch[0]), batch[1])
    step.backward(loss, batch[1], F.cross_entropy)


def tracked(model, batch):
    lnp.Tracker(schedule=1, batch=[batch], on_error="raise").observe(0, model, batch)
    with lnp.Tracker(schedule=1, on_error="raise").step(0, model, batch):
        pass


CALLS = {
    "decompose": lambda m, b: lnp.decompose(m, b, by_layer=True),
    "jointly": lambda m, b: lnp.decompose(m, b, estimator="joint", batch_statistics="coupled"),
    "cross_response": lambda m, b: lnp.cross_response(m, b, b),
    "two losses": lambda m, b: lnp.cross_response(m, b, b, measured_loss=F.cross_entropy),
    "gradient_gram": lambda m, b: lnp.gradient_gram(m, b, groups=2),
    "decompose_nested": lambda m, b: lnp.decompose_nested(m, b, batch_sizes=(3, 6)),
    "predicted": lambda m, b: lnp.predicted_loss_change(m, b, learning_rate=0.1),
    "measured": lambda m, b: lnp.measured_loss_change(m, b, learning_rate=0.1),
    "step_taken": lambda m, b: lnp.step_taken(lnp.snapshot(m), m, b),
    "spectrum": lambda m, b: lnp.spectrum(m, b, steps=3),
    "kernel": lambda m, b: lnp.kernel(m, b),
    "linear_operator": lambda m, b: lnp.linear_operator(m, b) @ torch.ones(18).numpy(),
    "shared": shared,
    "tracker": tracked,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_objects_are_the_same(name):
    torch.manual_seed(0)
    model, batch = MODELS[name](), (torch.randn(6, 4), torch.arange(6) % 3)
    before, optimizer = identities(model), torch.optim.SGD(model.parameters(), 0.1)
    for call, function in CALLS.items():
        function(model, batch)
        assert identities(model) == before, call
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, values[name]) and p.grad.abs().max() > 1e-6]
    assert not still


class Interrupted(nn.Linear):
    """Ctrl-C comes between the moment when a transform is entered and that from which on it is ended in any case."""

    def __init__(self, enter):
        super().__init__(4, 3)
        self.enter = enter

    def forward(self, x):
        self.enter()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "enter",
    [
        lambda: torch._C._functorch._vmap_increment_nesting(6, "error"),
        lambda: torch._C._functorch._grad_increment_nesting(),
        lambda: torch._C._functorch._jvp_increment_nesting(),
        lambda: torch._C._functorch._func_increment_nesting(True),
        lambda: [torch._C._functorch._grad_increment_nesting() for _ in range(3)],
        forward_ad.enter_dual_level,
    ],
    ids=["vmap", "grad", "jvp", "functionalize", "three of them", "forward mode"],
)
def test_an_interruption_leaves_no_transform_behind(enter):
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    with pytest.raises(KeyboardInterrupt):
        lnp.decompose(Interrupted(enter), batch)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    assert forward_ad._current_level == -1
    assert lnp.decompose(nn.Linear(4, 3), batch).samples == 6


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.vmap])
def test_a_transform_of_the_users_is_refused_and_goes_on(transform):
    """Nothing of it is ended, and what comes next is measured."""
    model, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3)

    def loss(w):
        with pytest.raises(RuntimeError, match="inside a transform of torch"):
            lnp.decompose(model, batch)
        return w.pow(3).sum()

    expected = [1.0, 1.0] if transform is torch.vmap else [3.0, 3.0]
    assert transform(loss)(torch.ones(2)).tolist() == expected
    assert lnp.decompose(model, batch).samples == 6
