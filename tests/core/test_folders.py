"""Which files of a folder are checkpoints, and what the command makes of them, with a stand-in for a framework."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp import cli
from lnp.checkpoints.files import files_of, refuse_claims

RNG = np.random.default_rng(3)
X, Y = RNG.standard_normal((12, 2)), RNG.standard_normal((12, 2))


class Reader:
    """Reads weights that are written as text into NumPy's linear models."""

    def __init__(self, kind, **options):
        self.kind = kind

    def step(self, path, step):
        return step

    def load(self, path):
        if (text := text_in(path).read_text()) == "named":
            raise ValueError(f"{path} is of another model. Expected this one.")
        if text == "gone":
            raise ImportError("no library")
        width, weight = text.split()
        return lnp_numpy.LinearModel(weight=float(weight) * np.eye(int(width)))

    def prepare(self, batch):
        inputs, targets = batch.values() if isinstance(batch, dict) else batch
        return np.asarray(inputs, dtype=float), np.asarray(targets, dtype=float)

    def size(self, model):
        return model.weight.size

    def tags(self, path):
        return {}

    def check_language_model(self, path):
        self.load(path)

    def tokenizer(self, path):
        letters = (path / "letters.txt").read_text()
        return lambda text, **options: {"input_ids": [letters.index(letter) for letter in text]}


class Filling(Reader):
    """A reader that fills a model again, and counts."""

    calls: list[str]

    def load(self, path):
        self.calls.append(f"load {path.stem}")
        return super().load(path)

    def fill(self, path, model):
        self.calls.append(f"fill {path.stem}")
        model.weight[:] = super().load(path).weight
        return model


def text_in(path):
    """The file with a checkpoint's weights."""
    if path.is_dir():
        return path / "weights.txt"
    return path if path.exists() else path.with_name(f"{path.name}.index")


@pytest.fixture
def framework(monkeypatch):
    """The stand-in in the place of every framework; its `reader` may be replaced."""
    backend, readers = types.ModuleType("stand_in"), types.ModuleType("stand_in.checkpoints")
    readers.reader = Reader
    monkeypatch.setitem(sys.modules, "stand_in", backend)
    monkeypatch.setitem(sys.modules, "stand_in.checkpoints", readers)
    monkeypatch.setattr("lnp.checkpoints.folder.registry.load", lambda name: backend)
    return readers


