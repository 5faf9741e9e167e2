"""Layers and ways to put them together, against a dense Jacobian: 1e-5 relative in float32, 1e-10 in float64."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

import lnp
from integrations.torch_reference import TOLERANCE, VALUES, assert_agrees, dense, with_batch_statistics
from lnp.contract.trees import leaves
from lnp.estimators.population import jackknife_size


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


def packed(m, x, lengths):
    steps = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return m.head(m.core(steps)[1][-1])


def fused(causal):
    def run(m, x):
        q, k, v = (part.unflatten(2, (2, 3)).transpose(1, 2) for part in m.qkv(x).chunk(3, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    return lambda: Then(run, qkv=nn.Linear(6, 18))


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


def tied():
    model = Then(
        lambda m, t: m.head(torch.tanh(m.table(t))), table=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False)
    )
    model.head.weight = model.table.weight
    return model


def spectrum(m, x):
    return m.out(torch.fft.rfft(m.into(x)).abs())


def filtered():
    """Complex parameters, as in Fourier neural operators."""
    weight = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    return Then(lambda m, x: torch.fft.irfft(torch.fft.rfft(m.into(x)) * m.w, n=4), into=nn.Linear(4, 4), w=weight)


def with_derivative(m, x):
    """Physics-informed: the network and its derivative in the inputs."""
    x = x if x.requires_grad else x.requires_grad_()
    u = m.layer(x)
    return torch.cat([u, torch.autograd.grad(u.sum(), x, create_graph=True)[0]], 1)


def overwritten(m, x):
    return m.layer(x.mul_(2))


class Sine(torch.autograd.Function):
    """Written by hand, without rules for transformations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def branching(m, x):
    """Each sample decides in Python."""
    return torch.stack([m.a(row) if row[0] > 0 else m.b(row) for row in x])


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
    "instance norm, evaluated": (
        lambda: flat(conv(1, 2, 3, 2), lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True))().eval(),
        normal(3, 2, 4),
    ),
    "LSTM": (recurrent(nn.LSTM), normal(3, 4, 3)),
    "LSTM, both ways": (recurrent(nn.LSTM, bidirectional=True), normal(3, 4, 3)),
    "GRU": (recurrent(nn.GRU, num_layers=2), normal(3, 4, 3)),
    "GRU, both ways": (recurrent(nn.GRU, bidirectional=True), normal(3, 4, 3)),
    "GRU, packed": (
        lambda: Then(packed, core=nn.GRU(3, 4, batch_first=True), head=nn.Linear(4, 2)),
        lambda: (torch.randn(3, 4, 3), torch.tensor([4, 2, 3])),
    ),
    "embedding with padding": (flat(lambda: nn.Embedding(7, 3, padding_idx=0)), tokens(3, 4, high=3)),
    "embedding with sparse gradients": (flat(lambda: nn.Embedding(7, 3, sparse=True)), tokens(3, 4)),
    "embedding that shrinks its rows in place": (flat(lambda: nn.Embedding(7, 3, max_norm=0.5)), tokens(3, 4)),
    "bag of embeddings": (lambda: nn.EmbeddingBag(7, 3, max_norm=0.5), tokens(3, 4)),
    "tied head": (tied, tokens(3, 2)),
    "attention": (attention(), normal(3, 4, 6)),
    "causal attention": (attention(causal=True), normal(3, 4, 6)),
    "padded attention": (attention(padded=True), normal(3, 4, 6)),
    "fused attention": (fused(causal=False), normal(3, 4, 6)),
    "fused causal attention": (fused(causal=True), normal(3, 4, 6)),
    "encoder and decoder": (
        lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        lambda: (torch.randn(3, 3, 4), torch.randn(3, 2, 4)),
    ),
    "weight norm": (parametrized(parametrizations.weight_norm), normal(4, 4)),
    "spectral norm, evaluated": (lambda: parametrized(parametrizations.spectral_norm)().eval(), normal(4, 4)),
    "orthogonal": (parametrized(parametrizations.orthogonal), normal(4, 4)),
    "low-rank adapter": (adapter, normal(4, 4)),
    "one layer twice": (shared, normal(4, 4)),
    "mixture of experts, gathered": (experts(gathered), normal(5, 4)),
    "mixture of experts, dispatched": (experts(dispatched), normal(5, 4)),
    "complex parameters": (filtered, normal(5, 4)),
    "derivative in the inputs": (
        lambda: Then(with_derivative, layer=nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))),
        normal(4, 2),
    ),
    "inputs that are written": (lambda: Then(overwritten, layer=nn.Linear(4, 3)), normal(4, 4)),
    "in place on the inputs": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), normal(4, 4)),
    "autograd function": (lambda: Then(lambda m, x: Sine.apply(m.layer(x)), layer=nn.Linear(4, 3)), normal(4, 4)),
    "branches in Python": (lambda: Then(branching, a=nn.Linear(4, 3), b=nn.Linear(4, 3)), normal(5, 4)),
    "two inputs, one of integers": (
        lambda: Then(lambda m, x, t: m.a(x) + m.b(t), a=nn.Linear(4, 3), b=nn.Embedding(7, 3)),
        lambda: (torch.randn(5, 4), torch.randint(0, 7, (5,))),
    ),
    "complex inside": (lambda: Then(spectrum, into=nn.Linear(4, 4), out=nn.Linear(3, 2)), normal(4, 4)),
    "buffers that are written": (with_buffers, normal(4, 4)),
    "parameter list": (listed, normal(4, 4)),
}


