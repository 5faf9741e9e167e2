"""The self-check and the look at every measurement, in PyTorch: right numbers, or a note, or an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_reference import assert_agrees, dense
from integrations.torch_single_samples import Runs
from lnp.contract.linearization import coupling_tolerance
from lnp.per_sample import self_check as core
from lnp_torch import look, record

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear(outputs=4):
    return nn.Linear(4, outputs, dtype=F64)


def drawn(samples=6, width=4):
    return torch.randn(samples, width, dtype=F64)


def measured(model, x, y, way="decompose", **options):
    """By `lnp.decompose`, or as part of a training step, held against the dense Jacobian."""
    options = {"estimator": "exact", **options}
    with torch.random.fork_rng():
        out = model(*x) if isinstance(x, tuple) else model(x)
        expected = dense(model, out, F.mse_loss(out, y), y.numel())
    if way == "decompose":
        d = lnp.decompose(model, (x, y), **options)
    else:
        model.zero_grad()
        with lnp_torch.shared(model) as step:
            loss = F.mse_loss(model(*x) if isinstance(x, tuple) else model(x), y)
        d = step.backward(loss, y, nn.MSELoss(), **options)
        trained = [p.grad for p in model.parameters()]
        model.zero_grad()
        F.mse_loss(model(*x) if isinstance(x, tuple) else model(x), y).backward()
        for mine, p in zip(trained, model.parameters(), strict=True):
            assert mine is p.grad is None or torch.equal(mine, p.grad)
    assert_agrees(d, expected, F64)
    return d


def together(d):
    """Whether the samples were not taken apart, with a note."""
    said = any("not taken apart" in note for note in d.notes)
    assert said == (d.population is None)
    return said


WAYS = ["decompose", "shared"]


def raises(error):
    def run(m, x):
        if len(x) < 6:
            raise error
        return m.a(torch.tanh(x))

    return run


ERRORS = {
    "assert": AssertionError("a batch of six"),
    "key": KeyError(5),
    "an error of its own": type("Odd", (Exception,), {})("no"),
    "recursion": RecursionError("deep"),
    "nothing to say": ZeroDivisionError(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ERRORS)
def test_whatever_a_part_of_the_batch_raises_is_in_a_note(name, way):
    d = measured(Runs(raises(ERRORS[name]), a=linear()), drawn(), drawn(), way)
    assert together(d)
    assert any(type(ERRORS[name]).__name__ in note for note in d.notes)
    with pytest.raises(ValueError, match=type(ERRORS[name]).__name__):
        lnp.decompose(Runs(raises(ERRORS[name]), a=linear()), (drawn(), drawn()), microbatch=3)


class Hidden(nn.Module):
    """A recurrent network whose first state, of the batch's size, is an input with the samples on its second axis."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True, dtype=F64), linear(2)

    def forward(self, x, h):
        return self.head(self.rnn(x, h)[0][:, -1])


@pytest.mark.parametrize("samples", [5, 18, 20])
def test_states_of_the_size_of_the_batch(samples):
    x = torch.randn(samples, 3, 3, dtype=F64), torch.zeros(1, samples, 4, dtype=F64)
    assert together(measured(Hidden(), x, torch.randn(samples, 2, dtype=F64)))


def test_a_network_that_runs_on_single_samples_and_on_whole_batches_alone():
    """Not on the few that are compared at other parameters, nor on a pilot."""

    def run(m, x):
        assert len(x) in (1, 24)
        return m.a(torch.tanh(x))

    model, x, y = Runs(run, a=linear()), drawn(24), drawn(24)
    assert not together(measured(model, x, y))


def test_a_part_that_fails_later():
    def run(m, x):
        assert m.whole is None or x.shape[0] == m.whole
        return m.a(torch.tanh(x))

    for way in WAYS:
        model, x, y = Runs(run, a=linear(), whole=None), drawn(), drawn()
        assert not together(measured(model, x, y, way))
        model.whole = 6
        for _ in range(2):
            d = measured(model, x, y, way)
            assert together(d)
            assert "AssertionError" in d.notes[0] or "interact" in d.notes[0]


