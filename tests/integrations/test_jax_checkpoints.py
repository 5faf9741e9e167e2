"""Trees that Orbax wrote give what a tracker in the run gave."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lnp

pytestmark = pytest.mark.filterwarnings("ignore")  # Orbax's own, of event loops and shardings

R = np.random.default_rng(0)
X = R.standard_normal((12, 4)).astype("float32")
Y = X @ R.standard_normal((4, 2)).astype("float32")


def apply(parameters, inputs):
    return jnp.tanh(inputs @ parameters["hidden"]) @ parameters["head"]


def drawn(step):
    return {"hidden": jnp.full((4, 3), 0.1 + step), "head": jnp.full((3, 2), 0.2)}


def of_tree(tree):
    return apply, tree["params"]


def of_state(tree):
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    nnx.update(model, tree)
    return model


def test_a_manager_s_steps(tmp_path):
    tracker = lnp.Tracker(schedule=1, batch=(jnp.asarray(X), jnp.asarray(Y)))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in range(3):
            tracker.observe(step, (apply, drawn(step)))
            manager.save(step, args=ocp.args.StandardSave({"params": drawn(step), "step": jnp.asarray(step)}))
    checkpoints = lnp.open_checkpoints(tmp_path / "run", model=of_tree)
    history = lnp.measure_checkpoints(checkpoints, batches=(X, Y), on_error="raise").history
    for row, other in zip(history.rows(), tracker.history.rows(), strict=True):
        for name in ("step", "loss", "rate", "chi_loss", "chi_net", "chi_pos"):
            assert row[name] == pytest.approx(other[name], rel=1e-6), name
    assert history["parameters"][0] == 18
    half = lnp.open_checkpoints(tmp_path / "run", model=of_tree, dtype="bfloat16")(0)[1]
    assert half["head"].dtype == jnp.bfloat16


def test_flax_modules_and_what_is_refused(tmp_path):
    module = nnx.Linear(4, 2, rngs=nnx.Rngs(3))
    with ocp.StandardCheckpointer() as saving:
        for name in ("step_5/params", "step_5/ema", "step_7"):
            saving.save(tmp_path / name, nnx.to_pure_dict(nnx.state(module)))
    (tmp_path / "step_5" / "_CHECKPOINT_METADATA").write_text("{}")
    checkpoints = lnp.open_checkpoints(tmp_path, model=of_state)
    assert checkpoints.steps == (5, 7)
    assert jnp.array_equal(checkpoints(7).kernel[...], module.kernel[...])
    assert checkpoints.size(checkpoints(7)) == 10
    with pytest.raises(ValueError, match=r"holds \['ema', 'params'\] trees.*entry="):
        checkpoints(5)
    assert jnp.array_equal(lnp.open_checkpoints(tmp_path, model=of_state, entry="ema")(5).bias[...], jnp.zeros(2))
    for file in (tmp_path / "step_7").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"torn")
    with pytest.raises(ValueError, match="step_7 cannot be read"):
        checkpoints(7)
    with pytest.raises(ValueError, match="received no model"):
        lnp.open_checkpoints(tmp_path)
    assert jax.tree.leaves(checkpoints.prepare((X, Y)))[0].shape == (12, 4)


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


HOSTILE = ["truncated", "shapes", "header", "pickle", "pickled array", "deep", "link", "pipe", "pipe behind a link"]


def damaged(kind, folder, mark):
    """Make a sound tree of arrays one that is damaged, or that wants to run code which makes the file `mark`."""
    array, metadata = folder / "head", folder / "_METADATA"
    chunk = next(file for file in array.iterdir() if file.name[0].isdigit())
    if kind == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:9])
    elif kind in ("shapes", "header"):
        size = 5 if kind == "shapes" else 1 << 24
        said = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps(said | {"shape": [size] * 2, "chunks": [size] * 2}))
    elif kind in ("pickle", "pickled array"):
        (metadata if kind == "pickle" else chunk).write_bytes(pickle.dumps(Evil(mark)))
    elif kind == "deep":
        metadata.write_text("[" * 100_000)
    elif kind in ("link", "pipe"):
        chunk.unlink()
        chunk.symlink_to(chunk) if kind == "link" else os.mkfifo(chunk)
    else:
        elsewhere = folder.parent.parent / "elsewhere"
        array.rename(elsewhere)
        array.symlink_to(elsewhere)
        chunk = elsewhere / chunk.name
        chunk.unlink()
        os.mkfifo(chunk)


@pytest.mark.filterwarnings("ignore:lnp. the checkpoint of step .* was skipped")
def test_a_hostile_folder_gives_named_errors_and_runs_nothing(tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "run"
    saving = ocp.PyTreeCheckpointer(use_ocdbt=False)
    for step in range(len(HOSTILE) + 1):
        saving.save(folder / f"step_{step}", drawn(0))
    for step, kind in enumerate(HOSTILE, 1):
        damaged(kind, folder / f"step_{step}", mark)
    checkpoints = lnp.open_checkpoints(folder, model=lambda tree: (apply, tree))
    measured = lnp.measure_checkpoints(checkpoints, batches=(X, Y))
    assert list(measured.history["step"]) == [0]
    assert list(measured.skipped) == list(range(1, len(HOSTILE) + 1))
    for step, kind in enumerate(HOSTILE, 1):
        assert str(folder / f"step_{step}") in measured.skipped[step] or kind == "shapes", kind
    assert "arrays take 1.1e+15 bytes" in measured.skipped[HOSTILE.index("header") + 1]
    assert "is a pipe" in measured.skipped[len(HOSTILE)]
    assert not mark.exists()