GENERAL = {
    "LSTM", "LSTM, both ways", "GRU", "GRU, both ways", "GRU, packed", "embedding that shrinks its rows in place",
    "bag of embeddings", "mixture of experts, gathered", "complex parameters", "derivative in the inputs",
    "branches in Python",
}  # fmt: skip
"""Models with a parameter whose single samples run on their own."""


@pytest.fixture(params=list(TOLERANCE), ids=["float32", "float64"], autouse=True)
def dtype(request):
    torch.manual_seed(0)
    return request.param


def cast(inputs, dtype):
    if isinstance(inputs, tuple):
        return tuple(cast(part, dtype) for part in inputs)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def copied(inputs):
    return tuple(map(copied, inputs)) if isinstance(inputs, tuple) else inputs.clone()


def called(model, inputs):
    """On a copy, since some of the models write to it."""
    return model(*copied(inputs)) if isinstance(inputs, tuple) else model(copied(inputs))


def in_dtype(model, dtype):
    """As `model.to(dtype)`, which would drop the imaginary parts of complex parameters."""
    continuous = lambda t: t.is_floating_point() or t.is_complex()
    return model._apply(lambda t: t.to(torch.promote_types(t.dtype, dtype)) if continuous(t) else t)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_model(name, dtype):
    build, draw = MODELS[name]
    model, x = in_dtype(build(), dtype), cast(draw(), dtype)
    before, given = state(model), copied(x)
    reference = with_batch_statistics(model, lambda m: called(m, x))
    out = called(reference, x)
    y = torch.randn_like(out)
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert_agrees(d, dense(reference, out, F.mse_loss(out, y), y.numel()), dtype)
    assert d.probes == out[0].numel(), d.notes  # the samples were taken apart
    assert unchanged(model, before)
    assert all(map(torch.equal, leaves(given), leaves(x)))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_square_norms_of_single_samples(name, dtype):
    """Any cotangent, each parameter: as by one backward pass for each sample."""
    build, draw = MODELS[name]
    model, x = in_dtype(build(), dtype), cast(draw(), dtype)
    reference = with_batch_statistics(model, lambda m: called(m, x))
    out = called(reference, x)
    record = lnp.load("torch").linearize(model, (x, torch.randn_like(out)), lnp.Options())
    v = torch.randn(record.outputs.shape, dtype=dtype)
    found = record.sample_square_norms(v)
    names, parameters = zip(*((n, p) for n, p in reference.named_parameters() if p.requires_grad), strict=True)
    for sample in range(len(v)):
        masked = torch.zeros_like(v)
        masked[sample] = v[sample]
        grads = torch.autograd.grad(
            out, parameters, masked.reshape(out.shape), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        expected = {
            name: torch.linalg.vector_norm(grad.to_dense() if grad.is_sparse else grad).item() ** 2
            for name, grad in zip(names, grads, strict=True)
        }
        measured = {name: norm[sample].item() for name, norm in found.items()}
        assert measured == pytest.approx(expected, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype] * max(expected.values()))


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_products_of_single_samples_with_the_gradient(name, dtype):
    """What the backward pass of g tells: ||J_l^T g||^2, and <J_m^T g_m, J^T g> as one for each sample does."""
    build, draw = MODELS[name]
    model, x = in_dtype(build(), torch.float64), cast(draw(), torch.float64)
    reference = with_batch_statistics(model, lambda m: called(m, x))
    out = called(reference, x)
    record = lnp.load("torch").linearize(model, (x, torch.randn_like(out)), lnp.Options(population=True))
    yielded = record.gradient_pass(True, jackknife_size(len(out)), False)
    named = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    gradient, parameters = record.loss_gradient / yielded.magnitude, list(named.values())
    whole = gradient.reshape(out.shape)
    u = torch.autograd.grad(out, parameters, whole, retain_graph=True, allow_unused=True, materialize_grads=True)
    u = [part.to_dense() if part.is_sparse else part for part in u]
    expected = {name: part.abs().square().sum().item() for name, part in zip(named, u, strict=True)}
    measured = {name: norm.item() for name, norm in yielded.square_norms.items()}
    assert measured == pytest.approx(expected, rel=1e-10, abs=1e-10 * max(expected.values()))
    assert (yielded.products is not None) is record.cheap is (name not in GENERAL), record.notes
    if yielded.products is None:
        return
    found = yielded.products
    for sample in yielded.index.tolist():
        masked = torch.zeros_like(record.outputs)
        masked[sample] = gradient[sample]
        grads = torch.autograd.grad(
            out, parameters, masked.reshape(out.shape), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        products = [(grad.to_dense() if grad.is_sparse else grad) * part for grad, part in zip(grads, u, strict=True)]
        scale = max(product.abs().sum().item() for product in products)
        total = sum(product.sum().item() for product in products)
        assert found[sample].item() == pytest.approx(total, rel=1e-10, abs=1e-10 * scale)


def test_spectral_norm_in_training_mode(dtype):
    """Each pass would take one more step of the power iteration: the first one is measured, none is kept."""
    model = parametrized(parametrizations.spectral_norm)().to(dtype)
    x, y = torch.randn(4, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    before = state(model)
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert unchanged(model, before)
    out = model(x)
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), 12), dtype)
    assert d.probes == 3