def gates():
    """{name: (network, what opens the gate)}."""
    mean = lambda h: h.mean(0, keepdim=True)
    gate = lambda m, v: m.gate.data.fill_(v)
    threshold = Runs(
        lambda m, x: m.a(x) + F.relu(m.gate - 1) * mean(m.a(x)),
        a=linear(),
        gate=nn.Parameter(torch.zeros((), dtype=F64)),
    )
    both = Runs(
        lambda m, x: m.a(x) + F.relu(m.gate - 1) * F.relu(m.gate - 2) * mean(m.a(x)),
        a=linear(),
        gate=nn.Parameter(torch.zeros((), dtype=F64)),
    )
    counts = Runs(lambda m, x: m.a(x) + (mean(m.a(x)) if m.steps > 3 else 0), a=linear(), steps=0)
    held = Runs(lambda m, x: m.a(x) + m.mix["share"] * mean(m.a(x)), a=linear(), mix={"share": 0.0})
    inside = Runs(lambda m, x: m.b(m.a(x) - m.share * mean(m.a(x))), a=linear(), b=linear(), share=0.0)
    fixed = Runs(
        lambda m, x: m.a(x) + m.gate * mean(m.a(x)),
        a=linear(),
        gate=nn.Parameter(torch.zeros((), dtype=F64), requires_grad=False),
    )
    general = Runs(
        lambda m, x: torch.einsum("...i,oi->...o", x, m.a.weight) + m.share * mean(x),
        a=nn.Linear(4, 4, bias=False, dtype=F64),
        share=0.0,
    )
    return {
        "a threshold": (threshold, lambda m: gate(m, 1.5)),
        "a threshold that is hardly passed": (threshold, lambda m: gate(m, 1 + 1e-5)),
        "a threshold behind another": (both, lambda m: gate(m, 3.0)),
        "a counter": (counts, lambda m: setattr(m, "steps", 10)),
        "a number in a dictionary": (held, lambda m: m.mix.update(share=0.5)),
        "a small share": (inside, lambda m: setattr(m, "share", 1e-4)),
        "a frozen parameter": (fixed, lambda m: gate(m, 0.1)),
        "in a network of the general way": (general, lambda m: setattr(m, "share", 0.5)),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", gates())
def test_gates_that_open_later(name, way):
    """Seen at the very next measurement, and remembered."""
    model, open_gate = gates()[name]
    x, y = drawn(), drawn()
    assert not together(measured(model, x, y, way, population=True))
    open_gate(model)
    for _ in range(2):
        assert together(measured(model, x, y, way, population=True))
    with pytest.raises(ValueError, match="microbatch=2 was asked for, but"):
        lnp.decompose(model, (x, y), microbatch=2)


def test_a_gate_that_opens_and_lets_no_samples_meet():
    """Its gradient is zero at first, which would be right however the operation was read."""
    gate = nn.Parameter(torch.zeros((), dtype=F64))
    model, x, y = Runs(lambda m, x: m.a(x) * (1 + F.relu(m.gate - 1)), a=linear(), gate=gate), drawn(), drawn()
    assert not together(measured(model, x, y, population=True))
    with torch.no_grad():
        gate.fill_(1.5)
    assert not together(measured(model, x, y, population=True))


def test_one_sample_that_meets_another():
    """Of all that are there, and not only of those whose gradients are compared, here or at other parameters."""

    def run(m, x):
        near = ((x[:, None] - x[None]).square().sum(2) < 1e-6).double()
        return m.a((near @ x).tanh())

    model, x, y = Runs(run, a=linear()), drawn(20), drawn(20)
    assert not together(measured(model, x, y))
    x = x.clone()
    x[9] = x[1]
    assert {1, 9}.isdisjoint(core.compared_samples(20))
    assert together(measured(Runs(run, a=linear()), x, y))


def test_samples_that_meet_only_at_the_parameters_as_they_are():
    """Moved ones close the gate."""
    gated = lambda m, x: m.a(x) + torch.exp(-1e6 * m.gate**2) * m.a(x).mean(0)
    model = Runs(gated, a=linear(), gate=nn.Parameter(torch.zeros((), dtype=F64)))
    lin = lnp.load("torch").linearize(model, (drawn(), drawn()), lnp.Options())
    assert lin.sample_square_norms is None


def test_a_look_that_found_something_is_remembered(monkeypatch):
    looks = []
    monkeypatch.setattr(look.Look, "coupled", lambda self, own=look.Look.coupled: (looks.append(1), own(self))[1])
    model, open_gate = gates()["a number in a dictionary"]
    x, y = drawn(), drawn()
    lnp.decompose(model, (x, y))
    open_gate(model)
    lnp.decompose(model, (x, y))
    assert looks
    looks.clear()
    assert together(measured(model, x, y))
    assert not looks


@pytest.mark.parametrize("options", [{"microbatch": 2}, {"population": False}])
def test_micro_batches_and_pilots_are_looked_at(options, monkeypatch):
    """All their outputs, also where no sample is run alone. The mask is the batch's, which is therefore run whole."""
    run = lambda m, x: F.dropout(m.a(x)) * (2.0 if m.meets and x.shape[0] > 16 else 1.0)
    monkeypatch.setitem(record.WORTH, "cpu", -1)
    monkeypatch.setattr(look.Look, "square_norms", lambda *args: None)
    model, x, y = Runs(run, a=linear(), meets=False), drawn(32), drawn(32)
    options = {"rtol": 0.5, "estimator": "per_sample", **options}
    assert lnp.decompose(model, (x, y), **options).estimator == "per_sample"
    model.meets = True
    if "microbatch" in options:
        with pytest.raises(ValueError, match="not taken apart"):
            lnp.decompose(model, (x, y), **options)
    else:
        assert lnp.decompose(model, (x, y), **options).estimator == "joint"


def test_another_sample_is_looked_at_each_time(monkeypatch):
    ran, alone = [], look._alone
    monkeypatch.setattr(look, "_alone", lambda samples, sample, v: (ran.append(sample), alone(samples, sample, v))[1])
    model, x, y = linear(), drawn(8), drawn(8)
    before = torch.get_rng_state()
    for _ in range(30):
        lnp.decompose(model, (x, y))
    assert len(ran) == 30
    assert len(set(ran)) > 4
    assert torch.equal(before, torch.get_rng_state())


class Bends(torch.autograd.Function):
    """The identity, with another backward pass."""

    @staticmethod
    def forward(ctx, x, backward):
        ctx.backward = backward
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return ctx.backward(d), None


def hooked(x, backward):
    x = x.clone()
    x.register_hook(backward)
    return x


BENDS = {
    "clipped": lambda d: d.clamp(-0.1, 0.1),
    "normalised": lambda d: d / d.norm().clamp_min(1e-30),
    "constant added": lambda d: d + 1e-3,
    "each sample normalised": lambda d: F.normalize(d, dim=1),
}


@pytest.mark.parametrize("estimator", ["exact", "joint", "grouped"])
@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("name", BENDS)
def test_backward_passes_that_are_not_linear(name, hook, estimator):
    apply = hooked if hook else Bends.apply
    model = Runs(lambda m, x: m.b(apply(torch.tanh(m.a(x)), BENDS[name])), a=linear(), b=linear())
    with pytest.raises(ValueError, match="not linear"):
        lnp.decompose(model, (drawn(16), drawn(16)), estimator=estimator)
    coupled = Runs(lambda m, x: m.b(apply(m.a(x) + m.a(x).mean(0), BENDS[name])), a=linear(), b=linear())
    with pytest.raises(ValueError, match="not linear"):
        lnp.decompose(coupled, (drawn(16), drawn(16)), estimator=estimator)
    if not hook:
        with lnp_torch.shared(model) as step:
            loss = F.mse_loss(model(drawn(16)), y := drawn(16))
        with pytest.raises(ValueError, match="not linear"):
            step.backward(loss, y, nn.MSELoss(), estimator=estimator)


def test_a_clip_that_only_long_cotangents_reach():
    """No sign of a probe does: what the loss hands back may."""
    model = Runs(lambda m, x: Bends.apply(m.a(x), lambda d: d.clamp(-3, 3)), a=linear())
    with pytest.raises(ValueError, match="not linear"):
        lnp.decompose(model, (drawn(16), 100 * drawn(16)), lambda f, y: (f - y).square().sum(), estimator="exact")


@pytest.mark.parametrize("meets", [False, True])
def test_a_backward_pass_that_bends_later(meets):
    """A clip that nothing reaches at first."""
    run = lambda m, x: m.scale * Bends.apply(m.a(x) - (m.a(x).mean(0) if meets else 0), lambda d: d.clamp(-50, 50))
    model, x, y = Runs(run, a=linear(), scale=1.0), drawn(), drawn()
    assert together(measured(model, x, y)) == meets
    model.scale = 1e3
    with pytest.raises(ValueError, match="not linear"):
        lnp.decompose(model, (x, y))


@pytest.mark.parametrize("hook", [False, True])
def test_linear_backward_passes_of_ones_own(hook):
    """Other gradients than the function's, but J^T v of something: scaled, and reversed."""
    apply = hooked if hook else Bends.apply
    model = Runs(lambda m, x: m.b(apply(torch.tanh(m.a(x)), lambda d: -0.3 * d)), a=linear(), b=linear())
    assert not together(measured(model, drawn(), drawn()))


class Cancels(nn.Module):
    """The difference of two sums that are nearly the same, in which rounding is large beside what is left."""

    def __init__(self, share=0.0, dtype=torch.float32, apart=4e-5):
        super().__init__()
        self.a, self.b, self.share = nn.Linear(300, 8), nn.Linear(300, 8), share
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight * (1 + apart * torch.randn_like(self.a.weight)))
            self.b.bias.copy_(self.a.bias)
        self.to(dtype)

    def forward(self, x):
        f = self.a(x) - self.b(x)
        if f.sum().item() > 1e9:  # which single samples that are vectorized cannot ask: they would be rounded alike
            raise OverflowError
        return f + self.share * f.mean(0)