def save(folder, name, weight, marker=None, width=2):
    """Write a checkpoint: a file of this name, or a folder that is told by its file `marker`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if marker is not None:
        path.mkdir()
        (path / marker).write_text("{}")
        path = path / "weights.txt"
    path.write_text(f"{width} {weight}")


@pytest.mark.parametrize(
    ("kind", "names", "marker"),
    [
        ("lightning", {"epoch=3-step=400.ckpt": 400, "epoch=0-step=100.ckpt": 100}, None),
        ("state_dict", {"1.pt": 1, "model-2.pth": 2, "v2-7.safetensors": 7}, None),
        ("keras", {"1.weights.h5": 1, "run-2.keras": 2}, None),
        ("tensorflow", {"ckpt-3.index": 3, "ckpt-10.index": 10}, None),
        ("transformers", {"checkpoint-500": 500, "checkpoint-1000": 1000}, "config.json"),
        ("transformers", {"step5": 5}, "adapter_config.json"),
        ("orbax", {"0": 0, "20": 20}, "_METADATA"),
    ],
)
def test_checkpoints_are_found_by_their_names(framework, tmp_path, kind, names, marker):
    for name, step in names.items():
        save(tmp_path / "run", name, step / 10, marker)
    (tmp_path / "run" / "notes-8.txt").write_text("none")
    (tmp_path / "run" / "logs-9").mkdir()
    (tmp_path / "run" / "ckpt-3.data-00000-of-00001").write_text("of the .index beside it")
    checkpoints = lnp.open_checkpoints(tmp_path / "run")
    assert (checkpoints.kind, checkpoints.reader.kind) == (kind, kind)
    assert checkpoints.steps == tuple(sorted(names.values()))
    history = lnp.measure_checkpoints(checkpoints, batches=(X, Y), on_error="raise").history
    expected = [lnp.decompose(checkpoints(step), (X, Y)).loss for step in checkpoints.steps]
    assert [checkpoints(step).weight[0, 0] for step in checkpoints.steps] == [step / 10 for step in checkpoints.steps]
    assert list(history["loss"]) == pytest.approx(expected)
    assert list(history["parameters"]) == [4] * len(names)


@pytest.mark.parametrize(("name", "step"), [("checkpoint-500", 500), ("final", 0)])
def test_a_folder_that_is_a_checkpoint_is_measured_by_itself(framework, tmp_path, name, step):
    save(tmp_path, name, 0.5, "config.json")
    checkpoints = lnp.open_checkpoints(tmp_path / name)
    assert checkpoints.files == {step: tmp_path / name}
    assert checkpoints(step).weight[0, 0] == 0.5


def test_revisions_in_the_hub_s_cache(framework, tmp_path):
    for step in (1000, 20):
        save(tmp_path / "snapshots", f"a{step}", step, "config.json")
        (tmp_path / "refs").mkdir(exist_ok=True)
        (tmp_path / "refs" / f"step{step}").write_text(f"a{step}\n")
    (tmp_path / "refs" / "main").write_text("a1000")
    checkpoints = lnp.open_checkpoints(tmp_path)
    assert checkpoints.steps == (20, 1000)
    assert [checkpoints(step).weight[0, 0] for step in checkpoints.steps] == [20, 1000]
    with pytest.raises(FileNotFoundError, match="holds no revision with a step in its name"):
        lnp.open_checkpoints(tmp_path, pattern="main")


def test_a_folder_of_checkpoints_may_hold_one_named_refs(framework, tmp_path):
    save(tmp_path, "1.pt", 0.5)
    (tmp_path / "refs").mkdir()
    assert lnp.open_checkpoints(tmp_path).steps == (1,)


def test_a_pattern_is_told_of_where_it_would_help(framework, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoints") as raised:
        lnp.open_checkpoints(tmp_path)
    assert "Choose by" not in str(raised.value)
    save(tmp_path, "1.pt", 0.5)
    save(tmp_path, "2.keras", 0.5)
    with pytest.raises(FileNotFoundError, match=r"of several kinds \(state_dict, keras\).*Choose by a pattern"):
        lnp.open_checkpoints(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for a right to make links")
def test_links_in_a_checkpoint_are_followed_and_circles_once(tmp_path):
    save(tmp_path, "stored/a", 1)
    save(tmp_path, "1/b", 1)
    (tmp_path / "1" / "link").symlink_to(tmp_path / "stored")
    (tmp_path / "stored" / "circle").symlink_to(tmp_path / "1")
    assert [name for name, _, _ in files_of(tmp_path / "1")] == ["1/b", "1/link/a"]


def test_what_a_folder_says_of_its_run_is_what_the_last_checkpoint_says(framework, tmp_path):
    class Telling(Reader):
        def tags(self, path):
            return {"last": path.stem}

    framework.reader = Telling
    for step in (2, 10, 1):
        save(tmp_path, f"{step}.pt", 0.5)
    assert lnp.open_checkpoints(tmp_path).tags == {"last": "10"}


def test_of_hugging_face_s_models_those_for_language_alone_are_given_tokens(framework, tmp_path, capsys):
    class Refusing(Reader):
        def check_language_model(self, path):
            raise ValueError(f"{path.name} is none")

    framework.reader = Refusing
    np.save(tmp_path / "tokens.npy", np.arange(24).reshape(4, 6))
    save(tmp_path / "first", "checkpoint-1", 0.5, "config.json", width=6)
    save(tmp_path / "second", "1.pt", 0.5, width=5)
    command = ["--tokens", str(tmp_path / "tokens.npy"), "--batch-size", "4", "--out", str(tmp_path / "a.jsonl")]
    assert cli.main(["measure", str(tmp_path / "first"), *command]) == 1
    assert "checkpoint-1 is none" in capsys.readouterr().err
    assert cli.main(["measure", str(tmp_path / "second"), *command]) == 0


def test_two_checkpoints_of_one_step_are_named_in_order(framework, tmp_path, monkeypatch):
    for name in ("a-1.pt", "b-1.pt"):
        save(tmp_path, name, 0.5)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: sorted(glob(folder, pattern), reverse=True))
    with pytest.raises(ValueError, match=r"^a-1.pt and b-1.pt in .* are both of step 1\."):
        lnp.open_checkpoints(tmp_path)


def test_the_files_of_a_checkpoint_are_in_the_order_of_their_names(tmp_path):
    for name in ("z", "inner/b", "inner/a"):
        save(tmp_path, f"1/{name}", 1)
    assert [name for name, _, _ in files_of(tmp_path / "1")] == ["1/inner/a", "1/inner/b", "1/z"]


def test_arrays_that_no_file_could_hold(tmp_path, monkeypatch):
    """A thousand times what is there, or what every machine has room for."""
    (tmp_path / "1.pt").write_bytes(bytes(7))
    refuse_claims(tmp_path / "1.pt", 2**32)
    with pytest.raises(ValueError, match=r"1.pt says that its arrays take 4.3e\+09 bytes, and its files have 7"):
        refuse_claims(tmp_path / "1.pt", 2**32 + 1)
    monkeypatch.setattr("lnp.checkpoints.files.LARGE", 0)
    refuse_claims(tmp_path / "1.pt", 7000)
    with pytest.raises(ValueError, match="Expected arrays that are in the files"):
        refuse_claims(tmp_path / "1.pt", 7001)


def test_whatever_is_wrong_with_a_checkpoint_the_error_names_it_once(framework, tmp_path):
    for step, text in enumerate(("2", "two 1.0", "named", "gone")):
        (tmp_path / f"{step}.pt").write_text(text)
    checkpoints = lnp.open_checkpoints(tmp_path)
    for step, found in enumerate(("not enough values", "invalid literal")):
        words = rf"^{tmp_path}/{step}.pt cannot be read \(ValueError: {found}.*\). Expected a complete checkpoint"
        with pytest.raises(ValueError, match=words):
            checkpoints(step)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/2.pt is of another model. Expected this one.$"):
        checkpoints(2)
    with pytest.raises(ImportError, match="no library"):
        checkpoints(3)


def test_a_model_that_can_be_filled_again_is_made_once_and_anew_after_a_failure(framework, tmp_path):
    framework.reader, Filling.calls = Filling, []
    for step in (0, 1, 3, 4):
        save(tmp_path, f"{step}.pt", step)
    save(tmp_path, "2.pt", "nothing")
    with pytest.warns(UserWarning, match="step 2 was skipped"):
        measured = lnp.measure_checkpoints(lnp.open_checkpoints(tmp_path), batches=(X, Y))
    assert list(measured.skipped) == [2]
    assert [call for call in Filling.calls if call.startswith("load")] == ["load 0", "load 3"]
    assert [call for call in Filling.calls if call.startswith("fill")] == ["fill 1", "fill 2", "fill 4"]
    losses = [lnp.decompose(lnp_numpy.LinearModel(step * np.eye(2)), (X, Y)).loss for step in (0, 1, 3, 4)]
    assert list(measured.history["loss"]) == pytest.approx(losses)


def measured_at(path, weight, inputs, targets):
    """Hold the loss in a file of one row against that of weight * 1 on these inputs and targets."""
    model = lnp_numpy.LinearModel(weight * np.eye(inputs.shape[1]))
    loss = lnp.decompose(model, (inputs.astype(float), targets.astype(float))).loss
    assert lnp.History.read(path)["loss"][-1] == pytest.approx(loss)


def test_the_command_says_what_it_has_measured_and_ends_with_3_where_something_was_skipped(framework, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", inputs=X, targets=Y)
    for step in (1, 2):
        save(tmp_path / "run", f"{step}.pt", step)
    command = ["measure", str(tmp_path / "run"), "--arrays", str(tmp_path / "data.npz"), "--batch-size", "12"]
    assert cli.main([*command, "--out", str(tmp_path / "a.jsonl")]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/a.jsonl: 2 checkpoints measured\n", "")
    measured_at(tmp_path / "a.jsonl", 2.0, X, Y)
    save(tmp_path / "run", "3.pt", "nothing")
    assert cli.main([*command, "--out", str(tmp_path / "a.jsonl")]) == 3
    told = capsys.readouterr()
    assert told.out == f"{tmp_path}/a.jsonl: 2 checkpoints measured, 1 skipped\n"
    assert told.err.startswith("lnp: the checkpoint of step 3 was skipped: ")


def test_of_several_runs_one_that_is_incomplete_makes_the_command_s_status(framework, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", inputs=X, targets=Y)
    save(tmp_path / "first", "1.pt", "nothing")
    save(tmp_path / "second", "1.pt", 1)
    command = ["measure", str(tmp_path / "first"), str(tmp_path / "second"), "--arrays", str(tmp_path / "data.npz")]
    assert cli.main([*command, "--batch-size", "12", "--out", str(tmp_path / "out")]) == 3
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == [
        "first.jsonl: 0 checkpoints measured, 1 skipped",
        "second.jsonl: 1 checkpoints measured",
    ]


def test_text_is_read_by_the_tokenizer_of_the_last_checkpoint(framework, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abcdefghij")
    for step, letters in ((5, "abcdefghij"), (10, "jihgfedcba")):
        save(tmp_path / "run", f"checkpoint-{step}", step / 10, "config.json", width=5)
        (tmp_path / "run" / f"checkpoint-{step}" / "letters.txt").write_text(letters)
    command = ["measure", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt"), "--length", "5"]
    assert cli.main([*command, "--batch-size", "2", "--out", str(tmp_path / "a.jsonl")]) == 0
    tokens = np.arange(9, -1, -1).reshape(2, 5)
    measured_at(tmp_path / "a.jsonl", 1.0, tokens, tokens)  # the model shifts its labels itself
    given = ["--tokenizer", str(tmp_path / "run" / "checkpoint-5")]
    assert cli.main([*command, *given, "--batch-size", "2", "--out", str(tmp_path / "b.jsonl")]) == 0
    measured_at(tmp_path / "b.jsonl", 1.0, tokens[::-1, ::-1], tokens[::-1, ::-1])
    capsys.readouterr()
    save(tmp_path / "other", "1.pt", 1)
    command = ["measure", str(tmp_path / "other"), "--text", str(tmp_path / "text.txt")]
    assert cli.main(command) == 1
    assert "checkpoints of the kind state_dict have none. Expected --tokens FILE.npy" in capsys.readouterr().err


def test_of_tokens_each_one_predicts_the_next(framework, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 9, (4, 6))
    np.save(tmp_path / "tokens.npy", tokens)
    save(tmp_path / "run", "1.pt", 0.5, width=5)
    command = ["measure", str(tmp_path / "run"), "--tokens", str(tmp_path / "tokens.npy"), "--batch-size", "4"]
    assert cli.main([*command, "--out", str(tmp_path / "a.jsonl")]) == 0
    measured_at(tmp_path / "a.jsonl", 0.5, tokens[:, :-1], tokens[:, 1:])


def test_files_that_are_no_folder_are_refused(tmp_path):
    save(tmp_path, "1.pt", 1)
    with pytest.raises(NotADirectoryError, match=r"1.pt is no folder. Expected a folder that holds a checkpoint"):
        lnp.open_checkpoints(Path(tmp_path / "1.pt"))
