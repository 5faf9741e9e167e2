"""Taps against single samples: what they misread is noticed, takes the general way, and the notes say so."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lnp
from integrations.torch_single_samples import NOTE, Runs, assert_single_samples, recorded
from lnp.per_sample import self_check
from lnp_torch.taps import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear():
    return nn.Linear(4, 4)


TIME_MAJOR = {
    "time-major": lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1),
    "time-major rows": lambda m, x: (
        m.b(torch.tanh(m.a(x.transpose(0, 1).flatten(0, 1)))).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    ),
    "rows": lambda m, x: m.b(torch.tanh(m.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2]),
}


@pytest.mark.parametrize("positions", [3, 6])
@pytest.mark.parametrize("name", TIME_MAJOR)
def test_rows_of_samples_and_positions_in_either_order(name, positions):
    """Also where there are as many positions as samples, so that the shapes do not tell them apart."""
    record = assert_single_samples(Runs(TIME_MAJOR[name], a=linear(), b=linear()), torch.randn(6, positions, 4))
    assert record.cheap, record.notes


def shuffled(m, x):
    order = torch.arange(len(x)).flip(0)
    return m.b(torch.tanh(m.a(x[order])))[order.argsort()]


def packed(m, x):
    """Positions of all samples in one row, as packed sequences have them: the first axis is not the sample."""
    rows = torch.cat([x[0, :1], x[1:, :1].flatten(0, 1), x[:, 1:].flatten(0, 1)])
    rows = m.b(torch.tanh(m.a(rows)))
    first, rest = rows[: len(x)], rows[len(x) :].unflatten(0, (len(x), -1))
    return torch.cat([first[:, None], rest], 1)


UNREAD = {
    "shuffled": (shuffled, (6, 4)),
    "packed": (packed, (6, 3, 4)),
    "einsum": (
        lambda m, x: torch.tanh(torch.einsum("oi,...i->...o", m.a.weight, x) + m.a.bias) @ m.b.weight + m.b.bias,
        (6, 4),
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_misread_takes_the_general_way(name):
    run, shape = UNREAD[name]
    record = assert_single_samples(Runs(run, a=linear(), b=linear()), torch.randn(*shape))
    assert any(NOTE in note for note in record.notes)
    assert not record.cheap


COUPLED = {
    "mean over the batch": lambda m, x: m.b(torch.tanh(m.a(x)) - m.a(x).mean(0)),
    "attention over the batch": lambda m, x: m.b(torch.softmax(m.a(x) @ x.T, -1) @ x),
    "batch norm": lambda m, x: m.b(m.norm(m.a(x))),
    "only in the gradient": lambda m, x: m.b(m.a(x) + 0 * x.sum(0) + m.gate * x.mean(0)),
    "one sample leads": lambda m, x: m.b(m.a(x) + torch.tanh(x[:1])),
}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_interact_are_never_taken_apart(name):
    parts = {"a": linear(), "b": linear()}
    parts |= {"norm": nn.BatchNorm1d(4)} if name == "batch norm" else {}
    parts |= {"gate": nn.Parameter(torch.zeros(4))} if "gradient" in name else {}
    record, _ = recorded(Runs(COUPLED[name], **parts), torch.randn(12, 4), batch_statistics="coupled")
    assert record.sample_square_norms is None
    assert any("not taken apart" in note for note in record.notes)


WRONG = {
    "outer": lambda d: 1.001 * d,
    "dense": lambda d: 1.001 * d,
    "to the next sample": lambda d: (
        d + 0.01 * torch.cat([0 * d[:1], d[:-1]])
    ),  # right on those that alone are given something
}


@pytest.mark.parametrize("broken", WRONG)
def test_a_wrong_rule_is_caught(broken, monkeypatch):
    """The general way takes over, and the numbers stay right."""
    right = rules.RULES[F.linear]

    def off(use):
        if use.kind == broken or (use.kind == "dense" and broken == "to the next sample"):
            return replace(use, factors=lambda d, at: (WRONG[broken](use.factors(d, at)[0]), *use.factors(d, at)[1:]))
        return use

    monkeypatch.setitem(rules.RULES, F.linear, lambda *args, **kwargs: list(map(off, right(*args, **kwargs))))
    record = assert_single_samples(nn.Sequential(linear(), nn.Tanh(), linear()), torch.randn(6, 4))
    assert any("differ from single samples" in note for note in record.notes)


def test_compared_once_for_each_program_and_shape(monkeypatch):
    compared = []
    original = self_check.compare
    monkeypatch.setattr(self_check, "compare", lambda *args: (compared.append(1), original(*args))[1])
    model = Runs(lambda m, x: m.b(torch.tanh(m.a(x)) if m.deep else m.a(x)), a=linear(), b=linear())
    model.deep = True
    measure = lambda samples: lnp.decompose(model, (torch.randn(samples, 4), torch.randn(samples, 4)))
    for _ in range(3):
        measure(6)
    assert len(compared) == 2  # at the parameters as they are, and at others
    measure(7)
    assert len(compared) == 4
    model.deep = False
    measure(6)
    assert len(compared) == 6
    model.deep = True
    measure(6)
    assert len(compared) == 6


@pytest.mark.parametrize("where", ["in the loss", "on the way"])
def test_rows_that_values_move_are_compared_anew_only_where_they_reach_the_outputs(where, monkeypatch):
    compared = []
    original = self_check.compare
    monkeypatch.setattr(self_check, "compare", lambda *args: (compared.append(1), original(*args))[1])

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x, labels):
            if where == "on the way":
                x = x[(labels >= 0).nonzero()[:, 0]]
            logits = self.b(torch.tanh(self.a(x)))
            kept = (labels >= 0).nonzero()[:, 0]
            return {"loss": F.cross_entropy(logits[kept], labels[kept]), "logits": logits}

    model, batch = WithLoss(), {"x": torch.randn(6, 4), "labels": torch.arange(6) % 4}
    lnp.decompose(model, batch)
    once = len(compared)
    lnp.decompose(model, batch)
    assert len(compared) == (once if where == "in the loss" else once + 1)  # at these parameters, not at others again


def test_what_a_closed_gate_hides_is_seen_all_the_same():
    """Behind two factors of zero neither outputs nor gradients show at first that samples interact, or are shuffled."""
    x = torch.randn(6, 4)
    two = {"first": nn.Parameter(torch.zeros(())), "second": nn.Parameter(torch.zeros(()))}
    mixed = Runs(lambda m, x: m.a(x) + m.first * m.second * x.mean(0), a=linear(), **two)
    record, _ = recorded(mixed, x)
    assert record.sample_square_norms is None
    hidden = Runs(lambda m, x: m.a(x) + m.first * shuffled(m, x), a=linear(), b=linear(), first=two["first"])
    record = assert_single_samples(hidden, x)
    assert "b.weight" in record.notes[0]
    with torch.no_grad():
        hidden.first.fill_(1.0)
    assert_single_samples(hidden, x)


def test_parameters_that_move_keep_what_was_found():
    model, x = nn.Sequential(linear(), nn.Tanh(), linear()), torch.randn(6, 4)
    assert_single_samples(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert_single_samples(model, x)


class Largest(TorchDispatchMode):
    """The most numbers of any array that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["dense", "attention", "convolution"])