@pytest.mark.parametrize("apart", [4e-5, 6e-6, 3e-6])
def test_rounding_is_no_interaction(apart):
    """Of 0.1% to a tenth of the outputs."""
    x, y = torch.randn(40, 300), torch.randn(40, 8)
    plain, coupled = Cancels(apart=apart), Cancels(0.02, apart=apart)
    with torch.no_grad():
        alone = torch.cat([plain(row[None]) for row in x])
        rounding = (plain(x) - alone).abs().max() / alone.abs().max()
    assert rounding > coupling_tolerance(torch, torch.float32)
    assert lnp.load("torch").linearize(coupled, (x, y), lnp.Options()).sample_square_norms is None
    for _ in range(3):
        d = lnp.decompose(plain, (x, y))
        assert d.population is not None, d.notes
        assert lnp.decompose(coupled, (x, y)).estimator == "joint"


def test_rounding_is_looked_at_in_float64_now_and_then(monkeypatch):
    """Not at each measurement, which would cost more than the measurement; samples that meet later are found."""
    calls, wide = [], look.in_float64
    monkeypatch.setattr(look, "in_float64", lambda samples: (calls.append(1), wide(samples))[1])
    monkeypatch.setattr(look, "SAMPLES", np.random.default_rng(0))
    model, batch = Cancels(apart=6e-6), (torch.randn(40, 300), torch.randn(40, 8))
    for _ in range(40):
        assert lnp.decompose(model, batch).estimator != "joint"
    assert 1 < len(calls) < 15
    model.share = 0.003  # less than the rounding: seen when float64 is asked
    found = [lnp.decompose(model, batch).estimator == "joint" for _ in range(60)]
    assert found[-1]


