"""Layers that keep state in every way that people's layers do, losses that do, and all that a run leaves behind."""

from __future__ import annotations

import collections
import functools
import itertools
import random
import types
import weakref

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

WIDTH = 6
COUNT, LOG = 0, []


class Layer(nn.Module):
    """A linear layer; what it keeps is up to `keep`, called with its output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.setup()

    def setup(self):
        """Make what is kept."""

    def forward(self, x):
        return self.keep(torch.tanh(self.linear(x)))

    def keep(self, h):
        return h


class Counter(Layer):
    """Warms up by the number of calls."""

    def setup(self):
        self.calls = 0

    def keep(self, h):
        self.calls += 1
        return h * (1 - 1 / (2 + self.calls))


class RunningTensor(Layer):
    def setup(self):
        self.mean = torch.zeros(WIDTH)

    def keep(self, h):
        centred = h - self.mean
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return centred


class InPlaceTensor(Layer):
    def setup(self):
        self.mean = torch.zeros(WIDTH)

    def keep(self, h):
        centred = h - self.mean.clone()
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return centred


class BehindData(Layer):
    """Writes that no version counter sees."""

    def setup(self):
        self.register_buffer("mean", torch.zeros(WIDTH))

    def keep(self, h):
        centred = h - self.mean.clone()
        self.mean.data.mul_(0.9).add_(0.1 * h.detach().mean(0))
        self.mean.numpy()[0] += 0.1
        return centred


class View(Layer):
    """A buffer, and a view of it."""

    def setup(self):
        self.register_buffer("mean", torch.zeros(2, WIDTH))
        self.first = self.mean[0]

    def keep(self, h):
        self.mean.add_(0.1 * h.detach().mean(0))
        return h - self.first.clone()


class Float(Layer):
    def setup(self):
        self.seen = 0.0

    def keep(self, h):
        self.seen = 0.9 * self.seen + 0.1 * float(h.detach().mean())
        return h - self.seen


class Containers(Layer):
    """Lists, dictionaries, sets, deques, arrays, objects, one inside the other."""

    def setup(self):
        self.log, self.cache, self.known = [], {"norms": [1.0]}, {0}
        self.recent, self.array = collections.deque([0.0], maxlen=3), np.zeros(2)
        self.state = types.SimpleNamespace(scale=1.0, inner={"n": [0]})

    def keep(self, h):
        self.log.append(float(h.detach().mean()))
        self.cache["norms"].append(float(h.detach().norm()))
        self.cache[len(self.cache)] = h.detach()
        self.known.add(len(self.known))
        self.recent.append(self.log[-1])
        self.array[0] += 1
        self.state.inner["n"][0] += 1
        self.state.scale = 1 + 0.1 * self.state.inner["n"][0]
        return h * self.state.scale + sum(self.recent) + 0.1 * float(self.array[0]) + 0.01 * len(self.log)


class Activations(Layer):
    """Keeps its activations, with their graph."""

    def setup(self):
        self.kept = []
        self.last = None

    def keep(self, h):
        self.last = h
        self.kept.append(h)
        del self.kept[:-1]
        return h


class LazyBuffer(Layer):
    def keep(self, h):
        if "scale" not in self._buffers:
            self.register_buffer("scale", 1 + h.detach().abs().mean(0))
        return h * self.scale


class LazyMember(Layer):
    """Makes a layer when it first runs; nobody trains it."""

    def keep(self, h):
        if not hasattr(self, "more"):
            self.more = nn.Linear(WIDTH, WIDTH)
        return h + self.more(h)


class LazyHooks(Layer):
    """Installs a hook when it first runs, and a flag beside it."""

    def keep(self, h):
        if not getattr(self, "installed", False):
            self.linear.register_forward_hook(lambda module, args, out: out * 1.5)
            self.linear.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
            self.installed = True
        return h


class OneShotHook(Layer):
    """A hook that takes itself away."""

    def setup(self):
        def once(module, args, out):
            self.handle.remove()
            return 2 * out

        self.handle = self.linear.register_forward_hook(once)


class Closure(Layer):
    def setup(self):
        calls, scales = 0, [1.0]

        def scaled(h):
            nonlocal calls
            calls += 1
            scales.append(1 + 0.1 * calls)
            scaled.last = calls
            return self.extra(h) * scales[-1]

        self.extra = nn.Linear(WIDTH, WIDTH)
        self.scaled = scaled
        self.partial = functools.partial(lambda factor, h: factor * scaled(h), 0.5)
        self.bound, self.calls = self.extra.forward, []
        self.note = self.calls.append

    def keep(self, h):
        self.note(len(self.calls))
        return self.scaled(h) + self.partial(h) + self.bound(h) + len(self.calls)


class Default(Layer):
    """State in the default of an argument."""

    def setup(self):
        def scaled(h, calls=[0]):  # noqa: B006
            calls[0] += 1
            return h * (1 + 0.1 * calls[0])

        self.scaled = scaled

    def keep(self, h):
        return self.scaled(h)


class Global(Layer):
    def keep(self, h):
        global COUNT
        COUNT += 1
        LOG.append(COUNT)
        return h * (1 + 0.1 * COUNT + 0.01 * len(LOG))


class OfClass(Layer):
    calls, log = 0, []

    def keep(self, h):
        OfClass.calls += 1
        self.log.append(self.calls)
        return h * (1 + 0.1 * self.calls + 0.01 * len(self.log))


class Iterated(Layer):
    def setup(self):
        self.steps = itertools.count(1)

    def keep(self, h):
        return h * (1 + 0.1 * next(self.steps))


class Replaced(Layer):
    """`forward` is wrapped on the instance, as mixed precision does."""

    def setup(self):
        original, self.calls = self.linear.forward, 0

        def wrapped(module, x):
            self.calls += 1
            return original(x) * (1 + 0.1 * self.calls)

        self.linear.forward = types.MethodType(wrapped, self.linear)


class Weak(Layer):
    """A reference to a layer that is another's."""

    def setup(self):
        self.other = weakref.ref(self.linear)

    def keep(self, h):
        self.other().calls = getattr(self.other(), "calls", 0) + 1
        return h + self.other()(h) * self.other().calls


