"""Processes that measure together, which are threads here: those with one part of the batch count as one."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from types import SimpleNamespace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp.results import in_group
from lnp.results.in_group import DecomposeTogether, decompose_together

RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.standard_normal((12, 5)), RNG.integers(0, 3, 12)
MODEL = lnp_numpy.LinearModel(weight=RNG.standard_normal((5, 3)))


class Threads:
    """A group of threads, each of which has a part of the batch."""

    def __init__(self, rank, parts, shared, barrier, whole_gradients=False):
        self.rank, self.size, self.parts = rank, len(parts), parts
        self._shared, self._barrier = shared, barrier
        self.whole_gradients = whole_gradients

    def session(self):
        return contextlib.nullcontext()

    def exchange(self, point, value):
        self._shared[point, self.rank] = value
        self._barrier.wait(10)
        return [self._shared[point, rank] for rank in range(self.size)]

    def summed(self, lin, vector, share):
        assert (vector is not None) == self.whole_gradients
        g = lin.loss_gradient / np.abs(lin.loss_gradient).max()
        own = lin.vjp(g) if vector is None else vector
        every = self.exchange("gradient", {name: share * part for name, part in own.items()})
        whole = {name: sum(one[name] for one in every) for name in every[0]}
        squares = {name: np.sum(part**2) / self.size for name, part in whole.items()}
        return squares, whole if self.whole_gradients else None


def measured(parts, rows, monkeypatch, whole_gradients=False, model=MODEL, by_rank=None, **options):
    """What each thread gets of its rows."""

    def evaluate(computation, model, batches, options):
        def number(leaf):
            return float(leaf) if isinstance(leaf, np.ndarray | np.generic) and leaf.ndim == 0 else leaf

        def run(lin):
            seen.seed = options.seed
            return computation.together(lin, map_leaves(number, computation(lin)))

        return map_leaves(number, lnp_numpy.evaluate(run, model, batches, options))

    monkeypatch.setattr(in_group, "evaluate", evaluate)
    shared, barrier, seen = {}, Barrier(len(parts)), local()

    def one(rank):
        group = Threads(rank, parts, shared, barrier, whole_gradients)
        computation = DecomposeTogether("exact", 0.01, 64, False, None, False, group=group)
        own = options if by_rank is None else by_rank[rank]
        batch = (INPUTS[rows[rank]], TARGETS[rows[rank]])
        try:
            return decompose_together(computation, model, batch, Options(seed=7, **own)), seen.seed
        except ValueError as error:
            return str(error), None

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(one, range(len(parts))))


@pytest.mark.parametrize("parts", [(0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 3)])
def test_processes_with_one_part_count_as_one(parts, monkeypatch):
    count = len(set(parts))
    rows = [slice(12 // count * part, 12 // count * (part + 1)) for part in parts]
    found = measured(parts, rows, monkeypatch)
    expected = lnp.decompose(MODEL, (INPUTS, TARGETS), estimator="exact").to_dict()
    for d, _ in found:
        values = d.to_dict()
        for name in (
            "samples",
            "loss",
            "rate",
            "chi_loss",
            "chi_net",
            "chi_pos",
            "population/rate",
            "population/chi_pos",
        ):
            assert values[name] == pytest.approx(expected[name], rel=1e-12), name
    seeds = [seed for _, seed in found]
    assert len(set(seeds)) == count
    assert all(seeds[rank] == seeds[parts.index(part)] for rank, part in enumerate(parts))
    assert count > 1 or seeds[0] == 7  # the signs of one process


@pytest.mark.parametrize("sizes", [(6, 6), (3, 3, 3, 3)])
def test_whole_gradients_tell_the_errors_of_the_population(sizes, monkeypatch):
    """Those of the whole batch, of which single samples are left out, and not a mean over those of the parts."""
    ends = np.cumsum(sizes)
    rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    whole = lnp.decompose(MODEL, (INPUTS, TARGETS), estimator="exact").population
    for given in (True, False):
        for d, _ in measured(tuple(range(len(sizes))), rows, monkeypatch, whole_gradients=given):
            errors = d.population.rate_stderr, d.population.chi_pos_stderr
            assert (errors == pytest.approx((whole.rate_stderr, whole.chi_pos_stderr), rel=1e-9)) is given


def test_gradients_of_other_sizes_are_brought_to_one(monkeypatch):
    """Each part is divided by its own largest entry, which is much smaller in one of them."""
    certain = lnp_numpy.LinearModel(weight=30 * MODEL.parameters["weight"])
    rows = [slice(0, 6), slice(6, 12)]
    expected = lnp.decompose(certain, (INPUTS, TARGETS), estimator="exact")
    for given in (True, False):
        for d, _ in measured((0, 1), rows, monkeypatch, whole_gradients=given, model=certain):
            assert (d.rate, d.chi_pos) == pytest.approx((expected.rate, expected.chi_pos), rel=1e-12)
            assert d.population.rate == pytest.approx(expected.population.rate, rel=1e-9)
            if given:
                assert d.population.rate_stderr == pytest.approx(expected.population.rate_stderr, rel=1e-9)


def test_other_parameters_are_an_error_in_every_process(monkeypatch):
    model = lnp_numpy.LinearModel(weight=MODEL.parameters["weight"], bias=np.zeros(3))
    rows = [slice(0, 6), slice(6, 12)]
    given = {"parameters": ["weight"]}, {}
    found = measured((0, 1), rows, monkeypatch, model=model, by_rank=given)
    assert len(found) == 2
    for told, _ in found:
        assert told.startswith("Processes 0 and 1 of the group measure different parameters: ['bias']. Expected")


def test_losses_that_are_nan_are_of_the_same_batch():
    one = {"samples": 6, "loss": np.nan}
    assert in_group._same_batch(one, one)
    assert not in_group._same_batch(one, one | {"loss": 1.0})


@pytest.mark.parametrize(
    ("found", "options", "named"),
    [
        (True, {"preconditioner": {}}, "preconditioner="),
        (True, {"batches": 2}, "batches="),
        (True, {}, None),
        (False, {"preconditioner": {}}, None),
        (False, {"batches": 2}, None),
    ],
)
def test_options_for_one_process(found, options, named, monkeypatch):
    group = SimpleNamespace(size=4) if found else None
    monkeypatch.setattr(in_group, "find", lambda model: SimpleNamespace(group_of=lambda model, asked: group))
    if named is None:
        assert in_group.group_of(MODEL, "auto", **options) is group
        return
    with pytest.raises(ValueError, match=f"^{named} was given for a model that 4 processes measure together"):
        in_group.group_of(MODEL, "auto", **options)


@pytest.mark.parametrize(("loss", "same"), [(1.0 + 0.9e-4, True), (1.0 + 1.1e-4, False), (np.nan, False)])
def test_losses_that_were_summed_in_another_order_are_of_the_same_batch(loss, same):
    one = {"samples": 6, "loss": 1.0}
    assert in_group._same_batch(one, one | {"loss": loss}) is same
    assert not in_group._same_batch(one, {"samples": 7, "loss": loss})


def test_different_batches_for_one_part_are_an_error_in_every_process(monkeypatch):
    found = measured((0, 0), [slice(0, 6), slice(6, 12)], monkeypatch)
    assert all(told.startswith("Processes 0 and 1 of the group have different batches: 6 samples") for told, _ in found)


@pytest.mark.parametrize(
    ("names", "told"),
    [(["a", "a", "dcba"], r"0 and 2 .*\['b', 'c', 'd'\]"), (["ab", "ac", "a"], r"0 and 1 .*\['b', 'c'\]")],
)
def test_other_parameters_are_named(names, told):
    every = [{"names": list(own), "samples": 3, "loss": 1.0} for own in names]
    with pytest.raises(ValueError, match=f"Processes {told}"):
        in_group._check_alike(every, range(3))
