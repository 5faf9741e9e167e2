"""What is random or depends on the batch: frozen where it can be, never a wrong number where it cannot."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from integrations.torch_reference import dense
from lnp_torch import forward_mode
from lnp_torch.model import program
from lnp_torch.replay_modes import Frozen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch(samples=6):
    return torch.randn(samples, 4, dtype=torch.float64), torch.randint(0, 3, (samples,))


def same_draws(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        return model(x)


def assert_dense(d, model, out, loss, terms, rel=1e-10):
    expected = dense(model, out, loss, terms)
    assert {name: getattr(d, name) for name in expected} == pytest.approx(expected, rel=rel)


def test_dropout_is_frozen_at_the_masks_the_next_step_would_draw():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = batch()
    d = lnp.decompose(model, (x, y), estimator="exact")
    out = same_draws(model, x)
    assert_dense(d, model, out, F.cross_entropy(out, y), 6)
    assert d.probes == 3
    assert any("dropout" in note for note in d.notes)


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_dropout_is_frozen(need_weights):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=need_weights)[0].mean(1))

    model, x, y = Attend().double(), torch.randn(4, 5, 8, dtype=torch.float64), torch.randint(0, 3, (4,))
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert d.probes == 3  # taken apart: a sample alone repeats its rows of the mask
    rows = lnp.load("torch").linearize(model, (x, y), lnp.Options())
    u = rows.vjp(rows.loss_gradient)
    assert (rows.jvp(u) * rows.loss_gradient).sum().item() == pytest.approx(
        sum(rows.inner_products(u, u).values()).item()
    )


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw, self.layer = draw, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * self.draw(x)


RECORDED = {
    "rand": lambda x: torch.rand(x.shape[0], 1, dtype=x.dtype),
    "rand_like": lambda x: torch.rand_like(x[:, :1]),
    "randn": lambda x: torch.randn(x.shape[0], 1, dtype=x.dtype),
    "normal": lambda x: torch.normal(torch.ones_like(x[:, :1]), 0.3),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x[:, :1], 0.5)) + 0.5,
    "bernoulli_": lambda x: torch.empty_like(x[:, :1]).bernoulli_(0.5) + 0.5,
    "uniform_": lambda x: torch.empty_like(x[:, :1]).uniform_(),
    "a distribution": lambda x: torch.distributions.Normal(x[:, :1].detach(), 1.0).rsample(),
    "one for all": lambda x: torch.rand((), dtype=x.dtype),
    "Python's, one for all": lambda x: random.random(),
}
UNKNOWN = {
    "NumPy": lambda x: torch.as_tensor(np.random.rand(x.shape[0], 1), dtype=x.dtype),  # noqa: NPY002
    "Python": lambda x: torch.tensor([[random.random()] for _ in x], dtype=x.dtype),
    "alpha dropout": lambda x: F.alpha_dropout(torch.ones_like(x[:, :1]), 0.4, True),
    "gumbel": lambda x: F.gumbel_softmax(torch.zeros_like(x), hard=False)[:, :1],
}


@pytest.mark.parametrize("name", [*RECORDED, *UNKNOWN])
def test_randomness_is_repeated_or_goes_joint(name):
    model = Noisy({**RECORDED, **UNKNOWN}[name]).double()
    x, y = batch()
    d = lnp.decompose(model, (x, y), estimator="exact")
    out = same_draws(model, x)
    assert_dense(d, model, out, F.cross_entropy(out, y), 6)
    assert d.probes == (3 if name in RECORDED else 18)
    assert any("random" in note for note in d.notes) == (name != "Python's, one for all")
    assert any("cannot be repeated" in note for note in d.notes) == (name in ("alpha dropout", "gumbel"))


class Gated(nn.Module):
    """The samples interact through a gate that is still closed: no output shows it, the gate's gradient does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.layer(x) + self.gate * x.mean(0)[:3]


@pytest.mark.parametrize("estimator", ["auto", "exact", "per_sample"])
def test_coupling_behind_a_closed_gate(estimator):
    model, (x, y) = Gated().double(), batch()
    d = lnp.decompose(model, (x, y), estimator=estimator, max_probes=512, rtol=0)
    assert d.estimator == ("exact" if estimator == "exact" else "joint")
    assert any("interact" in note for note in d.notes)
    out = model(x)
    expected = dense(model, out, F.cross_entropy(out, y), 6)
    assert d.chi_net == pytest.approx(expected["chi_net"], abs=1e-9 + 5 * d.chi_net_stderr)