class Generators(Layer):
    def setup(self):
        self.torch = torch.Generator()
        self.torch.manual_seed(1)
        self.numpy, self.python = np.random.default_rng(2), random.Random(3)

    def keep(self, h):
        noise = torch.rand(h.shape, generator=self.torch)
        return h * noise + float(self.numpy.random()) + self.python.random()


class GlobalRandomness(Layer):
    def keep(self, h):
        drawn = float(np.random.rand()) + random.random()  # noqa: NPY002
        return h * drawn + torch.randn_like(h) * torch.empty(len(h), 1).bernoulli_(0.5)


class Teacher(Layer):
    """Follows another layer with momentum, in its forward pass."""

    def setup(self):
        self.slow = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def keep(self, h):
        for slow, fast in zip(self.slow.parameters(), self.linear.parameters(), strict=True):
            slow.data.mul_(0.9).add_(0.1 * fast.data)
        return h + self.slow(h)


class Shrunk(Layer):
    """An embedding whose rows are shrunk when they are looked up."""

    def setup(self):
        self.table = nn.Embedding(4, WIDTH, max_norm=0.5)

    def keep(self, h):
        return h + self.table((h[:, 0] > 0).long())


class TwoNames(Layer):
    def setup(self):
        self.inner = nn.Module()
        self.inner.same = self.linear
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.linear.weight

    def keep(self, h):
        return self.tied(h) + self.inner.same(h)


class Recurrent(Layer):
    """Goes on with the state of the last call."""

    def setup(self):
        self.cell, self.state = nn.LSTM(WIDTH, WIDTH, batch_first=True), None

    def keep(self, h):
        out, (a, b) = self.cell(h[:, None], self.state)
        self.state = a.detach(), b.detach()
        return out[:, 0]


class Checkpointed(Layer):
    def keep(self, h):
        return checkpoint(lambda h: F.dropout(self.linear(h), 0.3), h, use_reentrant=False)


class CheckpointedState(Layer):
    """What is computed again in the backward pass counts again, as it does without lnp."""

    def setup(self):
        self.norm, self.calls = nn.BatchNorm1d(WIDTH), []

    def keep(self, h):
        return checkpoint(self.again, h, use_reentrant=False)

    def again(self, h):
        self.calls.append(len(self.calls))
        return self.norm(self.linear(h))