def check_random(model, x, dtype, *, apart=True):
    """The next pass of the model draws what was measured."""
    model, x = model.to(dtype), x.to(dtype)
    y = torch.randn_like(model(x))
    d = lnp.decompose(model, (x, y), estimator="exact")
    out = model(x)
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), y.numel()), dtype)
    assert d.probes == (out[0].numel() if apart else out.numel()), d.notes
    return d


DROPOUTS = {
    "elements": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)), normal(4, 4)),
    "channels": (lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Dropout1d(0.4), nn.Flatten()), normal(4, 2, 3)),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4, inplace=True)), normal(4, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), normal(3, 3, 4)),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_keeps_one_mask(name, dtype):
    build, draw = DROPOUTS[name]
    d = check_random(build(), draw(), dtype)
    assert d.notes == ("dropout keeps one mask for the whole measurement",)


UNKNOWN = {
    "between the layers of an LSTM": lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.4)(),
    "alpha": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.AlphaDropout(0.5)),
    "slopes": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.RReLU()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_randomness_that_is_not_recorded_keeps_samples_together(name, dtype):
    check_random(UNKNOWN[name](), torch.randn(5, 4, 3), dtype, apart=False)


@pytest.mark.parametrize("inside", ["nothing", "dropout", "batch norm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, inside, dtype):
    """What they compute again in the backward pass is what was measured, and nothing is left in the gradients."""
    middle = {"nothing": nn.Identity(), "dropout": nn.Dropout(0.4), "batch norm": nn.BatchNorm1d(8)}[inside]
    plain = nn.Sequential(nn.Linear(4, 8), middle, nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    model = Then(lambda m, x: checkpoint(m.layer, x, use_reentrant=reentrant), layer=plain)
    x, y = torch.randn(5, 4, dtype=dtype, requires_grad=True), torch.randn(5, 3, dtype=dtype)
    d = lnp.decompose(model, (x, y), estimator="exact")
    reference = with_batch_statistics(plain, lambda m: m(x)) if inside == "batch norm" else plain
    out = reference(x)
    assert_agrees(d, dense(reference, out, F.mse_loss(out, y), 15), dtype)
    assert d.probes == 3, d.notes
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None


def test_checkpoints_are_back_afterwards(dtype):
    calls = []
    layer = lambda m, x: (calls.append(1), m.layer(x))[1]
    model = Then(lambda m, x: checkpoint(layer, m, x, use_reentrant=False), layer=nn.Linear(4, 3))
    batch = torch.randn(5, 4), torch.randn(5, 3)
    lnp.decompose(model, batch)
    with contextlib.suppress(RuntimeError):
        lnp.decompose(model, (batch[0][:, :2], batch[1]))
    calls.clear()
    F.mse_loss(model(batch[0]), batch[1]).backward()
    assert len(calls) == 2


@dataclasses.dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor
    steps: int = 1


@dataclasses.dataclass
class Returned(ModelOutput):
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None
    hidden: tuple | None = None


WRAPS = {
    "tuple": tuple,
    "list": list,
    "dictionary": lambda pair: {"a": pair[0], "b": pair[1], "count": torch.tensor(2)},
    "dataclass": lambda pair: Answer(*pair),
    "Hugging Face": lambda pair: Returned(*pair),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_several_outputs(kind, dtype):
    both = lambda m, x: WRAPS[kind]((m.a(x), m.b(x).unflatten(1, (2, 2))))
    model = Then(both, a=nn.Linear(4, 3), b=nn.Linear(4, 4)).to(dtype)
    x, y = torch.randn(4, 4, dtype=dtype), torch.randn(4, 7, dtype=dtype)

    def joined(out):
        parts = [part for part in leaves(out) if isinstance(part, torch.Tensor) and part.is_floating_point()]
        return torch.cat([part.flatten(1) for part in parts], 1)

    d = lnp.decompose(model, (x, y), lambda out, y: F.mse_loss(joined(out), y), loss_terms=28, estimator="exact")
    out = joined(model(x))
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), 28), dtype)
    assert (d.outputs, d.probes) == (7, 7)


@pytest.mark.parametrize("beside", [False, True])
def test_complex_outputs(beside, dtype):
    """A complex number is two outputs, whether real ones stand beside it or not."""
    model = nn.Linear(4, 3).to(dtype)
    transformed = lambda m, x: (torch.fft.fft(m(x)), m(x)) if beside else torch.fft.fft(m(x))
    loss = lambda out, y: (((out[0] if beside else out).abs() - y) ** 2).mean() + beside * out[-1].abs().mean()
    x, y = torch.randn(5, 4, dtype=dtype), torch.randn(5, 3, dtype=dtype)
    d = lnp.decompose(model, (x, y), loss, forward=transformed, estimator="exact", loss_terms=15)
    parts = transformed(model, x)
    first = torch.view_as_real(parts[0] if beside else parts).flatten(1)
    flat = torch.cat([first, parts[1]], 1) if beside else first
    again = torch.view_as_complex(flat[:, :6].unflatten(1, (3, 2)).contiguous())
    assert_agrees(d, dense(model, flat, loss((again, flat[:, 6:]) if beside else again, y), 15), dtype)
    assert d.probes == 6 + 3 * beside


def test_updates_of_complex_parameters(dtype):
    model = in_dtype(filtered(), dtype)
    x, y = torch.randn(5, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    F.mse_loss(model(x), y).backward()
    update = {name: -1e-3 * p.grad for name, p in model.named_parameters()}
    for change in (lnp.predicted_loss_change, lnp.measured_loss_change):
        assert change(model, (x, y), update=update) == pytest.approx(
            change(model, (x, y), learning_rate=1e-3), rel=1e-3 if dtype == torch.float32 else 1e-9
        )


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
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), 12), dtype)
