"""What Python objects hold is put back, also where threads meet."""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import threading
import types

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.state.places import LARGEST, NOTHING, PARTS, empty_like, is_user_module, places, references
from lnp.state.preserve import preserve_state, reachable_objects

COUNT = 0


class Slotted:
    __slots__ = ("first", "second")

    def __init__(self):
        self.first = 1


class Refusing(list):
    """A container whose own methods may not be called."""

    def __setitem__(self, key, value):
        raise AssertionError("written through the user's own method")


class Shared:
    counts = 0

    @staticmethod
    def count():
        Shared.counts += 1
        Shared.made = True


def counting():
    global COUNT
    COUNT += 1


def closure():
    """A function that writes to a variable of its own."""
    value = [0]

    def write():
        nonlocal value
        value = [value[0] + 1]
        return value[0]

    return write


def written(holder):
    """{what: (a root, how it is written to, how it is read)}"""
    return {
        "a list": (x := [1, 2], lambda: x.append(3), lambda: list(x)),
        "a list of its own kind": (r := Refusing([1]), lambda: r.append(2), lambda: list(r)),
        "a dictionary's order": (d := {"a": 1, "b": 2}, lambda: d.update(a=d.pop("a")), lambda: list(d.items())),
        "an ordered one": (
            o := collections.OrderedDict(a=1, b=2), lambda: o.move_to_end("a"), lambda: list(o.items())
        ),
        "a set": (s := {1, 2}, lambda: s.add(3), lambda: sorted(s)),
        "a deque": (q := collections.deque([1, 2], 2), lambda: q.append(3), lambda: (list(q), q.maxlen)),
        "bytes": (b := bytearray(b"ab"), lambda: b.extend(b"c"), lambda: bytes(b)),
        "an array": (a := np.arange(3.0), lambda: a.__setitem__(0, 5.0), lambda: a.tolist()),
        "an array's bits": (n := np.array([np.nan]), lambda: n.__setitem__(0, 1.0), lambda: n.tobytes()),
        "an array's shape": (f := np.zeros((2, 3)), lambda: f.resize((3, 2)), lambda: f.shape),
        "an array's size": (i := np.zeros(2), lambda: i.resize(3, refcheck=False), lambda: i.tolist()),
        "an array of the largest size": (
            j := np.zeros(LARGEST // 8), lambda: j.__setitem__(0, 1.0), lambda: j[0].item()
        ),
        "attributes": (h := holder, lambda: setattr(h, "more", 1), lambda: dict(vars(h))),
        "a namespace": (k := types.SimpleNamespace(a=1), lambda: setattr(k, "a", 2), lambda: vars(k).copy()),
        "slots": (t := Slotted(), lambda: setattr(t, "first", 2), lambda: t.first),
        "an empty slot": (e := Slotted(), lambda: setattr(e, "second", 2), lambda: hasattr(e, "second")),
        "a generator": (g := np.random.default_rng(0), lambda: g.random(), lambda: repr(g.bit_generator.state)),
        "Python's generator": (p := random.Random(0), lambda: p.random(), lambda: p.getstate()),
        "NumPy's old one": (u := np.random.RandomState(0), lambda: u.rand(), lambda: repr(u.get_state())),
        "a partial's argument": (functools.partial(print, y := [0]), lambda: y.append(1), lambda: list(y)),
        "a method's object": ((m := [0]).append, lambda: m.append(1), lambda: list(m)),
        "a default": (lambda z=(v := [0]): z, lambda: v.append(1), lambda: list(v)),
        "in a tuple": (((w := [0]),), lambda: w.append(1), lambda: list(w)),
    }  # fmt: skip


@pytest.mark.parametrize("what", written(Shared()))
def test_what_is_written_to_is_put_back(what):
    root, write, read = written(Shared())[what]
    before = read()
    with preserve_state(root):
        write()
        assert read() != before
    assert read() == before


def test_what_functions_and_classes_hold_is_put_back():
    write = closure()
    with preserve_state(write, counting, Shared()):
        write()
        counting()
        Shared.count()
        counting.calls = 1
    assert write() == 1
    assert COUNT == 0
    assert vars(Shared).keys() & {"counts", "made"} == {"counts"}
    assert Shared.counts == 0
    assert not hasattr(counting, "calls")


def test_a_name_without_a_value_has_none_afterwards():
    def write():
        global LATER
        LATER = 1

    with preserve_state(write):
        write()
        assert LATER == 1
    assert "LATER" not in globals()


def test_a_variable_without_a_value_has_none_afterwards():
    cell = types.CellType()
    with preserve_state(cell):
        cell.cell_contents = 1
    with pytest.raises(ValueError, match="empty"):
        _ = cell.cell_contents


def test_global_generators_are_put_back_also_after_an_error():
    before = random.getstate(), repr(np.random.get_state())  # noqa: NPY002

    def draw():
        with preserve_state():
            raise RuntimeError(random.random() + np.random.rand())  # noqa: NPY002

    with pytest.raises(RuntimeError):
        draw()
    assert (random.getstate(), repr(np.random.get_state())) == before  # noqa: NPY002


class Loader:
    """Batches that are drawn with a framework's own generator."""

    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        for _ in range(3):
            x = self.generator.random((4, 2))
            yield x, x


def test_the_random_state_of_the_model_s_framework_is_not_used_up_by_a_loader(monkeypatch):
    framework = np.random.default_rng(0)

    @contextlib.contextmanager
    def untouched():
        state = framework.bit_generator.state
        yield
        framework.bit_generator.state = state

    monkeypatch.setattr(lnp_numpy, "untouched", untouched, raising=False)
    before = framework.bit_generator.state
    lnp.decompose(lnp_numpy.LinearModel(np.zeros((2, 2))), Loader(framework), batches=2)
    assert framework.bit_generator.state == before


def test_what_is_large_or_cannot_be_written_to_is_no_place():
    large, fixed = np.zeros(LARGEST // 8 + 1), np.zeros(2)
    fixed.flags.writeable = False
    for array in (large, fixed):
        assert next(part.take(array) for part in places(array)) == []
    with preserve_state(large):
        large[0] = 1
    assert large[0] == 1


@pytest.mark.parametrize("before", [True, False])
def test_an_array_that_may_be_written_to_only_before_or_only_after_is_left_as_it_is(before):
    array = np.zeros(2)
    array.flags.writeable = before
    with preserve_state(array):
        array.flags.writeable = not before
    assert array.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "holder",
    [[1], {"a": 1}, {1}, collections.deque([1]), collections.OrderedDict(a=1), Slotted(), types.SimpleNamespace(a=1)],
    ids=lambda holder: type(holder).__name__,
)
def test_what_is_given_nothing_holds_nothing(holder):
    for part in places(holder):
        part.put(holder, [])
        assert not [value for value in part.take(holder) if value is not NOTHING]


def test_of_the_kinds_that_a_container_is_the_first_alone_counts():
    assert [part for part in places(collections.OrderedDict(a=1)) if part in PARTS.values()] == [
        PARTS[collections.OrderedDict]
    ]


def test_whose_modules_are_looked_into():
    found = [is_user_module(name) for name in (None, "json.decoder", "numpy", "lnp_torch.model", "pytest", __name__)]
    assert found == [False, False, False, False, False, True]
    seen = reachable_objects([{"mine": [Shared()], "lock": threading.Lock(), "pytest": pytest.approx(1)}])
    assert not any(isinstance(x, type(threading.Lock())) for x in seen)
    foreign = reachable_objects([[np.random.default_rng(0), Shared()]], frozenset({__name__.partition(".")[0]}))
    assert not any(isinstance(x, Shared) for x in foreign)


def test_objects_of_the_same_type_that_hold_nothing():
    class Named(dict):
        def __new__(cls, name):
            return super().__new__(cls)

        def __init__(self, name):
            super().__init__()

    assert type(empty_like(Named("a"))) is Named
    made = empty_like(collections.defaultdict(list, a=[1]))
    assert (made, made.default_factory) == ({}, list)
    assert empty_like(collections.deque([1], 3)).maxlen == 3
    assert vars(empty_like(Shared())) == {}


def test_references_are_what_cannot_be_replaced():
    inner = [0]
    assert references(inner.append)[0] is inner
    assert references(functools.partial(print, inner, sep="x")) == [print, inner, "x"]
    assert references((1, inner))[:2] == [1, inner]
    assert object in references(Shared)
    assert references(test_references_are_what_cannot_be_replaced) == []


def test_threads_put_back_one_after_another():
    """Without a lock the second would take the first one's count for what the user had, and put that back last."""
    counts, second_is_in, first_is_out = [0], threading.Event(), threading.Event()

    def second():
        with preserve_state(counts):
            second_is_in.set()
            first_is_out.wait(10)

    thread = threading.Thread(target=second)
    with preserve_state(counts):
        counts[0] += 1
        thread.start()
        assert not second_is_in.wait(0.2)
    first_is_out.set()
    thread.join()
    assert counts == [0]
