"""Leave no trace: what a measurement could disturb is bit-identical afterwards, also after an exception."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from lnp_torch.float16 import at_scale_one


class Everything(nn.Module):
    """Dropout, batch normalisation, a counter on the module and one in a buffer, random numbers of Python and NumPy."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.old_style = torch.nn.utils.spectral_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = x
        random.random(), np.random.rand()  # noqa: NPY002
        x = F.dropout(self.norm(self.first(x)).relu_(), 0.3, self.training)
        return self.head(self.old_style(x))


@pytest.fixture
def run():
    torch.manual_seed(0)
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    F.cross_entropy(model(x), y).backward()
    return model, optimizer, (x, y)


def snapshot(model, optimizer):
    return copy.deepcopy({
        "state": model.state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "flags": [(m.training, sorted(vars(m)), m.__dict__.get("calls")) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "optimizer": optimizer.state_dict(),
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
        "global": (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
        ),
    })  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("estimator", ["auto", "exact", "grouped", "joint"])
def test_every_estimator(run, estimator):
    model, optimizer, batch = run
    before, parameters = snapshot(model, optimizer), list(model.parameters())
    lnp.decompose(model, batch, estimator=estimator, by_layer=True)
    lnp.cross_response(model, batch, batch, estimator=estimator)
    lnp.measured_loss_change(model, batch, learning_rate=0.1)
    after = snapshot(model, optimizer)
    assert {key: same(before[key], after[key]) for key in before} == dict.fromkeys(before, True)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("where", ["loss", "forward", "inside"])
def test_an_exception_passes_through(run, where):
    model, optimizer, batch = run

    def fail(*args):
        raise KeyError("on purpose")

    def inside(model, x):
        model(x)
        fail()

    options = {"loss": {"loss": fail}, "forward": {"forward": fail}, "inside": {"forward": inside}}[where]
    before = snapshot(model, optimizer)
    with pytest.raises(KeyError, match="on purpose"):
        lnp.decompose(model, batch, **options)
    after = snapshot(model, optimizer)
    assert {key: same(before[key], after[key]) for key in before} == dict.fromkeys(before, True)


def test_training_continues_bit_identically(run):
    batch = run[2]

    def train(measure):
        torch.manual_seed(1)
        twin, losses = Everything(), []
        steps = torch.optim.Adam(twin.parameters())
        for _ in range(5):
            if measure:
                lnp.decompose(twin, batch)
            loss = F.cross_entropy(twin(batch[0]), batch[1])
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        return losses, twin.state_dict(), steps.state_dict(), torch.get_rng_state()

    assert same(train(True), train(False))


def test_parameter_hooks_do_not_fire(run):
    model, _, batch = run
    fired = []
    for p in model.parameters():
        p.register_hook(lambda grad: fired.append(grad))
        p.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    lnp.decompose(model, batch)
    assert fired == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_contexts_without_gradients(context):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(0, 3, (5,))
    expected = lnp.decompose(model, (x, y))
    with context():
        assert lnp.decompose(model, (x, y)) == expected


def test_compiled_and_wrapped_models_are_measured_as_written():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(5, 4), torch.randint(0, 3, (5,))
    expected = lnp.decompose(model, (x, y))
    assert lnp.decompose(torch.compile(model), (x, y)) == expected
    assert lnp.decompose(nn.DataParallel(model), (x, y)) == expected
    partly = nn.Sequential(torch.compile(model[0]), model[1])
    assert lnp.decompose(partly, (x, y)).chi_pos == pytest.approx(expected.chi_pos, rel=1e-6)


def test_float64_sums_for_float64_and_float32_for_narrower_types():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(16, 8),
        torch.randint(0, 3, (16,)),
    )
    exact = lnp.decompose(model.double(), (x.double(), y), estimator="exact")
    for dtype, rel in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        narrow = model.to(dtype)
        record = lnp.load("torch").linearize(narrow, (x.to(dtype), y), lnp.Options())
        assert record.outputs.dtype == record.loss_gradient.dtype == torch.float32
        u = record.vjp(record.loss_gradient)
        assert {value.dtype for value in record.inner_products(u, u).values()} == {torch.float32}
        d = lnp.decompose(narrow, (x.to(dtype), y), estimator="exact")
        assert d.chi_net == pytest.approx(exact.chi_net, rel=rel)
        assert d.chi_pos == pytest.approx(exact.chi_pos, rel=4 * rel)
        assert not any("interact" in note for note in d.notes)


class WithLoss(nn.Module):
    """Computes its own loss, over 1e8 terms of which it sees a few, as in gradient accumulation."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, labels):
        logits = self.network(x)
        return {"logits": logits, "loss": F.cross_entropy(logits.float(), labels, reduction="sum") / 1e8}


@pytest.mark.parametrize("way", ["parameters", "autocast", "own loss"])
@pytest.mark.parametrize("options", [{"estimator": "exact"}, {"microbatch": 4}], ids=["whole", "micro-batches"])
def test_loss_gradients_below_the_range_of_float16(way, options):
    """A mean over 1e8 terms: the smallest number in float16 is 6e-8."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    loss = lambda out, y: F.cross_entropy(out.float(), y, reduction="sum") / 1e8
    exact = lnp.decompose(network, (x, y), loss, loss_terms=10**8, **options)
    measured = {"model": network, "batch": (x, y), "loss": loss, **options}
    if way == "own loss":
        measured |= {"model": WithLoss(network), "batch": {"x": x.half(), "labels": y}, "loss": None}
    elif way == "parameters":
        measured |= {"batch": (x.half(), y)}
    if way != "autocast":
        network.half()
    with torch.autocast("cpu", torch.float16, enabled=way == "autocast"):
        d = lnp.decompose(**measured, loss_terms=10**8)
    for name in ("rate", "chi_loss", "chi_net", "chi_pos"):
        assert getattr(d, name) == pytest.approx(getattr(exact, name), rel=0.01)


def test_vectors_at_the_end_of_the_range_of_float32():
    """The scale that brings them to one would overflow."""
    tiny = torch.tensor([1e-41])
    (product,) = at_scale_one(lambda vector: [2 * vector[0]], [tiny], [tiny.half()])
    assert product == pytest.approx(2e-41, rel=0.01)


def test_products_with_vectors_below_the_range_of_float16():
    """The population's jackknife takes J u of a gradient, a measured step moves along it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    loss = nn.HuberLoss(delta=1e-9)  # its derivative is at most delta
    y = F.one_hot(y, 3).float()
    exact = lnp.decompose(network, (x, y), loss, population=True).population
    step = lnp.measured_loss_change(network, (x, y), loss, learning_rate=1e9)
    batch = x.half(), y
    d = lnp.decompose(network.half(), batch, loss, population=True).population
    assert d.rate == pytest.approx(exact.rate, rel=0.02)
    assert d.rate_stderr == pytest.approx(exact.rate_stderr, rel=0.02)
    assert lnp.measured_loss_change(network, batch, loss, learning_rate=1e9) == pytest.approx(step, rel=0.05)


def test_autocast_is_taken_from_the_caller():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(16, 8),
        torch.randint(0, 3, (16,)),
    )
    exact = lnp.decompose(model, (x, y), estimator="exact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d = lnp.decompose(model, (x, y), estimator="exact")
        assert torch.is_autocast_enabled("cpu")
    assert d.chi_net != exact.chi_net
    assert d.chi_net == pytest.approx(exact.chi_net, rel=0.05)
    assert not any("interact" in note for note in d.notes)


def test_nothing_is_kept_alive():
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(0, 3, (5,))
    d = lnp.decompose(model, (x, y))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert d.chi_net > 0