def test_samples_that_meet_by_more_than_the_rounding_are_found_at_once():
    model, batch = Cancels(apart=4e-5), (torch.randn(40, 300), torch.randn(40, 8))
    for _ in range(3):
        assert lnp.decompose(model, batch).estimator != "joint"
    model.share = 0.05
    assert lnp.decompose(model, batch).estimator == "joint"


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1])
def test_rounding_in_a_network_that_does_not_run_in_float64(share):
    run = lambda m, x: m.inner(x) * torch.ones(8, 8).mm(torch.ones_like(x[:1, :8]).expand(8, 8)).mean() / 8
    model, batch = Runs(run, inner=Cancels(share)), (torch.randn(40, 300), torch.randn(40, 8))
    for _ in range(3):
        assert (lnp.decompose(model, batch).estimator == "joint") == bool(share)


class Buffered(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner, self.norm = linear(), norm
        self.register_buffer("order", torch.arange(4)[None])

    def forward(self, x):
        return self.norm(self.inner(x)).gather(1, self.order.expand(len(x), 4))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(4, dtype=F64), nn.BatchNorm1d(4, dtype=F64).eval()])
def test_samples_are_compared_at_the_first_measurement_alone(norm, way, monkeypatch):
    """Buffers are copied before the first pass of each measurement, which is no operation of the network."""
    calls, model, compare = [], Buffered(norm), core.compare
    monkeypatch.setattr(core, "compare", lambda operations: (calls.append(1), compare(operations))[1])
    counts = []
    for _ in range(3):
        x, y = drawn(), drawn()
        if way == "decompose":
            lnp.decompose(model, (x, y))
        else:
            with lnp_torch.shared(model) as step:
                loss = F.mse_loss(model(x), y)
            step.backward(loss, y, nn.MSELoss())
        counts.append(len(calls))
    assert 2 <= counts[0] == counts[-1]


