"""What `lnp measure` makes of its arguments and files, without a framework."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from lnp import cli
from lnp.checkpoints import command, data
from lnp.checkpoints.folder import open_checkpoints, step_in


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["run", "--text", "file", *arguments])


def test_steps_are_chosen_among_those_that_there_are():
    there = (0, 5, 10, 15, 20, 100)
    chosen = {
        "10:": [10, 15, 20, 100],
        ":10": [0, 5, 10],
        "0:20:10": [0, 10, 20],
        "5:100:10": [5, 15],
        "5::15": [5, 20],
        "0,7,100": [0, 100],
    }
    for text, expected in chosen.items():
        assert parsed("--steps", text).steps(there) == expected, text


def test_defaults_are_those_that_the_help_says():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = [part.split() for part in " ".join(parser.format_help().split()).split(" --")[1:]]
    said = {words[0]: words[words.index("(default:") + 1].rstrip(")") for words in options if "(default:" in words}
    numbers = {name: float(text) for name, text in said.items() if text.replace(".", "").isdecimal()}
    assert numbers.keys() == {"length", "batch-size", "count", "rtol", "seed"}
    given = vars(parsed())
    assert {name: given[name.replace("-", "_")] for name in numbers} == numbers


def test_a_batch_of_one_sample_may_be_asked_for():
    options = parsed("--batch-size", "1", "--count", "1", "--length", "1", "--microbatch", "1")
    assert (options.batch_size, options.count, options.length, options.microbatch) == (1, 1, 1, 1)


def test_tags_are_numbers_where_they_can_be():
    assert dict(parsed("--tag", "seed=1", "--tag", "name=a=b", "--tag", "lr=1e-3").tag) == {
        "seed": 1,
        "name": "a=b",
        "lr": 1e-3,
    }


@pytest.mark.parametrize("wrong", [["--tag", "seed"], ["--batch-size", "0"], ["--count", "x"], ["--arrays", "b.npz"]])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parsed(*wrong)
    assert "error: " in capsys.readouterr().err


def test_data_have_to_be_named(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["run"])
    assert "one of the arguments --text --tokens --arrays --batches is required" in capsys.readouterr().err


def test_sequences_are_spread_over_the_tokens_and_never_overlap():
    parts = data.sequences(np.arange(1003), 10, 4, 3)
    assert [part.shape for part in parts] == [(4, 10)] * 3
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == 120
    assert (rows == rows[:, :1] + np.arange(10)).all()
    assert {rows[:, 0].min(), rows[:, 0].max()} == {0, 990}
    given = data.sequences(np.arange(60).reshape(6, 10), 3, 6, 1)
    assert given[0].shape == (6, 10)
    with pytest.raises(ValueError, match=r"hold 100 sequences. Expected 120, for 3 batches of 40"):
        data.sequences(np.arange(1003), 10, 40, 3)


def test_files_of_arrays(tmp_path):
    x, y = np.arange(20.0).reshape(10, 2), np.arange(10)
    np.savez(tmp_path / "pair.npz", inputs=x, targets=y)
    np.savez(tmp_path / "named.npz", pixels=x, labels=y)
    first, second = data.array_batches(tmp_path / "pair.npz", 5, 2)
    assert sorted([*first[1], *second[1]]) == list(range(10))
    assert (first[0] == x[first[1]]).all()
    (batch,) = data.array_batches(tmp_path / "named.npz", 3, 1)
    assert batch["labels"].tolist() == [0, 4, 9]
    assert (batch["pixels"] == x[[0, 4, 9]]).all()
    np.save(tmp_path / "tokens.npy", y)
    assert data.read_tokens(tmp_path / "tokens.npy").tolist() == y.tolist()
    np.save(tmp_path / "rows.npy", y.reshape(2, 5))
    assert data.read_tokens(tmp_path / "rows.npy").tolist() == y.reshape(2, 5).tolist()


def test_tokens_are_left_on_the_disk(tmp_path):
    """A file of tokens may be larger than the memory, and a few sequences of it are measured."""
    np.save(tmp_path / "tokens.npy", np.arange(10))
    assert isinstance(data.read_tokens(tmp_path / "tokens.npy"), np.memmap)


def test_of_a_text_there_are_its_own_tokens_and_no_warning_of_their_number(tmp_path):
    def tokenizer(text, add_special_tokens=True, verbose=True):
        assert not verbose
        return {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]}

    (tmp_path / "text.txt").write_text("abc")
    assert data.text_tokens(tmp_path / "text.txt", tokenizer).tolist() == [97, 98, 99]


def test_files_of_something_else_are_refused(tmp_path):
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([print], dtype=object))
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    np.savez(tmp_path / "uneven.npz", inputs=np.ones(3), targets=np.ones(2))
    np.savez(tmp_path / "scalar.npz", labels=np.ones(1), temperature=0.5)
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), dtype=int))
    (tmp_path / "text.npy").write_text("hello")
    for name in ("floats.npy", "objects.npy", "other.npz", "text.npy", "cube.npy"):
        with pytest.raises(ValueError, match=f"{name} holds .*Expected"):
            data.read_tokens(tmp_path / name)
    for name in ("other.npz", "uneven.npz", "floats.npy", "scalar.npz"):
        with pytest.raises(ValueError, match=f"{name} holds .*Expected"):
            data.array_batches(tmp_path / name, 1, 1)


def test_names_in_a_python_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy, neighbour\n"
        "one = (numpy.ones(2), numpy.ones(2))\n"
        "def several():\n    for _ in range(neighbour.COUNT): yield one\n"
    )
    (tmp_path / "neighbour.py").write_text("COUNT = 3\n")
    assert len(data.python_batches(f"{file}:one")) == 1
    assert len(data.python_batches(f"{file}:several")) == 3
    assert data.function_from_file(None) is None
    with pytest.raises(ValueError, match="has no 'four'"):
        data.python_batches(f"{file}:four")
    with pytest.raises(ValueError, match="Expected a function that makes the model"):
        data.function_from_file(f"{file}:one")
    for source in ("mine.py", "gone.py:batches"):
        with pytest.raises(ValueError, match="Expected a Python file and a name in it"):
            data.from_file(source)


def test_a_file_is_run_once_and_one_of_the_same_name_elsewhere_is_another(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(
            f"import pathlib\nvalue = {value}\nother = -value\n"
            "with pathlib.Path(__file__).with_suffix('.runs').open('a') as runs: runs.write('x')\n"
        )
    assert [data.from_file(f"{tmp_path}/a/same.py:{name}") for name in ("value", "other")] == [1, -1]
    assert data.from_file(f"{tmp_path}/b/same.py:value") == 2
    assert [(tmp_path / folder / "same.runs").read_text() for folder in "ab"] == ["x", "x"]


def test_a_file_s_neighbours_come_before_others_of_their_names(tmp_path, monkeypatch):
    for folder, value in (("elsewhere", 1), ("here", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lnp_test_beside.py").write_text(f"VALUE = {value}\n")
    (tmp_path / "here" / "importing.py").write_text("from lnp_test_beside import VALUE\n")
    monkeypatch.setattr("sys.path", [str(tmp_path / "elsewhere"), *sys.path])
    assert data.from_file(f"{tmp_path}/here/importing.py:VALUE") == 2


def test_where_histories_go():
    runs = [Path("a/w16"), Path("b/w32")]
    assert command._paths(runs, None) == {runs[0]: Path("w16.jsonl"), runs[1]: Path("w32.jsonl")}
    assert command._paths(runs[:1], Path("x/y.jsonl")) == {runs[0]: Path("x/y.jsonl")}
    with pytest.raises(ValueError, match="there are 2 runs"):
        command._paths(runs, Path("y.jsonl"))
    with pytest.raises(ValueError, match="the same name"):
        command._paths([Path("a/run"), Path("b/run")], None)


def test_steps_in_names_and_folders_of_nothing(tmp_path, capsys):
    names = {"global_step1000": 1000, "ckpt-3.index": 3, "epoch=3-step=400.ckpt": 400, "1.weights.h5": 1, "v2-7": 7}
    assert {name: step_in(Path(name)) for name in names} == names
    assert (step_in(Path("v" + 18 * "9")), step_in(Path("v" + 19 * "9"))) == (10**18 - 1, None)
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        open_checkpoints(tmp_path)
    assert cli.main(["measure", str(tmp_path), "--text", "file"]) == 1
    assert "holds no checkpoints. Expected a folder" in capsys.readouterr().err
