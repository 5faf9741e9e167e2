"""What a model hides from the way it is measured: never a wrong number without a word."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import lnp
import lnp_torch
from integrations.torch_reference import VALUES, assert_agrees, dense
from integrations.torch_single_samples import Runs

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def linear(outputs=4):
    return nn.Linear(4, outputs, dtype=F64)


def drawn(samples=6):
    return torch.randn(samples, 4, dtype=F64)


def exact(model, x, y, call=None, **options):
    """Measured and compared with the dense Jacobian."""
    d = lnp.decompose(model, (x, y), estimator="exact", **options)
    with torch.random.fork_rng():
        out = (call or model)(x)
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), y.numel()), F64)
    return d


def mixed(m, x):
    h = m.a(x)
    return h + m.alpha * h.mean(0)


@pytest.mark.parametrize("kind", ["buffer", "frozen parameter", "counter"])
def test_a_gate_that_is_no_trained_parameter_opens_later(kind):
    """Noise on the trained parameters does not open it, so that its value belongs to what was compared."""
    model, x, y = Runs(mixed, a=linear()), drawn(), drawn()
    if kind == "frozen parameter":
        model.alpha = nn.Parameter(torch.zeros((), dtype=F64), requires_grad=False)
    else:
        model.register_buffer("alpha", torch.zeros((), dtype=torch.int64 if kind == "counter" else F64))
    assert exact(model, x, y).probes == 4
    with torch.no_grad():
        model.alpha.fill_(1)
    d = exact(model, x, y)
    assert (d.probes, d.population) == (24, None)
    assert any("interact" in note for note in d.notes)
    assert exact(model, x, y).notes == d.notes


@pytest.mark.parametrize("given", [(0, 1), (False, True), (0.0, 1e-3)])
def test_a_setting_among_the_inputs(given):
    model, x, y = Runs(lambda m, x, mix: m.a(x) + mix * m.a(x).mean(0), a=linear()), drawn(), drawn()
    for mix, probes in zip(given, (4, 24), strict=True):
        d = lnp.decompose(model, ({"x": x, "mix": mix}, y), estimator="exact")
        out = model(x, mix)
        assert_agrees(d, dense(model, out, F.mse_loss(out, y), 24), F64)
        assert d.probes == probes, d.notes


CAPTURED = {
    "a closure": lambda p: lambda m, x: m.a(torch.tanh(F.linear(x, p))),
    "a partial": lambda p: (lambda f: lambda m, x: m.a(torch.tanh(f(x))))(functools.partial(F.linear, weight=p)),
    "a list": lambda p: lambda m, x: m.a(x) @ torch.cat([p, p])[:4],
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", CAPTURED)
def test_parameters_that_are_held_elsewhere_too(kind, shared):
    """Modules are called on other tensors than their parameters: what a closure holds is one of these all the same."""
    layer = linear()
    model, x, y = Runs(CAPTURED[kind](layer.weight), a=layer), drawn(), drawn()
    if shared:
        with lnp_torch.shared(model) as step:
            loss = F.mse_loss(model(x), y)
        d = step.backward(loss, y, nn.MSELoss(), estimator="exact")
        out = model(x)
        assert_agrees(d, dense(model, out, F.mse_loss(out, y), 24), F64)
        return
    d = exact(model, x, y)
    assert d.probes == 4
    change = {"learning_rate": 1e-5}
    measured = lnp.measured_loss_change(model, (x, y), **change)
    assert measured == pytest.approx(lnp.predicted_loss_change(model, (x, y), **change), rel=1e-3)


@pytest.mark.parametrize("before", [False, True])
def test_weights_that_are_kept_from_pass_to_pass(before):
    """Inside `parametrize.cached()`, filled by the user's own forward pass or not."""
    model = nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear(3))
    x, y = drawn(), torch.randn(6, 3, dtype=F64)
    expected = lnp.decompose(model, (x, y), estimator="exact")
    with parametrize.cached():
        kept = model(x) if before else None
        found = lnp.decompose(model, (x, y), estimator="exact")
        assert found.to_dict() == expected.to_dict()
        if kept is not None:
            kept.sum().backward()  # what the user has computed is still there
            assert model[2].weight.grad is not None
        assert parametrize._cache_enabled
    assert exact(model, x, y).rate == found.rate


class Contrast(torch.autograd.Function):
    """Lets samples interact, where no mode sees it."""

    @staticmethod
    def forward(ctx, x):
        return x + x.mean(0)

    @staticmethod
    def backward(ctx, d):
        return d + d.mean(0)


