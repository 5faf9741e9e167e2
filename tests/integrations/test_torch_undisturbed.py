"""A run that lnp watches is bit by bit the run that it does not watch, whatever state models and losses keep."""

from __future__ import annotations

import gc
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lnp
from integrations import torch_state as states
from integrations.torch_state import LAYERS, LOSSES, WIDTH, identities, outside, reset, same

STEPS = 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
}


def built(layers, loss):
    reset()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    model = nn.Sequential(*(LAYERS[name]() for name in layers), nn.Linear(WIDTH, WIDTH))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, WIDTH, generator=generator)
    return model, (x, torch.randint(0, WIDTH, (12,), generator=generator)), LOSSES[loss]()


def observed(tracker, step, model, batch, loss, optimizer):
    tracker.observe(step, model, batch)
    value = loss(model(batch[0]), batch[1])
    value.backward()
    optimizer.step()
    return value


def taken(tracker, step, model, batch, loss, optimizer):
    with tracker.step(step, model, batch):
        value = loss(model(batch[0]), batch[1])
        value.backward()
        optimizer.step()
    return value


def shared(tracker, step, model, batch, loss, optimizer):
    with tracker.shared(step, model) as watched:
        value = loss(model(batch[0]), batch[1])
    watched.backward(value, batch[1], loss)
    optimizer.step()
    return value


def everything(tracker, step, model, batch, loss, optimizer):
    """All public functions, one after the other."""
    lnp.decompose(model, batch, loss, estimator="exact", by_layer=True)
    lnp.decompose(model, batch, loss, estimator="joint", batch_statistics="coupled", rtol=0.5)
    lnp.measured_loss_change(model, batch, loss, learning_rate=0.1)
    lnp.cross_response(model, batch, batch, loss, rtol=0.5)
    lnp.cross_response(model, batch, batch, loss, measured_loss=loss, rtol=0.5)
    lnp.gradient_gram(model, batch, loss, groups=2)
    lnp.spectrum(model, batch, loss, steps=2, probes=1)
    lnp.kernel(model, (batch[0][:3], batch[1][:3]), loss, progress=False)
    return observed(tracker, step, model, batch, loss, optimizer)


def plain(tracker, step, model, batch, loss, optimizer):
    value = loss(model(batch[0]), batch[1])
    value.backward()
    optimizer.step()
    return value


def trained(way, layers, loss="plain", optimizer="sgd", rows=True, prepare=lambda model: model):
    """All that is there after some steps."""
    model, batch, criterion = built(layers, loss)
    model = prepare(model)
    before, steps = identities(model), OPTIMIZERS[optimizer](list(model.parameters()))
    tracker = lnp.Tracker(schedule=1, rtol=0.5, **({} if way is shared else {"loss": criterion}))
    values = []
    for step in range(STEPS):
        steps.zero_grad()
        values.append(way(tracker, step, model, batch, criterion, steps).item())
    after = identities(model)
    assert {name: after[name] for name in before} == before
    assert way is plain or len(tracker.history) == (STEPS if rows else 0)
    return values, model, model.state_dict(), criterion, batch, outside(), steps.state_dict()


NAMES = ("losses", "model", "state_dict", "loss", "batch", "outside", "optimizer")


def assert_same(a, b):
    assert {name: same(x, y) for name, x, y in zip(NAMES, a, b, strict=True)} == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize("way", [observed, shared, taken])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_with_state(layer, way):
    assert_same(trained(way, [layer]), trained(plain, [layer]))


@pytest.mark.parametrize("way", [observed, shared, taken, everything])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_with_state(loss, way):
    assert_same(trained(way, ["Counter"], loss), trained(plain, ["Counter"], loss))


@pytest.mark.parametrize("layer", ["Containers", "LazyHooks", "BatchNorm", "Teacher", "Closure", "OfClass", "TwoNames"])
def test_all_public_functions(layer):
    assert_same(trained(everything, [layer]), trained(plain, [layer]))


@settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=4),
    loss=st.sampled_from(sorted(LOSSES)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    way=st.sampled_from([observed, shared, taken]),
)
def test_layers_and_losses_drawn(layers, loss, optimizer, way):
    assert_same(trained(way, layers, loss, optimizer), trained(plain, layers, loss, optimizer))


@pytest.mark.parametrize(
    ("layer", "loss"), [*((layer, "centred") for layer in LAYERS), *(("GlobalRandomness", loss) for loss in LOSSES)]
)
def test_every_pass_is_the_same_function(layer, loss):
    """The loss at unmoved parameters is the loss, bit by bit, however often it is asked for; and it is the model's."""
    model, (x, y), criterion = built([layer, "Counter"], loss)
    expected = criterion(model(x), y).item()
    model, batch, criterion = built([layer, "Counter"], loss)
    lin = lnp.load("torch").linearize(model, batch, lnp.Options(criterion))
    u = lin.vjp(lin.loss_gradient)
    assert lin.loss.item() == pytest.approx(expected, rel=1e-5)
    for _ in range(2):
        assert lin.loss_along(u, 0.0).item() == lin.loss.item()
    assert lin.loss_along(u, 1e-2).item() != lin.loss.item()


