"""Commands hand on what was typed, end with a status, and make the folders they write to. Stand-ins do the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lnp.demo.screen
import lnp.plot
import lnp.views.report
import lnp.views.watch
from lnp.cli import main
from lnp.demo import Settings
from lnp.tracking.history import History


@pytest.fixture
def runs(tmp_path):
    """A file of one measurement, as it is typed."""
    History([{"step": 0, "loss": 1.0}]).to_jsonl(tmp_path / "run.jsonl")
    return str(tmp_path / "run.jsonl")


@pytest.fixture
def shown(monkeypatch):
    """What the demo was asked for."""
    asked = []
    monkeypatch.setattr(lnp.demo.screen, "show", lambda *given: asked.append(given))
    return asked


@pytest.fixture
def drawn(monkeypatch):
    """Pages that were drawn: (names of the runs, title, file)."""
    pages = []

    def dashboard(runs, title):
        return SimpleNamespace(savefig=lambda out, dpi: pages.append((list(runs), title, out)))

    monkeypatch.setattr(lnp.plot, "dashboard", dashboard)
    return pages


def test_a_command_is_asked_for(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "arguments are required: command" in capsys.readouterr().err


def test_the_demo_is_that_of_the_settings_unless_something_else_is_asked_for(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    assert shown == [(Settings(), Path("lnp-demo"))]


def test_the_demo_is_handed_what_was_asked_for(shown, tmp_path):
    assert main(["demo", "--framework", "torch", "--steps", "7", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert shown == [(Settings(framework="torch", steps=7, seeds=2), tmp_path)]


def test_three_steps_and_one_seed_are_enough(shown, tmp_path):
    assert main(["demo", "--steps", "3", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert shown == [(Settings(steps=3, seeds=1), tmp_path)]


@pytest.mark.parametrize("few", [["--steps", "2"], ["--seeds", "0"]])
def test_fewer_steps_or_seeds_are_refused(few, shown, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *few])
    assert "expected at least 3 steps and 1 seed" in capsys.readouterr().err
    assert shown == []


def test_the_demo_makes_its_folder_and_those_above_it(shown, tmp_path):
    out = tmp_path / "above" / "demo"
    for _ in range(2):  # the second time in the folder that is there
        assert main(["demo", "--out", str(out)]) == 0
    assert out.is_dir()


def test_plot_draws_the_runs_under_a_title(runs, drawn, tmp_path, capsys):
    out = tmp_path / "above" / "page" / "run.png"
    for _ in range(2):
        assert main(["plot", runs, "--out", str(out), "--title", "A run"]) == 0
    assert drawn == [(["run"], "A run", out)] * 2
    assert out.parent.is_dir()
    assert capsys.readouterr().out == f"Figure: {out}\n" * 2


def test_compare_draws_where_a_file_is_named_and_nowhere_else(runs, drawn, tmp_path):
    assert main(["compare", runs]) == 0
    assert drawn == []
    assert main(["compare", runs, "--out", str(tmp_path / "page.png")]) == 0
    assert drawn == [(["run"], None, tmp_path / "page.png")]


def test_report_writes_the_page_and_says_where(runs, monkeypatch, tmp_path, capsys):
    written = []
    monkeypatch.setattr(lnp.views.report, "write_report", lambda runs, *given: written.append((list(runs), *given)))
    assert main(["report", runs, "--out", str(tmp_path / "page.html"), "--title", "A run"]) == 0
    assert written == [(["run"], tmp_path / "page.html", "A run")]
    assert capsys.readouterr().out == f"Page: {tmp_path / 'page.html'}\n"


def test_watch_looks_every_two_seconds_unless_something_else_is_asked_for(runs, monkeypatch):
    watched = []
    monkeypatch.setattr(lnp.views.watch, "watch", lambda *given: watched.append(given))
    assert main(["watch", runs]) == 0
    assert main(["watch", runs, "--every", "0.5", "--once"]) == 0
    assert watched == [([Path(runs)], 2.0, False), ([Path(runs)], 0.5, True)]


def test_watching_ends_well_where_it_is_interrupted(runs, monkeypatch):
    def watch(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(lnp.views.watch, "watch", watch)
    assert main(["watch", runs]) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("'loss' is not a column"), "lnp: 'loss' is not a column\n"),
        (FileNotFoundError(2, "No such file", "run.jsonl"), "lnp: [Errno 2] No such file: 'run.jsonl'\n"),
        (ValueError("two\nlines"), "lnp: two\nlines\n"),
    ],
)
def test_what_goes_wrong_is_said_as_it_stands(error, said, monkeypatch, tmp_path, capsys):
    def show(*given):
        raise error

    monkeypatch.setattr(lnp.demo.screen, "show", show)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == said


def test_the_run_without_measurements_is_named_and_left_out(runs, drawn, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "page.png")]) == 0
    assert drawn == [(["run"], None, tmp_path / "page.png")]
    assert capsys.readouterr().err == "lnp: nothing has been measured yet in empty\n"


def test_arguments_are_those_of_the_program_unless_they_are_given(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lnp", "demo", "--steps", "5", "--out", str(tmp_path)])
    assert main() == 0
    assert shown == [(Settings(steps=5), tmp_path)]


def test_a_closed_pipe_ends_a_command_as_shells_report_it(monkeypatch, tmp_path):
    def show(*given):
        raise BrokenPipeError

    monkeypatch.setattr(lnp.demo.screen, "show", show)
    monkeypatch.setattr(os, "dup2", lambda *given: None)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(fileno=lambda: 1))
    assert main(["demo", "--out", str(tmp_path)]) == 141  # 128, and 13 for SIGPIPE
