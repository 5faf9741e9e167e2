"""Layers and ways to put them together, against a dense Jacobian: 1e-5 relative in float32, 1e-10 in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lnp
from integrations.torch_reference import dense, with_batch_statistics
from lnp.structure import leaves

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
VALUES = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


class Then(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def normal(*shape):
    return lambda: torch.randn(shape)


def tokens(*shape, high=7):
    return lambda: torch.randint(0, high, shape)


def flat(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers), nn.Flatten())


def conv(dimension, *args, **kwargs):
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1](*args, **kwargs)


def up(dimension, *args, **kwargs):
    return lambda: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimension - 1](*args, **kwargs)


def recurrent(kind, **how):
    width = 8 if how.get("bidirectional") else 4
    last = lambda m, x: m.head(m.core(x)[0][:, -1])
    return lambda: Then(last, core=kind(3, 4, batch_first=True, **how), head=nn.Linear(width, 2))


def attention(**how):
    def run(m, x):
        causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype) if how.get("causal") else None
        padded = (x[:, :, 0] > 0.5) & (torch.arange(4) > 0) if how.get("padded") else None
        return m.core(x, x, x, key_padding_mask=padded, attn_mask=causal, need_weights=False)[0]

    return lambda: Then(run, core=nn.MultiheadAttention(6, 2, batch_first=True))


def fused(m, x):
    q, k, v = (part.unflatten(2, (2, 3)).transpose(1, 2) for part in m.qkv(x).chunk(3, 2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def adapted(m, x):
    return m.base(x) + m.up(m.down(x))


def adapter():
    base = nn.Linear(4, 3).requires_grad_(False)
    return Then(adapted, base=base, down=nn.Linear(4, 2, bias=False), up=nn.Linear(2, 3, bias=False))


def gathered(m, x):
    """Each sample goes through one expert, whose weights are gathered."""
    chosen = (x[:, 0] > 0).long()
    return torch.einsum("ni,nio->no", x, m.experts[chosen]) * m.gate(x).softmax(1).gather(1, chosen[:, None])


def dispatched(m, x):
    """Experts see the samples that are routed to them."""
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    chosen = (x[:, 0] > 0).long()
    for index, expert in enumerate(m.experts):
        rows = (chosen == index).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(x[rows]))
    return out


def experts(run):
    if run is gathered:
        return lambda: Then(run, experts=nn.Parameter(torch.randn(2, 4, 3)), gate=nn.Linear(4, 2))
    return lambda: Then(run, experts=nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]))


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def checkpointed():
    return Then(lambda m, x: checkpoint(m.layer, x, use_reentrant=False), layer=shared())


def tied():
    model = Then(
        lambda m, t: m.head(torch.tanh(m.table(t))), table=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False)
    )
    model.head.weight = model.table.weight
    return model


def spectrum(m, x):
    return m.out(torch.fft.rfft(m.into(x)).abs())


def counted(m, x):
    m.calls += 1
    return m.layer(x) * m.scale


def with_buffers():
    model = Then(counted, layer=nn.Linear(4, 3))
    model.register_buffer("calls", torch.zeros(()))
    model.register_buffer("scale", torch.tensor(1.5))
    return model


def listed():
    parameters = nn.ParameterList([torch.randn(4, 3), torch.randn(3)])
    return Then(lambda m, x: x @ m.w[0] + m.w[1], w=parameters)


def parametrized(wrap):
    return lambda: nn.Sequential(wrap(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))


MODELS = {
    "conv1d, dilated": (flat(conv(1, 2, 3, 3, dilation=2)), normal(4, 2, 8)),
    "conv2d, grouped": (flat(conv(2, 4, 4, 2, groups=2)), normal(4, 4, 4, 4)),
    "conv2d, depthwise": (
        flat(conv(2, 3, 6, 3, groups=3, padding="same"), nn.Tanh, lambda: nn.AvgPool2d(2)),
        normal(3, 3, 4, 4),
    ),
    "conv2d, strided, reflected": (
        flat(conv(2, 2, 3, 3, stride=2, padding=1, padding_mode="reflect")),
        normal(3, 2, 5, 5),
    ),
    "conv3d": (flat(conv(3, 1, 2, 2), nn.Tanh, conv(3, 2, 1, 2)), normal(3, 1, 4, 3, 3)),
    "transposed conv1d": (flat(up(1, 2, 3, 3, stride=2)), normal(3, 2, 3)),
    "transposed conv2d": (flat(up(2, 2, 2, 2, groups=2)), normal(3, 2, 3, 3)),
    "transposed conv3d": (flat(up(3, 1, 2, 2)), normal(3, 1, 2, 2, 2)),
    "batch norm": (flat(conv(1, 2, 3, 2), lambda: nn.BatchNorm1d(3)), normal(5, 2, 4)),
    "batch norm, evaluated": (lambda: flat(conv(2, 2, 3, 2), lambda: nn.BatchNorm2d(3))().eval(), normal(3, 2, 3, 3)),
    "batch norm without running statistics": (
        flat(lambda: nn.Linear(4, 3), lambda: nn.BatchNorm1d(3, track_running_stats=False)),
        normal(5, 4),
    ),
    "layer norm": (flat(lambda: nn.Linear(4, 3), lambda: nn.LayerNorm(3)), normal(4, 4)),
    "group norm": (flat(conv(1, 2, 4, 2), lambda: nn.GroupNorm(2, 4)), normal(3, 2, 4)),
    "instance norm": (flat(conv(2, 2, 3, 2), lambda: nn.InstanceNorm2d(3, affine=True)), normal(3, 2, 4, 4)),
    "instance norm, running statistics": (
        flat(conv(1, 2, 3, 2), lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        normal(3, 2, 4),
    ),
    "RMS norm": (flat(lambda: nn.Linear(4, 3), lambda: nn.RMSNorm(3)), normal(4, 4)),
    "LSTM": (recurrent(nn.LSTM, bidirectional=True), normal(3, 4, 3)),
    "GRU": (recurrent(nn.GRU, num_layers=2), normal(3, 4, 3)),
    "embedding with padding": (flat(lambda: nn.Embedding(7, 3, padding_idx=0)), tokens(3, 4, high=3)),
    "tied head": (tied, tokens(3, 2)),
    "attention": (attention(), normal(3, 4, 6)),
    "causal attention": (attention(causal=True), normal(3, 4, 6)),
    "padded attention": (attention(padded=True), normal(3, 4, 6)),
    "fused causal attention": (lambda: Then(fused, qkv=nn.Linear(6, 18)), normal(3, 4, 6)),
    "weight norm": (parametrized(parametrizations.weight_norm), normal(4, 4)),
    "spectral norm, evaluated": (lambda: parametrized(parametrizations.spectral_norm)().eval(), normal(4, 4)),
    "orthogonal": (parametrized(parametrizations.orthogonal), normal(4, 4)),
    "low-rank adapter": (adapter, normal(4, 4)),
    "one layer twice": (shared, normal(4, 4)),
    "mixture of experts, gathered": (experts(gathered), normal(5, 4)),
    "mixture of experts, dispatched": (experts(dispatched), normal(5, 4)),
    "checkpointed": (checkpointed, normal(3, 4)),
    "complex inside": (lambda: Then(spectrum, into=nn.Linear(4, 4), out=nn.Linear(3, 2)), normal(4, 4)),
    "buffers that are written": (with_buffers, normal(4, 4)),
    "parameter list": (listed, normal(4, 4)),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"], autouse=True)
def dtype(request):
    torch.manual_seed(0)
    return request.param


def cast(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def agrees(d, expected, dtype):
    assert {name: getattr(d, name) for name in VALUES} == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("name", MODELS)
def test_model(name, dtype):
    build, draw = MODELS[name]
    model, x = build().to(dtype), cast(draw(), dtype)
    before = state(model)
    reference = with_batch_statistics(model, lambda m: m(x))
    out = reference(x)
    y = torch.randn_like(out)
    d = lnp.decompose(model, (x, y), estimator="exact")
    agrees(d, dense(reference, out, F.mse_loss(out, y), y.numel()), dtype)
    assert d.probes == out[0].numel(), d.notes  # the samples were taken apart
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_spectral_norm_in_training_mode(dtype):
    """Each pass would take one more step of the power iteration: the first one is measured, none is kept."""
    model = parametrized(parametrizations.spectral_norm)().to(dtype)
    x, y = torch.randn(4, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    before = state(model)
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    out = model(x)
    agrees(d, dense(model, out, F.mse_loss(out, y), 12), dtype)


def test_dropout_keeps_one_mask(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(4, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    torch.manual_seed(5)
    d = lnp.decompose(model, (x, y), estimator="exact")
    out = model(x)  # the next pass draws the same mask
    agrees(d, dense(model, out, F.mse_loss(out, y), 12), dtype)
    assert d.probes == 3
    assert any("dropout" in note for note in d.notes)


@dataclasses.dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor
    steps: int = 1


@pytest.mark.parametrize("wrap", [tuple, list, lambda pair: Answer(*pair), lambda pair: {"a": pair[0], "b": pair[1]}])
def test_several_outputs(wrap, dtype):
    model = Then(lambda m, x: wrap((m.a(x), m.b(x).unflatten(1, (2, 2)))), a=nn.Linear(4, 3), b=nn.Linear(4, 4)).to(
        dtype
    )
    x, y = torch.randn(4, 4, dtype=dtype), torch.randn(4, 7, dtype=dtype)

    def joined(out):
        return torch.cat([part.flatten(1) for part in leaves(out) if isinstance(part, torch.Tensor)], 1)

    d = lnp.decompose(model, (x, y), lambda out, y: F.mse_loss(joined(out), y), loss_terms=28, estimator="exact")
    out = joined(model(x))
    agrees(d, dense(model, out, F.mse_loss(out, y), 28), dtype)
    assert (d.outputs, d.probes) == (7, 7)


def test_bfloat16_autocast(dtype):
    """bfloat16 rounds to 3 digits: 2% beside the same network in full precision."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    with torch.autocast("cpu", torch.bfloat16):
        d = lnp.decompose(model, (x, y), estimator="exact")
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    out = model(x)
    expected = dense(model, out, F.cross_entropy(out, y), 16)
    assert {name: getattr(d, name) for name in VALUES} == pytest.approx(expected, rel=0.02)
    assert d.probes == 3, d.notes
    assert d.chi_net != pytest.approx(expected["chi_net"], rel=1e-5)  # it did run in bfloat16


def test_compiled(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(4, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    d = lnp.decompose(torch.compile(model, backend="eager"), (x, y), estimator="exact")
    out = model(x)
    agrees(d, dense(model, out, F.mse_loss(out, y), 12), dtype)
