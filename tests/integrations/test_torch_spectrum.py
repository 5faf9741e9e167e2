"""Spectrum, kernel and operators of PyTorch models against dense Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from integrations.spectral_reference import check


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of small products: on a busy machine threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """Whose fused kernel has no forward mode, so that products go by two backward passes."""

    def __init__(self):
        super().__init__()
        self.embed, self.heads, self.head = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, tokens):
        q, k, v = self.heads(self.embed(tokens)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        out = torch.tanh(self.layer(x))
        return out - out.mean(0)


def dense(model, x, y, loss):
    """(J, g) row by row."""
    out = model(x)
    parameters = list(model.parameters())
    leaf = out.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf, y), leaf)
    rows = [
        torch.cat([part.reshape(-1) for part in torch.autograd.grad(entry, parameters, retain_graph=True)])
        for entry in out.reshape(-1)
    ]
    return torch.stack(rows).numpy(), g.reshape(out.shape[0], -1).numpy()


def tokens_loss(out, y):
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


CASES = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)),
        torch.randn(6, 5), torch.randint(4, (6,)), F.cross_entropy,
    ),
    "cnn": lambda: (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)),
        torch.randn(6, 1, 6, 6), torch.randn(6, 4), F.mse_loss,
    ),
    "attention": lambda: (Attention(), torch.randint(7, (3, 4)), torch.randint(3, (3, 4)), tokens_loss),
    "coupled": lambda: (Coupled(), torch.randn(6, 5), torch.randn(6, 4), F.mse_loss),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_models(name, dtype):
    torch.manual_seed(0)
    model, x, y, loss = CASES[name]()
    cast = lambda t: t.to(getattr(torch, dtype)) if t.is_floating_point() else t
    model, x, y = model.to(getattr(torch, dtype)), cast(x), cast(y)
    before = [p.clone() for p in model.parameters()]
    s = check(model, (x, y), loss, *dense(model, x, y, loss), dtype)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    # mean squared error of outputs whose mean is taken out: the kernel has a null space
    assert s.exhausted or s.eigenvalues.size == 24 or name == "attention"


def test_micro_batches_change_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    batch = (torch.randn(7, 5).double(), torch.randint(4, (7,)))
    whole, parts = (lnp.spectrum(model, batch, steps=6, estimator="exact", microbatch=m) for m in (None, 2))
    assert parts.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-8)
    assert parts.chi_pos == pytest.approx(whole.chi_pos, rel=1e-10)


def test_half_precision_runs():
    """bfloat16 has 8 bits: the position agrees to 2%, where the Lanczos products round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(6, 5), torch.randint(4, (6,))
    expected = lnp.spectrum(model, (x, y), estimator="exact")
    s = lnp.spectrum(model.bfloat16(), (x.bfloat16(), y), estimator="exact", steps=4)
    assert s.chi_pos == pytest.approx(expected.chi_pos, rel=0.02)
    j = lnp.linear_operator(model, (x.bfloat16(), y), which="jacobian")
    v = np.random.default_rng(0).standard_normal(24)
    assert j @ (j.T @ v) == pytest.approx(lnp.kernel(model, (x.bfloat16(), y)).matrix @ v, abs=0.05 * s.lambda_max)


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    batch = (torch.randn(6, 5), torch.randint(4, (6,)))
    state = torch.get_rng_state()
    s, k = lnp.spectrum(model, batch, probes=2, estimator="exact"), lnp.kernel(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert any("dropout" in note for note in s.decomposition.notes)
    assert k.asymmetry < 1e-6  # one mask for all rows
    assert np.allclose(k.chi_pos, s.chi_pos, rtol=1e-5)
