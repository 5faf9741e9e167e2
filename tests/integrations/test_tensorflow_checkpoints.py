"""Checkpoints that TensorFlow wrote give what a tracker in the run gave."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import lnp

R = np.random.default_rng(0)
X = R.standard_normal((12, 4)).astype("float32")
Y = X @ R.standard_normal((4, 2)).astype("float32")


class Network(tf.Module):
    def __init__(self, width=3):
        super().__init__()
        self.hidden = tf.Variable(0.1 * tf.ones((4, width)))
        self.head = tf.Variable(0.1 * tf.ones((width, 2)))

    def __call__(self, inputs):
        return tf.tanh(inputs @ self.hidden) @ self.head


@pytest.mark.parametrize("form", ["itself", "with an optimizer"])
def test_checkpoints_of_a_run(tmp_path, form):
    model = Network()
    saved = tf.train.Checkpoint(model)
    if form == "with an optimizer":
        saved = tf.train.Checkpoint(net=model, step=tf.Variable(0), momentum=[tf.Variable(tf.ones(3))])
    tracker = lnp.Tracker(schedule=1, batch=(tf.constant(X), tf.constant(Y)))
    for step in range(3):
        tracker.observe(step, model)
        saved.write(str(tmp_path / f"ckpt-{step}"))
        model.head.assign_add(0.1 * tf.ones((3, 2)))
    checkpoints = lnp.open_checkpoints(tmp_path, model=Network)
    assert checkpoints.steps == (0, 1, 2)
    history = lnp.measure_checkpoints(checkpoints, batches=(X, Y), on_error="raise").history
    for row, other in zip(history.rows(), tracker.history.rows(), strict=True):
        for name in ("step", "loss", "rate", "chi_loss", "chi_net", "chi_pos"):
            assert row[name] == pytest.approx(other[name], rel=1e-6), name
    assert history["parameters"][0] == 18


def test_what_does_not_fit_is_refused(tmp_path):
    tf.train.Checkpoint(a=Network(), b=Network()).write(str(tmp_path / "ckpt-1"))
    tf.train.Checkpoint(other=tf.Variable(1.0)).write(str(tmp_path / "ckpt-2"))
    tf.train.Checkpoint(Network(width=5)).write(str(tmp_path / "ckpt-3"))
    tf.train.Checkpoint(Network()).write(str(tmp_path / "ckpt-4"))
    (tmp_path / "ckpt-4.index").write_bytes(b"torn")
    checkpoints = lnp.open_checkpoints(tmp_path, model=Network)
    with pytest.raises(ValueError, match=r"under \['a', 'b'\] of its names.*entry="):
        checkpoints(1)
    assert lnp.open_checkpoints(tmp_path, model=Network, entry="b")(1).head.shape == (3, 2)
    with pytest.raises(ValueError, match="under none of its names"):
        checkpoints(2)
    for step in (3, 4):
        with pytest.raises(ValueError, match=rf"ckpt-{step} cannot be read"):
            checkpoints(step)
    with pytest.raises(ValueError, match=r"received no model"):
        lnp.open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="without variables"):
        lnp.open_checkpoints(tmp_path, model=tf.Module)(2)