def test_nothing_of_samples_times_parameters(kind):
    """Neither in the comparison with single samples, which takes a few of them, nor later."""
    samples = 40
    if kind == "dense":
        model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3)), torch.randn(samples, 64)
    elif kind == "attention":
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        model, x = nn.Sequential(nn.Embedding(50, 32), layer, nn.Linear(32, 3)), torch.randint(0, 50, (samples, 4))
    else:
        model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
        x = torch.randn(samples, 16, 5, 5)
    parameters = sum(p.numel() for p in model.parameters())
    y = torch.randn_like(model(x))
    for _ in range(2):
        with Largest() as largest:
            d = lnp.decompose(model, (x, y), rtol=0.05)
        assert d.population is not None
        assert not d.notes
        assert 0 < largest.numbers < samples * parameters / 4


class Alive(TorchDispatchMode):
    """How many numbers are in memory at once at most, in new tensors of more than `least` of them."""

    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.most = least, 0, 0

    def gone(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() in given:
                continue  # a view
            if tensor.numel() > self.least:
                self.now += tensor.numel()
                self.most = max(self.most, self.now)
                weakref.finalize(tensor, self.gone, tensor.numel())
        return out


def test_micro_batches_hold_one_gradient_at_a_time():
    """Beside the sum: what is alive at any moment, over all samples, stays below a few gradients."""
    samples, width = 24, 128
    model, x = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)), torch.randn(samples, width)
    parameters = sum(p.numel() for p in model.parameters())
    y = torch.randn_like(model(x))
    lnp.decompose(model, (x, y), microbatch=1)  # compared now
    with Alive(parameters // 4) as alive:
        d = lnp.decompose(model, (x, y), microbatch=1)
    assert d.population is not None
    assert 0 < alive.most < 6 * parameters


@pytest.mark.parametrize("population", [None, False])
def test_the_gradient_of_one_parameter_is_in_memory_at_a_time(population):
    layers, width = 12, 64
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    batch = torch.randn(16, width), torch.randn(16, width)
    measure = lambda: lnp.decompose(model, batch, max_probes=1, population=population)
    measure()  # compared now
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        measure()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events)
    assert width**2 < max(held) / 4 < 0.75 * layers * width**2


LITTLE = {
    "one and a scale": lambda m, x: m.a(x) + 1e-6 * torch.tanh(x) * (1 + m.w),
    "exponential": lambda m, x: m.a(x) + 1e-6 * torch.tanh(x) / torch.exp(m.w),
    "matrix of a product": lambda m, x: m.a(x) + 1e-6 * torch.tanh(x) @ torch.outer(m.w, m.w),
}


@pytest.mark.parametrize("name", LITTLE)
def test_a_parameter_that_contributes_little_is_not_read_as_zero(name):
    """Beside all others any guess where its samples are would do; its layer's numbers would be zero, without a note."""
    model = Runs(LITTLE[name], a=linear(), w=nn.Parameter(torch.randn(4)))
    record, out = recorded(model, torch.randn(5, 4))
    found = record.sample_square_norms(torch.ones(record.outputs.shape, dtype=torch.float64))["w"]
    grads = [torch.autograd.grad(row.sum(), model.w, retain_graph=True)[0] for row in out]
    assert found.tolist() == pytest.approx([float(grad.square().sum()) for grad in grads], rel=1e-8)
