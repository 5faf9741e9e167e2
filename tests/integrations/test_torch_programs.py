"""Models that a compiler of PyTorch's has read: scripted, traced, exported; against a dense Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_reference import assert_agrees, dense

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]
N = 6


def batch():
    return torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3


def network(*between):
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3)).double()


class Counts(nn.Module):
    """Has a counter and a buffer that its forward pass writes to."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.total += x.shape[0]
        return self.layer(x) + 0.01 * self.total


class Around(nn.Module):
    """A module with a program inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 3).double()

    def forward(self, x):
        return self.head(self.inner(x)).square()


def exported(model, **options):
    return torch.export.export(model, batch()[:1], **options).module()


def with_any_batch(model):
    return exported(model, dynamic_shapes=({0: torch.export.Dim("n")},))


PROGRAMS = {
    "scripted": lambda: torch.jit.script(network()),
    "scripted, batch norm": lambda: torch.jit.script(network(nn.BatchNorm1d(5))),
    "scripted, with a state": lambda: torch.jit.script(Counts().double()),
    "traced": lambda: torch.jit.trace(network(), batch()[0]),
    "scripted inside": lambda: Around(torch.jit.script(network())),
    "traced inside": lambda: Around(torch.jit.trace(network(), batch()[0])),
    "exported": lambda: exported(network()),
    "exported, for any batch": lambda: with_any_batch(network()),
    "traced by torch.fx": lambda: torch.fx.symbolic_trace(network()),
}


@pytest.fixture(params=PROGRAMS)
def model(request):
    return PROGRAMS[request.param]()


def held(model):
    """Everything that a measurement must leave as it was."""
    tensors = {name: (id(t), t.detach().clone(), t.grad) for name, t in model.named_parameters()}
    buffers = {name: (id(t), t.clone()) for name, t in model.named_buffers()}
    return repr((tensors, buffers, getattr(model, "calls", None)))


def test_it_is_measured_on_its_own_parameters(model):
    x, y = batch()
    before = held(model)
    d = lnp.decompose(model, (x, y), estimator="exact")
    kernel = lnp.kernel(model, (x, y), progress=False)
    spectrum = lnp.spectrum(model, (x, y))
    change = lnp.measured_loss_change(model, (x, y), learning_rate=1e-6)
    assert held(model) == before

    out = model(x)
    assert_agrees(d, dense(model, out, F.cross_entropy(out, y), N), torch.float64)
    assert kernel.matrix.trace() == pytest.approx(d.chi_net * N, rel=1e-9)
    assert spectrum.first_moment == pytest.approx(d.rate / (d.chi_loss / N), rel=1e-9)
    assert change == pytest.approx(-1e-6 * d.rate, rel=1e-4)


def test_a_step_is_shared_or_refused(model):
    x, y = batch()
    if isinstance(model, torch.jit.RecursiveScriptModule):  # takes no hooks
        with pytest.raises(ValueError, match=r"cannot be watched.*nothing has been touched"):
            lnp_torch.shared(model)
        return
    with lnp_torch.shared(model) as step:
        loss = F.cross_entropy(model(x), y)
    d = step.backward(loss, y, F.cross_entropy)
    assert d.rate == pytest.approx(sum(float(p.grad.square().sum()) for p in model.parameters()), rel=1e-9)
    assert d.rate > 0