def scripted(x: torch.Tensor):
    return x + x.mean(0)


CHANGES = {
    "a float": (lambda m, x: m.a(x) + m.how * m.a(x).mean(0), 0.0, 1e-2),
    "a shift": (lambda m, x: m.a(x) + torch.roll(m.a(x), m.how, 0), 0, 1),
    "an axis": (lambda m, x: m.a(x) - 0.5 * m.a(x).mean(m.how, keepdim=True), 1, 0),
    "a scripted function": (lambda m, x: m.scripted(m.a(x)) if m.how else m.a(x), False, True),
    "a function with a backward of its own": (lambda m, x: Contrast.apply(m.a(x)) if m.how else m.a(x), False, True),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which the test itself uses
@pytest.mark.parametrize("kind", CHANGES)
def test_the_same_operations_with_another_setting(kind):
    run, before, after = CHANGES[kind]
    model, x, y = Runs(run, a=linear(), scripted=torch.jit.script(scripted)), drawn(), drawn()
    for model.how in (before, after):
        d = exact(model, x, y)
    assert (d.probes, d.population) == (24, None)
    assert any("interact" in note for note in d.notes)


def test_an_order_that_is_drawn_anew():
    """Of two samples, half of the draws move none: the numbers are right whatever was drawn first."""
    model = Runs(lambda m, x: m.a(x) + m.b(x)[torch.randperm(len(x))], a=linear(), b=linear())
    x, y = drawn(2), drawn(2)
    for seed in range(8):
        torch.manual_seed(seed)
        exact(model, x, y)


def dispatched(m, x):
    """Experts see the positions that are routed to them: here as many of each, in one batch as many of each sample."""
    flat = x.flatten(0, 1)
    chosen, out = (flat[:, 0] > 0).long(), torch.zeros(len(flat), 3, dtype=F64)
    for index, expert in enumerate(m.experts):
        rows = (chosen == index).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(flat[rows]))
    return out.unflatten(0, x.shape[:2])


def test_rows_that_are_routed_otherwise():
    """In the first batch an expert's rows can be told apart by their number; in the second by their index alone."""
    model, y = Runs(dispatched, experts=nn.ModuleList([linear(3), linear(3)])), torch.randn(4, 4, 3, dtype=F64)
    even = torch.tensor([[1, -1, 1, -1]] * 4)
    uneven = torch.tensor([[1, 1, 1, -1], [1, -1, -1, -1], [1, -1, 1, -1], [-1, 1, 1, -1]])
    for signs in (even, uneven):
        x = torch.randn(4, 4, 4, dtype=F64)
        x[..., 0] = x[..., 0].abs() * signs
        exact(model, x, y)
        record = lnp.load("torch").linearize(model, (x, y), lnp.Options())
        assert not record.notes
        v, out = record.signs(0), model(x)
        found = sum(record.sample_square_norms(v).values())
        for sample in range(4):
            one = torch.zeros_like(out)
            one[sample] = v[sample].reshape(out.shape[1:])
            grads = torch.autograd.grad(out, list(model.parameters()), one, retain_graph=True)
            torch.testing.assert_close(found[sample], sum(grad.square().sum() for grad in grads))


def test_functions_of_the_network_that_are_differentiated_inside():
    inside = lambda m, x: torch.func.vmap(torch.func.grad(lambda row: torch.tanh(m.a(row)).sum()))(x)
    assert exact(Runs(inside, a=linear()), drawn(), drawn()).probes == 4


def test_tensors_of_inference_mode():
    model = linear()
    with torch.inference_mode():
        x, y = drawn(), drawn()
    assert lnp.decompose(model, (x, y)).rate == lnp.decompose(model, (x.clone(), y.clone())).rate


def test_terms_of_the_loss_that_do_not_come_from_the_outputs():
    model, x, y = Runs(lambda m, x: m.b(m.a(x)), a=linear(), b=linear()), drawn(), drawn()
    decayed = lambda out, y: F.mse_loss(out, y) + 0.1 * model.a.weight.square().sum()
    d = lnp.decompose(model, (x, y), decayed, loss_terms=24)
    assert any("do not come from the outputs" in note for note in d.notes)

    def own(m, x, labels):
        h = m.a(x)
        logits = m.b(h)
        return {"loss": F.mse_loss(logits, labels) + h.square().mean(), "logits": logits}

    d = lnp.decompose(Runs(own, a=linear(), b=linear()), {"x": x, "labels": y})
    assert any("do not come from the outputs" in note for note in d.notes)