def test_under_autocast_they_are_compared_at_the_first_measurement_alone(monkeypatch):
    """Whose cache would make the second pass of a measurement another sequence of operations than the first."""
    calls, compare = [], core.compare
    monkeypatch.setattr(core, "compare", lambda operations: (calls.append(1), compare(operations))[1])
    model, counts = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            lnp.decompose(model, (torch.randn(12, 6), torch.randn(12, 4)))
            assert torch.is_autocast_cache_enabled()
        counts.append(len(calls))
    assert 2 <= counts[0] == counts[-1]


class Loud(nn.Module):
    """What is left of two sums of the same numbers in different orders, times what a parameter of zero leaves alone."""

    def __init__(self, share=0.0):
        super().__init__()
        self.inner, self.gate, self.share = nn.Linear(300, 8, bias=False), nn.Parameter(torch.zeros(())), share

    def forward(self, x):
        f = self.inner(x)
        rounding = f - F.linear(x.flip(1), self.inner.weight.flip(1))
        if f.sum().item() > 1e9:  # see above
            raise OverflowError
        loud = (540 * self.gate.detach()).exp()
        return f + rounding * loud + self.share * (loud - 1) * f.mean(0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rounding_at_parameters_that_nobody_chose_is_no_interaction(share):
    """It is larger than what is left of the outputs there; float64 tells what samples that meet only there are."""
    x, y = torch.randn(40, 300), torch.randn(40, 8)
    model, there = Loud(share), Loud()
    there.load_state_dict(core.moved(look.xp, dict(model.state_dict())))
    with torch.no_grad():
        alone = torch.cat([there(row[None]) for row in x])
        assert (there(x) - alone).abs().max() / alone.abs().max() > 0.3
    assert (lnp.decompose(model, (x, y)).estimator == "joint") == bool(share)


def test_sequences_before_samples_are_not_mistaken_for_samples_by_chance():
    """Signs alone add up to small integers over few positions: those of others' positions may be the same."""
    for seed in range(12):
        torch.manual_seed(seed)
        norm = nn.LayerNorm(8).double()
        head = nn.Linear(8, 3, dtype=F64)
        model = Runs(lambda m, x: m.head(m.norm(x.movedim(1, 0))).movedim(0, 1).flatten(1), norm=norm, head=head)
        x, y = torch.randn(4, 8, 8, dtype=F64), torch.randn(4, 24, dtype=F64)
        assert not together(measured(model, x, y))


class StochasticDepth(nn.Module):
    """Residual blocks that are left out of single samples, beside a parameter of the general way."""

    def __init__(self, draw):
        super().__init__()
        self.a, self.b, self.head = linear(8), nn.Linear(8, 8, dtype=F64), nn.Linear(8, 3, dtype=F64)
        self.token, self.draw = nn.Parameter(torch.randn(1, 1, 8, dtype=F64)), draw

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), self.a(x).tanh()], 1)
        h = h + self.draw(h) * self.b(h + h.mean(1, keepdim=True)).tanh()
        return self.head(h[:, 0])


