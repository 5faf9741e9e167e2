"""Saved weights of a Keras model give what a callback in the run gave, and no configuration in a file is read."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import lnp
from lnp_keras.callback import LNPCallback

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras
R = np.random.default_rng(0)
X = R.standard_normal((12, 4)).astype("float32")
Y = X @ R.standard_normal((4, 2)).astype("float32")


def network(units=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(units, "tanh", name="hidden"), keras.layers.Dense(2, name="head")]
    )
    model.compile("sgd", "mse")
    return model


def test_weights_of_each_epoch(tmp_path):
    watched = LNPCallback((X, Y), schedule=1)
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    network().fit(X, Y, batch_size=12, epochs=3, verbose=0, callbacks=[watched, saving])
    checkpoints = lnp.open_checkpoints(tmp_path, model=network)
    assert checkpoints.steps == (1, 2, 3)
    history = lnp.measure_checkpoints(checkpoints, batches=(X, Y), on_error="raise").history
    for row, other in zip(history.rows()[:2], watched.tracker.history.rows()[1:], strict=True):
        for name in ("step", "loss", "rate", "chi_loss", "chi_net", "chi_pos", "parameters"):
            assert row[name] == pytest.approx(other[name], rel=1e-5), name


def test_one_model_is_filled_again_and_measured_as_new_ones_are(tmp_path):
    made = []

    def build():
        made.append(network())
        return made[-1]

    for step in (1, 2, 4):
        network().save_weights(tmp_path / f"{step}.weights.h5")
    network(units=5).save_weights(tmp_path / "3.weights.h5")
    model = network()
    model.get_layer("head").bias.assign([5.0, 6.0])
    model.save_weights(tmp_path / "2.weights.h5")
    checkpoints = lnp.open_checkpoints(tmp_path, model=build)
    with pytest.warns(UserWarning, match="step 3 was skipped"):
        history = lnp.measure_checkpoints(checkpoints, batches=(X, Y)).history
    assert len(made) == 2  # another one after the file that does not fit
    assert list(history["loss"]) == [lnp.decompose(checkpoints(step), (X, Y)).loss for step in (1, 2, 4)]
    assert history["loss"][0] == history["loss"][2] != history["loss"][1]
    assert checkpoints(1) is not checkpoints(2)


def test_a_keras_file_gives_its_weights_alone(tmp_path):
    mark = tmp_path / "ran"
    model = network()
    model.get_layer("head").bias.assign([5.0, 6.0])
    model.save(tmp_path / "1.keras")
    with zipfile.ZipFile(tmp_path / "1.keras") as whole, zipfile.ZipFile(tmp_path / "2.keras", "w") as evil:
        for name in whole.namelist():
            if name != "config.json":
                evil.writestr(name, whole.read(name))
            else:
                command = {"args": [["touch", str(mark)]], "name": "evil"}
                layer = {"module": "subprocess", "class_name": "run", "config": command, "registered_name": None}
                evil.writestr("config.json", json.dumps({**layer, "build_config": {"input_shape": [4]}}))
    at = str(mark)
    marking = keras.layers.Lambda(lambda x: open(at, "w").close() or x, output_shape=(4,))
    keras.Sequential([keras.Input((4,)), marking, *model.layers]).save(tmp_path / "5.keras")
    network(units=5).save(tmp_path / "3.keras")
    (tmp_path / "4.keras").write_bytes((tmp_path / "1.keras").read_bytes()[:300])
    checkpoints = lnp.open_checkpoints(tmp_path, model=network)
    for step in (1, 2, 5):
        assert np.asarray(checkpoints(step).get_layer("head").bias).tolist() == [5.0, 6.0]
    for step in (3, 4):
        with pytest.raises(ValueError, match=rf"{step}.keras cannot be read \(.*Expected a complete checkpoint"):
            checkpoints(step)
    assert not mark.exists()
    keras.saving.load_model(tmp_path / "5.keras", safe_mode=False)(X)
    assert mark.exists()  # the layer is one that would have run


def test_what_is_missing_is_said(tmp_path):
    network().save_weights(tmp_path / "1.weights.h5")
    with pytest.raises(ValueError, match=r"received no model.*model="):
        lnp.open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"Received dtype="):
        lnp.open_checkpoints(tmp_path, model=network, dtype="float64")
    with pytest.raises(ValueError, match="model without weights"):
        lnp.open_checkpoints(tmp_path, model=lambda: keras.Sequential([keras.layers.Dense(2)]))(1)


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


HOSTILE = {
    "truncated": "",
    "pickle": "",
    "shapes": "",
    "header": "arrays take 7.0e+13 bytes",
    "external": "lies in another file",
    "virtual": "lies in another file",
    "external link": "is a link",
    "soft link": "is a link",
    "circle": "cannot be read",
    "link": "",
    "pipe": "is a pipe",
}


def damaged(kind, path, mark):
    """Make a sound file of weights one that is damaged, or that leads elsewhere."""
    if kind in ("truncated", "pickle"):
        path.write_bytes(path.read_bytes()[:700] if kind == "truncated" else pickle.dumps(Evil(mark)))
    elif kind in ("link", "pipe"):
        path.unlink()
        path.symlink_to(path) if kind == "link" else os.mkfifo(path)
    else:
        with h5py.File(path, "a") as file:
            group = file["layers/dense/vars"] if "layers/dense" in file else file["layers/hidden/vars"]
            if kind in ("external", "virtual", "external link", "soft link", "circle", "shapes", "header"):
                del group["0"]
            hostile_entry(kind, group, path.with_name("secret.h5"))


def hostile_entry(kind, group, secret):
    """Put something in the place of the first array of a group."""
    if kind == "shapes":
        group["0"] = np.ones((4, 7), np.float32)
    elif kind == "header":
        group.create_dataset("0", (4, 1 << 42), np.float32, chunks=(4, 1024))
    elif kind == "external":
        group.create_dataset("0", (4, 3), np.float32, external=[(str(secret), 0, 48)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout((4, 3), np.float32)
        layout[:] = h5py.VirtualSource(secret, "w", (4, 3))
        group.create_virtual_dataset("0", layout)
    elif kind == "external link":
        group["0"] = h5py.ExternalLink(secret.name, "w")
    elif kind == "soft link":
        group["0"] = h5py.SoftLink("/layers")
    else:
        group["0"] = group


@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_a_hostile_folder_gives_named_errors_and_leads_nowhere(tmp_path, ending):
    mark, folder = tmp_path / "ran", tmp_path / "run"
    folder.mkdir()
    with h5py.File(folder / "secret.h5", "w") as file:
        file["w"] = np.ones((4, 3), np.float32)
    for step in range(len(HOSTILE) + 1):
        path = folder / f"{step}{ending}"
        (network().save_weights if ending == ".weights.h5" else network().save)(path)
        if not step:
            continue
        kind = list(HOSTILE)[step - 1]
        if ending == ".weights.h5" or kind in ("truncated", "pickle", "link", "pipe"):
            damaged(kind, path, mark)
            continue
        with zipfile.ZipFile(path) as archive:  # what is inside is hostile
            inside = {name: archive.read(name) for name in archive.namelist()}
        weights = folder / "model.weights.h5"
        weights.write_bytes(inside["model.weights.h5"])
        damaged(kind, weights, mark)
        inside["model.weights.h5"] = weights.read_bytes()
        weights.unlink()
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in inside.items():
                archive.writestr(name, content)
    checkpoints = lnp.open_checkpoints(folder, model=network, pattern=f"[0-9]*{ending}")
    assert checkpoints(0).built
    for step, (kind, words) in enumerate(HOSTILE.items(), 1):
        with pytest.raises(ValueError, match=re.escape(f"{folder / f'{step}{ending}'} ")) as told:
            checkpoints(step)
        assert words in str(told.value), kind
    assert not mark.exists()