class Backward(torch.autograd.Function):
    """Draws, counts and multiplies in its backward pass, which is linear."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        ctx.layer.calls.append(float(torch.rand(())))
        return d + torch.mm(d, torch.full((d.shape[1], d.shape[1]), 0.3, dtype=d.dtype)), None


class OwnBackward(Layer):
    def setup(self):
        self.calls = []

    def keep(self, h):
        return Backward.apply(h, self)


class Capacity(Layer):
    """Experts that drop what is too much: samples meet there."""

    def setup(self):
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.dropped = []

    def keep(self, h):
        out, chosen = torch.zeros_like(h), (h[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            self.dropped.append(len(rows[5:]))
            out = out.index_add(0, rows[:5], expert(h[rows[:5]]))
        return h + out


class Spectral(Layer):
    def setup(self):
        self.old = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def keep(self, h):
        return self.old(h) + self.new(h)


class Twice(Layer):
    """One call in another, with an argument changed in place."""

    def keep(self, h):
        h = (h + 0.5).mul_(2)
        return self.linear(F.relu(h, inplace=True))


LAYERS = {
    kind.__name__: kind
    for kind in (
        *(Counter, RunningTensor, InPlaceTensor, BehindData, View, Float, Containers, Activations, LazyBuffer),
        *(LazyMember, LazyHooks, OneShotHook, Closure, Default, Global, OfClass, Iterated, Replaced, Weak, Generators),
        *(
            GlobalRandomness,
            Teacher,
            Shrunk,
            TwoNames,
            Recurrent,
            Checkpointed,
            CheckpointedState,
            OwnBackward,
            Capacity,
            Spectral,
            Twice,
        ),
    )
} | {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "Dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)),
    "AlphaDropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.AlphaDropout(0.4)),
    "Attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.2),
}


class Centred(nn.Module):
    """Keeps a running mean of the outputs, and counts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.calls, self.log = 0, []

    def forward(self, outputs, targets):
        self.calls += 1
        self.log.append(self.calls)
        loss = F.cross_entropy(outputs - self.centre, targets) * (1 + 0.1 * self.calls)
        with torch.no_grad():
            self.centre.mul_(0.9).add_(0.1 * outputs.detach().mean(0))
        return loss


class Noisy(nn.Module):
    """Draws; changes its targets in place."""

    def forward(self, outputs, targets):
        targets[targets == 0] = 1
        noise = torch.randn_like(outputs) + random.random()
        return F.cross_entropy(outputs + noise, targets)


class Proxies(nn.Module):
    """Has parameters of its own, that nobody trains here."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, outputs, targets):
        return F.cross_entropy(F.normalize(outputs, dim=1) @ self.weight, targets)


LOSSES = {"plain": nn.CrossEntropyLoss, "centred": Centred, "noisy": Noisy, "proxies": Proxies}


def reset():
    """Globals and classes as they are in the beginning."""
    global COUNT
    COUNT, OfClass.calls = 0, 0
    LOG.clear()
    OfClass.log.clear()


def outside():
    """What a run leaves outside of its model: globals, classes, random states."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    return COUNT, list(LOG), OfClass.calls, list(OfClass.log), states


def identities(model):
    """The objects under every name."""
    kinds = model.named_parameters, model.named_buffers, model.named_modules
    return {(kind.__name__, name): id(value) for kind in kinds for name, value in kind(remove_duplicate=False)}


def same(a, b, seen=None):
    """Whether two objects hold the same values, bit by bit, in attributes and containers of any depth."""
    seen = {} if seen is None else seen
    if (id(a), id(b)) in seen:
        return True
    seen[id(a), id(b)] = a, b  # which keeps them: another object must not come to have the same id
    if type(a).__qualname__ != type(b).__qualname__:  # parametrized layers have a class of their own each
        return False
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad
        return equal and torch.equal(a, b) and same(a.grad if a.is_leaf else None, b.grad if b.is_leaf else None, seen)
    if isinstance(a, RemovableHandle):
        return True  # a number
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, random.Random | np.random.Generator | itertools.count):
        return repr(_state(a)) == repr(_state(b))
    if isinstance(a, dict):
        named = lambda d: [key for key in d if not isinstance(key, int)]  # hooks have numbers that the process counts
        return len(a) == len(b) and named(a) == named(b) and same(list(a.values()), list(b.values()), seen)
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(functools.partial(same, seen=seen), a, b))
    if isinstance(a, types.FunctionType):
        return a.__code__ is b.__code__ and same(_held(a), _held(b), seen)
    if isinstance(a, types.MethodType):
        return same(a.__self__, b.__self__, seen) and same(a.__func__, b.__func__, seen)
    if isinstance(a, types.BuiltinMethodType):
        return a.__name__ == b.__name__ and same(a.__self__, b.__self__, seen)
    if isinstance(a, functools.partial):
        return same([a.func, a.args, a.keywords], [b.func, b.args, b.keywords], seen)
    if isinstance(a, types.CellType):
        return same(a.cell_contents, b.cell_contents, seen)
    if isinstance(a, weakref.ref):
        return same(a(), b(), seen)
    return same(vars(a), vars(b), seen) if hasattr(a, "__dict__") else a == b


def _held(function):
    return list(function.__closure__ or ()), function.__defaults__, function.__dict__


def _state(x):
    if isinstance(x, random.Random):
        return x.getstate()
    return x if isinstance(x, itertools.count) else x.bit_generator.state