def test_batch_norm_coupled_measures_the_true_function():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch()
    coupled = lnp.decompose(model, (x, y), estimator="exact", batch_statistics="coupled")
    frozen = lnp.decompose(model, (x, y), estimator="exact")
    out = model(x)
    assert_dense(coupled, model, out, F.cross_entropy(out, y), 6)
    assert coupled.loss == pytest.approx(frozen.loss, rel=1e-12)
    assert abs(coupled.rate - frozen.rate) > 1e-3 * frozen.rate


def test_spectral_norm_repeats_its_power_iteration():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert d.probes == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_microbatch_is_the_same_function_and_refuses_interacting_samples():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch(7)
    whole = lnp.decompose(model, (x, y), estimator="exact")
    parts = lnp.decompose(model, (x, y), estimator="exact", microbatch=3)
    for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    grouped = lnp.decompose(model, (x, y), estimator="grouped", microbatch=3, rtol=0, max_probes=200)
    assert grouped.chi_net == pytest.approx(whole.chi_net, abs=5 * grouped.chi_net_stderr)
    for estimator in ("auto", "grouped", "joint"):
        for size in (1, 3):
            with pytest.raises(ValueError, match=f"microbatch={size}"):
                lnp.decompose(Gated().double(), (x, y), estimator=estimator, microbatch=size)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True], [True, True, False], [False, True, True]])},
        {"attn_mask": torch.tensor([[0.0, -1.0, 2.0], [0.5, 0.0, 0.0], [1.0, 0.0, -3.0]], dtype=torch.float64)},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "scale", "boolean mask", "additive mask", "grouped queries"],
)
def test_attention_with_a_recorded_mask_is_the_fused_one(options):
    """A dropout probability of 1e-12 takes the recorded way and drops nothing."""
    heads = 1 if "enable_gqa" in options else 2
    q = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, 3, 4, dtype=torch.float64)
    with Frozen(True, program(nn.Linear(1, 1), None, None)) as mode:
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, **options)
    assert [kind for kind, _ in mode.record] == ["mask", "state"]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **options))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("kind", ["fused attention", "recurrent", "dense"])
def test_jacobian_vector_products_where_forward_mode_fails(kind, monkeypatch):
    """<J u, v> = <u, J^T v>, by two backward passes where an operation has no forward mode."""
    layers = {
        "fused attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
        "recurrent": Recurrent,
        "dense": lambda: nn.Linear(8, 8),
    }
    model, x = layers[kind]().double(), torch.randn(3, 4, 8, dtype=torch.float64)
    ways = []
    for way in ("_forward", "double_backward"):
        run = getattr(forward_mode, way)
        monkeypatch.setattr(forward_mode, way, lambda *args, way=way, run=run: (ways.append(way), run(*args))[1])
    lin = lnp.load("torch").linearize(model, (x, torch.randn_like(x)), lnp.Options())
    u, v = lin.vjp(lin.signs(0)), lin.signs(1)
    expected = sum(lin.inner_products(u, lin.vjp(v)).values())
    torch.testing.assert_close((lin.jvp(u) * v).sum(), expected)
    assert ways == (["_forward", "double_backward"] if kind == "fused attention" else ["_forward"])


def test_scalar_parameters_do_not_keep_samples_together():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.layer(x) / self.temperature

    model, (x, y) = Scaled().double(), batch()
    d = lnp.decompose(model, (x, y), estimator="exact", population=True)
    out = model(x)
    assert_dense(d, model, out, F.cross_entropy(out, y), 6)
    assert d.probes == 3
    assert d.notes == ()
    assert d.population is not None


def test_coupling_is_seen_where_the_loss_gradient_is_zero():
    """Then every gradient is zero too, and only the outputs tell."""
    layer = nn.Linear(4, 3).double()
    x, _ = batch()
    centred = lambda m, x: m(x) - m(x).mean(0)
    d = lnp.decompose(layer, (x, centred(layer, x).detach()), forward=centred, estimator="exact")
    assert d.chi_loss == 0
    assert d.probes == 18
    assert any("interact" in note for note in d.notes)
