"""Two threads, on one model and on different ones: right numbers, and nothing is left."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tensorflow as tf

import lnp


class Net(tf.Module):
    def __init__(self, seed):
        super().__init__()
        drawn = np.random.default_rng(seed)
        self.hidden = tf.Variable(drawn.normal(size=(4, 8)).astype("float32") / 2)
        self.head = tf.Variable(drawn.normal(size=(8, 3)).astype("float32") / 3)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return tf.tanh(x @ self.hidden) @ self.head


BATCH = tf.constant(np.random.default_rng(7).normal(size=(16, 4)).astype("float32")), tf.range(16) % 3


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads(shared):
    models = [Net(0), Net(1)]
    models[1] = models[0] if shared else models[1]
    expected = [lnp.decompose(model, BATCH) for model in models]
    before = [
        (model.calls, [v.numpy().tobytes() for v in model.variables], [id(v) for v in model.variables])
        for model in models
    ]
    found, barrier = [[], []], threading.Barrier(2)

    def work(index):
        barrier.wait()
        for seed in range(6):
            found[index].append(lnp.decompose(models[index], BATCH, seed=seed, by_layer=seed % 2 == 1))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(found, expected, strict=True):
        assert len(results) == 6
        assert [d.rate for d in results] == pytest.approx([right.rate] * 6, rel=1e-5)
        assert [d.chi_pos for d in results] == pytest.approx([right.chi_pos] * 6, rel=0.1)
    after = [
        (model.calls, [v.numpy().tobytes() for v in model.variables], [id(v) for v in model.variables])
        for model in models
    ]
    assert after == before