def test_a_loss_of_the_model_itself_may_contrast_samples():
    """Only of known losses, Hugging Face's, it is said that they are means over samples."""

    def own(m, x, labels):
        logits = m.a(x)
        same = (labels[:, None] == labels).to(F64)
        return {"loss": F.mse_loss(logits @ logits.T, same), "logits": logits}

    d = lnp.decompose(Runs(own, a=linear()), {"x": drawn(), "labels": torch.arange(6) % 2})
    assert d.population is None
    assert any("mean over samples" in note for note in d.notes)


@pytest.mark.parametrize("outputs", [3, 4])
def test_error_bars_of_a_square_parameter_in_transposed_memory(outputs):
    """The products of single samples with the gradient, of which the population's standard errors are made."""
    model, x, y = nn.Sequential(linear(), nn.Tanh(), linear(outputs)), drawn(), torch.randn(6, outputs, dtype=F64)
    model[0].weight = nn.Parameter(torch.randn(4, 4, dtype=F64).T)
    lin = lnp.load("torch").linearize(model, (x, y), lnp.Options())
    yielded = lin.gradient_pass(True, 6, True)
    gradient, out, found = yielded.vector.values(), model(x), yielded.products
    assert yielded.index.tolist() == list(range(6))
    for sample in range(6):
        g = torch.zeros_like(out)
        g[sample] = lin.loss_gradient[sample] / yielded.magnitude
        grads = torch.autograd.grad(out, list(model.parameters()), g, retain_graph=True)
        expected = sum((a * b).sum() for a, b in zip(grads, gradient, strict=True))
        torch.testing.assert_close(found[sample], expected)


def test_an_input_that_is_as_long_as_the_pilot():
    """Which inputs run over the samples is seen on the whole batch, not on the few of them that are drawn."""
    run = lambda m, x, table: torch.einsum("ni,oi,si->no", x, m.a.weight, table) + m.a.bias
    model, x = Runs(run, a=linear(3)), drawn(96)
    batch = (x, drawn(12)), torch.randn(96, 3, dtype=F64)
    lin = lnp.load("torch").linearize(model, batch, lnp.Options(microbatch=32))
    some, v = lin.subset(12), lin.signs(0)
    whole = lin.sample_square_norms(v)
    for name, found in some.sample_square_norms(v[some.index]).items():
        torch.testing.assert_close(found, whole[name][some.index])


class Noisy(nn.Module):
    """A mask that is recorded, and a number that is not."""

    def __init__(self):
        super().__init__()
        self.a, self.mask = linear(), nn.Dropout(0.5)

    def forward(self, x):
        return self.mask(torch.tanh(self.a(x))) * (1 + 0.5 * torch.randn(4, dtype=F64))


def test_other_random_numbers_beside_dropout():
    """Masks are repeated from a record, which must not move what is drawn after them."""
    model, x, y = Noisy(), drawn(), drawn()
    assert exact(model, x, y).probes == 4  # one draw for all samples: they do not interact
    change = {"learning_rate": 1e-5}
    measured = lnp.measured_loss_change(model, (x, y), **change)
    assert measured == pytest.approx(lnp.predicted_loss_change(model, (x, y), **change), rel=1e-3)
    lin = lnp.load("torch").linearize(model, (x, y), lnp.Options())
    u = lin.vjp(lin.loss_gradient)
    torch.testing.assert_close((lin.jvp(u) * lin.loss_gradient).sum(), sum(lin.inner_products(u, u).values()))


