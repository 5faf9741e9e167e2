"""Trees that Orbax wrote give what a tracker in the run gave."""

from __future__ import annotations

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