DRAWS = {
    "bernoulli_": lambda h: torch.empty(len(h), 1, 1, dtype=F64).bernoulli_(0.9) / 0.9,
    "rand": lambda h: (torch.rand(len(h), 1, 1, dtype=F64) < 0.9).double() / 0.9,
    "normal_": lambda h: h.new_empty(len(h), 1, 1).normal_(1.0, 0.2),
    "randint": lambda h: torch.randint(0, 2, (len(h), 1, 1)).double(),
    "for all at once": lambda h: torch.rand((), dtype=F64) + 0.5,
    "by NumPy": lambda h: torch.as_tensor(np.random.rand(len(h), 1, 1)),  # noqa: NPY002
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_at_first_decides_nothing(name):
    for first in range(4):
        torch.manual_seed(first)
        model, x, y = StochasticDepth(DRAWS[name]), torch.randn(6, 3, 4, dtype=F64), drawn(6, 3)
        for _ in range(3):
            state = np.random.get_state()  # noqa: NPY002
            with torch.random.fork_rng():
                out = model(x)
            np.random.set_state(state)  # noqa: NPY002
            d = lnp.decompose(model, (x, y), estimator="exact")
            assert_agrees(d, dense(model, out, F.mse_loss(out, y), y.numel()), F64)
            torch.rand(3)
            np.random.rand(1)  # noqa: NPY002


def capacity(m, x):
    """Experts that leave out what comes when they are full."""
    chosen, out = (m.route(x)[:, 0] > 0).long(), torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        rows = (chosen == number).nonzero()[:, 0][: m.capacity]
        out = out.index_add(0, rows, expert(x[rows]))
    return m.head(torch.tanh(x + out))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("full", [15, 12, 9])
def test_experts_that_fill_up(full, way):
    """One sample that is left out of twenty is enough, whichever it is."""
    parts = {"experts": nn.ModuleList([linear(), linear()]), "head": linear(3), "route": linear(1)}
    model, x, y = Runs(capacity, capacity=20, **parts), drawn(20), drawn(20, 3)
    assert not together(measured(model, x, y, way, population=True))
    model.capacity = full
    count = int((model.route(x)[:, 0] > 0).sum())
    assert together(measured(model, x, y, way, population=True)) == (max(count, 20 - count) > full)


@pytest.mark.parametrize("followed", [True, False])
def test_an_order_by_value(followed):
    """In the first batch it is that of the samples, as if none moved; later the rules for what follows read others,
    unless they follow it.
    """

    def run(m, x):
        order = x[:, 0, 0].argsort()
        sorted_rows = x[order] if followed else x[order].roll(0, dims=-1)
        return m.a(sorted_rows.tanh())[order.argsort()]

    model, x, y = Runs(run, a=linear()), torch.randn(8, 3, 4, dtype=F64), torch.randn(8, 3, 4, dtype=F64)
    x = x[x[:, 0, 0].argsort()]
    assert not together(measured(model, x, y, population=True))
    d = measured(model, x.flip(0), y, population=True)
    assert not together(d)
    assert any("on their own" in note for note in d.notes) is not followed


def test_padding_of_the_first_batch_decides_nothing():
    """Whether the loss is a mean over samples is asked of stand-ins, not of the batch that happens to come first."""
    words, labels = torch.randint(0, 11, (16, 7)), torch.randint(0, 11, (16, 7))
    padded = labels.clone()
    padded[::2, 3:] = -100
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).double()
    seen = []
    for order in ((labels, padded), (padded, labels)):
        loss = lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()) + 0 * len(seen)
        found = {id(y): lnp.decompose(model, (words, y), loss, estimator="exact") for y in order}
        seen.append([found[id(y)].population is not None for y in (labels, padded)])
    assert seen[0] == seen[1]
    assert seen[0][0]


def test_parameters_of_one_dotted_name():
    nested = {"enc": {"w": drawn(4).requires_grad_()}, "enc.w": drawn(4).requires_grad_()}
    apply = lambda p, x: torch.tanh(x @ p["enc"]["w"]) @ p["enc.w"]
    x, y = drawn(), drawn()
    d = lnp.decompose((apply, nested), (x, y), estimator="exact", by_layer=lambda name: name)
    out = apply(nested, x)
    grads = torch.autograd.grad(F.mse_loss(out, y), [nested["enc"]["w"], nested["enc.w"]])
    assert [layer.rate for layer in d.layers.values()] == pytest.approx([float(g.square().sum()) for g in grads])


def test_probes_of_the_whole_batch_go_on_after_a_trial():
    """Where single samples are dear: how many probes there were is then known on the device alone."""
    model = Runs(
        lambda m, x: m.head(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(8, 16, batch_first=True), head=nn.Linear(16, 40)
    )
    batch = torch.randn(64, 5, 8), torch.randint(40, (64,))
    exact = lnp.decompose(model, batch, estimator="exact").chi_net
    d = lnp.decompose(model, batch, population=False, rtol=0.02)
    assert d.estimator == "joint"
    assert d.probes > 8
    assert abs(d.chi_net - exact) < 4 * d.chi_net_stderr