GENERATORS = {
    "PyTorch": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(4, generator=g, dtype=F64)),
    "NumPy": (lambda: np.random.default_rng(1), lambda g: torch.from_numpy(g.random(4))),
    "Python": (lambda: random.Random(1), lambda g: g.random()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_the_model_are_untouched(kind):
    make, draw = GENERATORS[kind]
    model, x, y = Runs(lambda m, x: m.a(x) * draw(m.generator), a=linear()), drawn(), drawn()
    model.generator, other = make(), make()
    lnp.decompose(model, (x, y))
    change = {"learning_rate": 1e-5}
    measured = lnp.measured_loss_change(model, (x, y), **change)
    assert measured == pytest.approx(lnp.predicted_loss_change(model, (x, y), **change), rel=1e-3)
    assert torch.equal(torch.as_tensor(draw(model.generator)), torch.as_tensor(draw(other)))


class Reversible(torch.autograd.Function):
    """Computes its module again in the backward pass, which writes to the gradients, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, d):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.module(x).backward(d)
        return x.grad, None


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_that_a_function_writes_by_itself(shared):
    model, x, y = Runs(lambda m, x: Reversible.apply(m.a(x), m.b), a=linear(), b=linear()), drawn(), drawn()
    F.mse_loss(model(x), y).backward()
    before = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in before]
    if shared:
        with lnp_torch.shared(model) as step:
            loss = F.mse_loss(model(x), y)
        measure = lambda: step.backward(loss, y, nn.MSELoss())
    else:
        measure = lambda: lnp.decompose(model, (x, y))
    with pytest.raises(RuntimeError, match=r"wrote to the gradients of b\.weight, b\.bias"):
        measure()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, before, values))


OUTPUTS = {
    "one from the other": lambda m, x: (lambda h: (m.b(h), h))(torch.tanh(m.a(x))),
    "the same twice": lambda m, x: (lambda h: {"first": h, "again": h})(m.a(x)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_shared_step_of_several_outputs(kind):
    """dL/df holds each output's own derivative, not what reaches it by way of another one."""
    model, x, y = Runs(OUTPUTS[kind], a=linear(), b=linear()), drawn(), drawn()

    def loss(out, y):
        first, second = out.values() if isinstance(out, dict) else out
        return F.mse_loss(first, y) + 0.1 * second.square().mean() + 0.3 * (second.sin() * first).mean()

    loss.separable = True
    other = copy.deepcopy(model)
    options = {"estimator": "exact", "loss_terms": 24}
    expected = lnp.decompose(model, (x, y), loss, **options)
    with lnp_torch.shared(model) as step:
        value = loss(model(x), y)
    found = step.backward(value, y, loss, **options)
    for name in (*VALUES, "chi_net_stderr"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-10), name
    assert found.population == expected.population or found.population.rate == pytest.approx(
        expected.population.rate, rel=1e-9
    )
    loss(other(x), y).backward()
    grads = [(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(q is None if p is None else torch.equal(p, q) for p, q in grads)


def test_shared_step_with_an_output_that_needs_no_gradient():
    model, x, y = Runs(lambda m, x: (m.a(x), x), a=linear()), drawn(), drawn()
    with lnp_torch.shared(model) as step:
        first, second = model(x)
        loss = F.mse_loss(first * second, y)
    assert not second.requires_grad
    d = step.backward(loss, y, lambda out, y: F.mse_loss(out[0] * out[1], y), loss_terms=24)
    assert any("need no gradient" in note for note in d.notes)


def test_parameters_without_values():
    model = nn.Linear(4, 3, device="meta")
    for x in (torch.randn(6, 4), torch.randn(6, 4, device="meta")):
        with pytest.raises(ValueError, match="weight is on the meta device"):
            lnp.decompose(model, (x, torch.randn(6, 3)))


def test_what_no_comparison_could_show_shows_later():
    """A gate that noise does not open is closed at first. Once open, it is seen at the next measurement."""
    gated = lambda m, x: m.a(x) + F.relu(m.gate - 1) * m.a(x).mean(0)
    model = Runs(gated, a=linear(), gate=nn.Parameter(torch.zeros((), dtype=F64)))
    x, y = drawn(), drawn()
    assert exact(model, x, y).probes == 4
    with torch.no_grad():
        model.gate.fill_(2.0)
    for _ in range(2):
        d = exact(model, x, y)
        assert d.probes == 24
        assert any("interact" in note for note in d.notes)


def test_what_is_not_finite_shows_nothing():
    """A first batch with a nan compares nothing: the next one is compared anew."""
    model, x, y = Runs(lambda m, x: m.a(x) + m.a(x).mean(0), a=linear()), drawn(), drawn()
    wild = x.clone()
    wild[2, 1] = float("nan")
    assert "not finite" in lnp.decompose(model, (wild, y)).notes[-1]
    assert exact(model, x, y).probes == 24
    away = Runs(lambda m, x: (m.a(x) - m.a(x).mean(0)).abs().sqrt(), a=linear())  # of one sample: 0, of infinite slope
    assert exact(away, x, y).probes == 24
    plain = linear()
    lnp.decompose(plain, (wild, y))
    assert exact(plain, x, y).notes == ()