class Raises(nn.Module):
    """Fails in the middle, after it has written to everything."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.fails = loss, False

    def forward(self, outputs, targets):
        self.loss(outputs, targets)
        raise KeyError("on purpose")


@pytest.mark.parametrize("layer", ["Counter", "Containers", "LazyBuffer", "LazyHooks", "Closure", "Global", "OfClass"])
def test_a_measurement_that_fails(layer):
    """The run goes on, and is the run that it was."""

    def failing(tracker, step, model, batch, loss, optimizer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracker.observe(step, model, batch, options={"loss": Raises(loss)})
        return plain(tracker, step, model, batch, loss, optimizer)

    assert_same(trained(failing, [layer], "centred", rows=False), trained(plain, [layer], "centred"))


COMPILED = {
    "a block": lambda m: nn.Sequential(torch.compile(m[0], backend="aot_eager"), *m[1:]),
    "the model": lambda m: torch.compile(m, backend="aot_eager"),
    "in place": lambda m: (m[0].compile(backend="aot_eager"), m)[1],
    "forward": lambda m: (setattr(m[0], "forward", torch.compile(m[0].forward, backend="aot_eager")), m)[1],
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("way", [observed, shared])
def test_what_is_compiled(how, way):
    """Is run as it was written by a measurement of its own, and refused in a shared step, which then is a plain one."""

    def run(way, **options):
        torch._dynamo.reset()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = trained(way, ["Counter", "Twice"], prepare=COMPILED[how], **options)
        return found, [str(one.message) for one in told]

    watched, told = run(way, rows=way is observed)
    assert any("is compiled" in text for text in told) is (way is shared)
    expected, _ = run(plain)
    for a, b in zip(watched[1].parameters(), expected[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert watched[0] == expected[0]
    calls = lambda model: [module.calls for module in model.modules() if isinstance(module, states.Counter)]
    assert calls(watched[1]) == calls(expected[1]) == [STEPS]


class Function(nn.Module):
    """Calls something compiled that is no module."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(states.COMPILED(self.inner(x), self.inner[-1].weight))


@pytest.mark.parametrize("way", [observed, shared])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function(backend, way, monkeypatch):
    tied = lambda x, weight: F.dropout(F.linear(F.gelu(x), weight), 0.2, True)
    monkeypatch.setattr(states, "COMPILED", torch.compile(tied, backend=backend), raising=False)

    def run(way, **options):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trained(way, ["Twice"], prepare=Function, **options)

    watched, expected = run(way, rows=way is observed or backend == "eager"), run(plain)
    assert watched[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(watched[1].parameters(), expected[1].parameters(), strict=True))


HOOKS = {
    "parameter": lambda m, log: m[0].linear.weight.register_hook(lambda g: log.append(1)),
    "accumulated": lambda m, log: m[0].linear.weight.register_post_accumulate_grad_hook(lambda p: log.append(1)),
    "module": lambda m, log: m[0].register_full_backward_hook(lambda *args: log.append(1)),
    "activation": lambda m, log: m[0].register_forward_hook(
        lambda module, args, out: (out.requires_grad and out.register_hook(lambda g: log.append(1)), None)[1]
    ),
}


@pytest.mark.parametrize("way", [observed, shared, everything])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_backward_pass(kind, way):
    """Run as often as without lnp."""
    runs = []
    for chosen in (way, plain):
        log = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = way is not shared or kind == "accumulated"
            found = trained(chosen, ["Counter"], rows=rows, prepare=lambda m: (HOOKS[kind](m, log), m)[1])
        runs.append((found[0], log))
    assert runs[0] == runs[1]
    assert len(runs[0][1]) == STEPS


def test_bfloat16_dropout_in_a_shared_step():
    """Masks are looked at, not multiplied with."""
    ends = []
    for way in (shared, plain):
        found = trained(way, ["Dropout", "Twice"], prepare=lambda model: Narrow(model.bfloat16()))
        ends.append(found)
    assert_same(*ends)


def test_autocast_around_the_forward_pass_alone():
    """The step's own backward pass runs as its user runs it: what a function multiplies there is not cast."""

    def forward(model, batch, loss):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch[0])
        return loss(outputs.float(), batch[1])

    def narrow(tracker, step, model, batch, loss, optimizer):
        with tracker.shared(step, model) as watched:
            value = forward(model, batch, loss)
        watched.backward(value, batch[1], loss)
        optimizer.step()
        return value

    def alone(tracker, step, model, batch, loss, optimizer):
        value = forward(model, batch, loss)
        value.backward()
        optimizer.step()
        return value

    assert_same(trained(narrow, ["OwnBackward", "Twice"]), trained(alone, ["OwnBackward", "Twice"], rows=False))


class Narrow(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.bfloat16()).float()


def test_a_generator_is_refused():
    """What a pass would advance and nobody can turn back."""
    model = nn.Linear(4, 3)
    model.schedule = (step for step in range(9))
    next(model.schedule)
    with pytest.raises(ValueError, match="nobody can turn back"):
        lnp.decompose(model, (torch.randn(5, 4), torch.arange(5) % 3))
    assert next(model.schedule) == 1


def test_a_copy_is_let_go():
    """Activations and buffers of a measurement do not wait for the garbage collector."""
    model, batch, loss = built(["Activations", "Closure", "BatchNorm", "Containers"], "centred")
    tensors = lambda: sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    lnp.decompose(model, batch, loss)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        lnp.decompose(model, batch, loss)
        assert tensors() == before
    finally:
        gc.enable()
