"""What a copy of a model takes with it and what it shares; threads, interruptions, objects of all kinds."""

from __future__ import annotations

import random
import signal
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils import checkpoint

import lnp
import lnp_torch
from integrations.test_torch_undisturbed import built
from integrations.torch_state import identities, outside, same
from lnp_torch import state_guard


def batch():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.arange(6) % 3


def rate(model, x, y, loss=F.cross_entropy):
    value = loss(model(x), y)
    grads = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    return sum(float(g.double().square().sum()) for g in grads)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return {"first": y, "again": y}


def of_both(outputs, targets):
    a, b = outputs.values()
    return F.mse_loss(a, targets) + 0.1 * b.square().mean() + 0.3 * (b.sin() * a).mean()


def test_a_tensor_that_is_returned_twice_keeps_its_rounding():
    for seed in range(30):
        torch.manual_seed(seed)
        model, x, y = Twice(), torch.randn(8, 4), torch.randn(8, 3)
        expected = torch.autograd.grad(of_both(model(x), y), list(model.parameters()))
        with lnp_torch.shared(model) as step:
            loss = of_both(model(x), y)
        step.backward(loss, y, of_both)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_a_tensor_that_is_returned_twice_needs_the_criterion():
    model, (x, y) = Twice(), (torch.randn(8, 4), torch.randn(8, 3))
    for given in ({"loss_terms": 24}, {"targets": y, "criterion": lambda o, t: 2 * of_both(o, t)}):
        with lnp_torch.shared(model) as step:
            loss = of_both(model(x), y)
        with pytest.raises(RuntimeError, match="returns one tensor twice"):
            step.backward(loss, **given)
        assert not step.stepped
        assert all(p.grad is None for p in model.parameters())


class Bag:
    """Inputs of the user's own class, as graphs come."""

    def __init__(self, x):
        self.x, self.calls = x, 0


class OnBags(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, bag):
        bag.calls += 1
        bag.x = torch.tanh(self.first(bag.x)) * bag.calls
        return self.head(bag.x)


def test_inputs_of_a_class_of_the_users():
    model, (x, y) = OnBags(), batch()
    bag = Bag(x)
    d = lnp.decompose(model, (bag, y))
    assert bag.x is x
    assert bag.calls == 0
    assert d.rate == pytest.approx(rate(model, Bag(x), y), rel=1e-5)
    predicted = lnp.predicted_loss_change(model, (bag, y), learning_rate=1e-3)
    assert lnp.measured_loss_change(model, (bag, y), learning_rate=1e-3) == pytest.approx(predicted, rel=2e-2)


def test_targets_that_the_loss_writes_to():
    model, (x, y) = nn.Linear(4, 3), batch()
    before = y.clone()

    def loss(outputs, targets):
        targets[targets == 0] = 1
        return F.cross_entropy(outputs, targets)

    lnp.decompose(model, (x, y), loss)
    assert torch.equal(y, before)


def test_rows_that_shrink_when_they_are_looked_up():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.1), nn.Flatten(), nn.Linear(8, 3))
    before = model[0].weight.detach().clone()
    lnp.decompose(model, (torch.randint(0, 7, (6, 2)), torch.arange(6) % 3))
    assert torch.equal(model[0].weight, before)
    assert (before.norm(dim=1) > 0.1).all()


def test_parameters_of_a_function_that_are_sharded_are_refused():
    """However deep they lie: DeepSpeed leaves empty tensors with a number in their places."""
    weight, (x, y) = torch.randn(4, 3), batch()
    weight.ds_id = 0
    model = (lambda p, x: x @ p["layers"][0]["weight"], {"layers": [{"weight": weight}]})
    with pytest.raises(ValueError, match="sharded over processes"):
        lnp.decompose(model, (x, y))
    assert "ZeRO stage 3" in lnp_torch.refusal(model)


class Resource:
    """Something that is opened and closed."""

    def __init__(self):
        self.number = 1

    def __del__(self):
        raise AssertionError("a copy was closed")


