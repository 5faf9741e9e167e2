"""Checkpoints that TensorFlow wrote give what a tracker in the run gave."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import lnp
from lnp_tensorflow.checkpoints import OWN

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


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


HOSTILE = ["truncated", "no data", "shapes", "header", "pickled index", "pickled data", "link", "pipe"]


def damaged(kind, prefix, mark):
    """Make a sound checkpoint one that is damaged, or that wants to run code which makes the file `mark`."""
    index, data = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
    if kind == "truncated":
        data.write_bytes(data.read_bytes()[:20])
    elif kind == "no data":
        data.unlink()
    elif kind == "shapes":
        tf.train.Checkpoint(Network(width=5)).write(str(prefix))
    elif kind == "header":  # a slice of a variable that takes four terabytes
        key, graph = "hidden/.ATTRIBUTES/VARIABLE_VALUE", tf.train.load_checkpoint(str(prefix)).get_tensor(OWN)
        values, slices = [tf.ones(4), tf.constant(graph)], [f"{1 << 40} 0,4", ""]
        part = f"{prefix}_temp/part"
        tf.raw_ops.SaveV2(prefix=part, tensor_names=[key, OWN], shape_and_slices=slices, tensors=values)
        tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[part], destination_prefix=str(prefix))
    elif kind in ("pickled index", "pickled data"):
        (index if kind == "pickled index" else data).write_bytes(pickle.dumps(Evil(mark)))
    else:
        data.unlink()
        data.symlink_to(data) if kind == "link" else os.mkfifo(data)


def test_a_hostile_folder_gives_named_errors_and_runs_nothing(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "run"
    for step in range(len(HOSTILE) + 1):
        tf.train.Checkpoint(Network()).write(str(folder / f"ckpt-{step}"))
    for step, kind in enumerate(HOSTILE, 1):
        damaged(kind, folder / f"ckpt-{step}", mark)
    checkpoints = lnp.open_checkpoints(folder, model=Network)
    assert checkpoints(0).head.shape == (3, 2)
    words = {"header": "arrays take 4.4e.12 bytes", "pipe": "is a pipe"}
    for step, kind in enumerate(HOSTILE, 1):
        with pytest.raises(ValueError, match=f"{folder}/ckpt-{step}.*{words.get(kind, '')}"):
            checkpoints(step)
    assert not mark.exists()
