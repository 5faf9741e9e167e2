"""Two threads, on one model and on different ones: right numbers, and nothing is left."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lnp


def run(seed):
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    weights = {"hidden": jax.random.normal(k1, (4, 8)) / 2, "head": jax.random.normal(k2, (8, 3)) / 3}
    batch = jax.random.normal(k3, (16, 4)), jnp.arange(16) % 3
    return (apply, weights), batch


def apply(p, x):
    return jnp.tanh(x @ p["hidden"]) @ p["head"]


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads(shared):
    runs = [run(0), run(0 if shared else 1)]
    runs[1] = runs[0] if shared else runs[1]
    expected = [lnp.decompose(*one) for one in runs]
    before = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(one)] for one in runs]
    found, barrier = [[], []], threading.Barrier(2)

    def work(index):
        barrier.wait()
        for seed in range(6):
            found[index].append(lnp.decompose(*runs[index], seed=seed, by_layer=seed % 2 == 1))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 6
        assert [d.rate for d in results] == pytest.approx([right.rate] * 6, rel=1e-5)
        assert [d.chi_pos for d in results] == pytest.approx([right.chi_pos] * 6, rel=0.1)
    assert [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(one)] for one in runs] == before