class Holder(nn.Module):
    """Weak proxies, parameters that nobody registers, a resource, an end of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), 0
        self.first.up = weakref.proxy(self)
        self.hidden = [nn.Parameter(torch.ones(4))]
        self.resource = Resource()

    def __del__(self):
        raise AssertionError("a copy of a module came to its end")

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.first.up.calls += self.resource.number
        self.hidden[0].data.mul_(1.5)
        return self.head(x * self.hidden[0])


def test_what_cannot_be_copied_is_shared_or_redirected():
    model, (x, y) = Holder(), batch()
    try:
        d = lnp.decompose(model, (x, y))
        assert model.calls == 0
        assert torch.equal(model.hidden[0], torch.ones(4))
        assert model.hidden[0].grad is None
        assert d.rate == pytest.approx(rate(model, x, y), rel=1e-5)
        assert model.calls == 1
    finally:
        for kind in (Holder, Resource):
            del kind.__del__


def test_parametrized_weights_that_are_cached():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)), batch()
    expected = lnp.decompose(model, (x, y), estimator="exact")
    with parametrize.cached():
        model(x)
        cached = dict(parametrize._cache)
        assert lnp.decompose(model, (x, y), estimator="exact") == expected
        assert same(list(cached), list(parametrize._cache))
        assert all(parametrize._cache[key] is value for key, value in cached.items())


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads(shared):
    """On different models and on the same: right numbers, and nothing is left."""
    runs = [built(["Containers", "Checkpointed", "BatchNorm"], "centred") for _ in range(2)]
    (model, x_y, loss), (other, o_y, other_loss) = runs[0], runs[0] if shared else runs[1]
    expected = lnp.decompose(model, x_y, loss, estimator="exact")
    before, random_before = identities(model), torch.get_rng_state()
    originals = checkpoint.CheckpointFunction, vars(checkpoint).copy()
    found, start = [], threading.Barrier(2)

    def work(model, batch, loss):
        start.wait()
        found.extend(lnp.decompose(model, batch, loss, estimator="exact") for _ in range(4))

    threads = [threading.Thread(target=work, args=args) for args in ((model, x_y, loss), (other, o_y, other_loss))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(d.chi_net == pytest.approx(expected.chi_net, rel=1e-5) for d in found)
    assert identities(model) == before
    assert torch.equal(torch.get_rng_state(), random_before)
    assert (checkpoint.CheckpointFunction, vars(checkpoint)) == originals


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it comes inside of a weak reference
def test_interruptions():
    """Ctrl-C at any moment."""
    layers = ["Containers", "BatchNorm", "Checkpointed", "Closure", "OfClass", "Global"]
    (model, x_y, loss), (untouched, _, its_loss) = built(layers, "centred"), built(layers, "centred")
    lnp.decompose(model, x_y, loss, estimator="exact")
    started = time.perf_counter()
    lnp.decompose(model, x_y, loss, estimator="exact")
    longest, moments, interrupted = time.perf_counter() - started, random.Random(0), 0

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(40):
            left = outside()
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.05, 0.8) * longest)
                lnp.decompose(model, x_y, loss, estimator="exact")
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert same(model, untouched)
            assert same(loss, its_loss)
            assert same(left, outside())
            assert torch.is_grad_enabled()
            assert not torch.overrides._get_current_function_mode_stack()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert interrupted


class Slotted:
    """An object without attributes of its own but slots, as a configuration has."""

    __slots__ = ("calls", "scale", "unset")

    def __init__(self):
        self.scale, self.calls = torch.tensor(2.0), Zero()


class Number:
    """As numbers of SymPy are."""

    __slots__ = ("p",)


class Zero(Number):
    """Nobody can write what it holds."""

    __slots__ = ()
    p = 0


def test_an_object_with_slots_is_copied_and_let_go_of():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.settings = nn.Linear(4, 3), Slotted()

        def forward(self, x):
            self.settings.calls = self.settings.calls.p + 1
            return self.settings.scale * self.layer(x)

    model, batch = Net(), (torch.randn(5, 4), torch.arange(5) % 3)
    scale, calls = model.settings.scale, model.settings.calls
    assert lnp.decompose(model, batch).rate > 0
    assert (model.settings.calls, model.settings.scale) == (calls, scale)
    assert not hasattr(model.settings, "unset")


class LooksUp:
    """Attributes are found by others, which a copy that is let go of no longer has."""

    def __init__(self, scale):
        self.table = {"scale": scale}

    def __getattribute__(self, name):
        table = object.__getattribute__(self, "__dict__")["table"]
        return table[name] if name in table else object.__getattribute__(self, name)


class Delegates:
    def __init__(self, scale):
        self.inner = LooksUp(scale)

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


class Guarded(LooksUp):
    """Raises an error of its own where it is used without what it needs."""

    def __getattribute__(self, name):
        if "table" not in object.__getattribute__(self, "__dict__"):
            raise RuntimeError("used after it was closed")
        return super().__getattribute__(name)


@pytest.mark.parametrize("kind", [LooksUp, Delegates, Guarded])
def test_objects_that_look_attributes_up_themselves(kind):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.settings = nn.Linear(4, 3), kind(2.0)

        def forward(self, x):
            return self.settings.scale * self.layer(x)

    x, y = batch()
    model = Scaled()
    expected = rate(model, x, y)
    held = object.__getattribute__(model.settings, "__dict__")
    before = repr({key: vars(value) if kind is Delegates else value for key, value in held.items()})
    assert lnp.decompose(model, (x, y)).rate == pytest.approx(expected, rel=1e-5)
    assert before == repr({key: vars(value) if kind is Delegates else value for key, value in held.items()})


def test_an_interruption_before_anything_is_put_back(monkeypatch):
    """Or after the first thing: everything is put back."""
    original, calls = state_guard.finished, []

    def interrupted(*restores):
        calls.append(len(restores))
        if len(calls) == 1:
            raise KeyboardInterrupt
        original(*restores)

    monkeypatch.setattr(state_guard, "finished", interrupted)
    before = outside()
    with pytest.raises(KeyboardInterrupt), state_guard.undisturbed([torch.device("cpu")]):
        torch.rand(3)
    assert same(before, outside())
    assert torch.is_autocast_cache_enabled()


def test_an_interruption_between_two_things_that_are_put_back():
    done = []

    def first():
        done.append("first")
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state_guard.finished(first, lambda: done.append("second"))
    assert done == ["first", "first", "second"]
