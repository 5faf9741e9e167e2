"""Processes that measure together, which are threads here: those with one part of the batch count as one."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local

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

    whole_gradients = False

    def __init__(self, rank, parts, shared, barrier):
        self.rank, self.size, self.parts = rank, len(parts), parts
        self._shared, self._barrier = shared, barrier

    def session(self):
        return contextlib.nullcontext()

    def exchange(self, point, value):
        self._shared[point, self.rank] = value
        self._barrier.wait(10)
        return [self._shared[point, rank] for rank in range(self.size)]

    def summed(self, lin, vector, share):
        g = lin.loss_gradient / np.abs(lin.loss_gradient).max()
        every = self.exchange("gradient", {name: share * part for name, part in lin.vjp(g).items()})
        return {name: np.sum(sum(one[name] for one in every) ** 2) / self.size for name in every[0]}, None


def measured(parts, rows, monkeypatch, **options):
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
        group = Threads(rank, parts, shared, barrier)
        computation = DecomposeTogether("exact", 0.01, 64, False, None, False, group=group)
        batch = (INPUTS[rows[rank]], TARGETS[rows[rank]])
        try:
            return decompose_together(computation, MODEL, batch, Options(seed=7, **options)), seen.seed
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


@pytest.mark.parametrize(("loss", "same"), [(1.0 + 0.9e-4, True), (1.0 + 1.1e-4, False), (np.nan, False)])
def test_losses_that_were_summed_in_another_order_are_of_the_same_batch(loss, same):
    one = {"samples": 6, "loss": 1.0}
    assert in_group._same_batch(one, one | {"loss": loss}) is same
    assert not in_group._same_batch(one, {"samples": 7, "loss": loss})


def test_different_batches_for_one_part_are_an_error_in_every_process(monkeypatch):
    found = measured((0, 0), [slice(0, 6), slice(6, 12)], monkeypatch)
    assert all(told.startswith("Processes 0 and 1 of the group have different batches: 6 samples") for told, _ in found)
