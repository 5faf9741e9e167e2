"""The table of the terminal: what stands under which heading, what fits, and which files are read again."""

from __future__ import annotations

import io
import math
import os
import time

import pytest
import rich.console
from rich.console import Console

import lnp
from integrations.drawn_runs import means, run, steps
from lnp.views import watch
from lnp.views.watch import COLUMNS, Watched, age, fitting, line, shortened, sparkline

HEADINGS = [
    "run", "step", "loss", "", "chi_loss", "chi_net", "chi_pos", "", "net chi_pos", "noise scale", "reach", "measuring",
    "last",
]  # fmt: skip


def test_each_number_stands_under_its_heading():
    assert [name for name, _ in COLUMNS] == HEADINGS
    net = {"net/chi_pos": 3e-5, "net/chi_pos_stderr": 1e-5}
    history = lnp.History([row | net | {"time": 1000.0 + row["step"]} for row in run().rows()])
    cells = line("mine", history, now=1064.0)
    last = {name: means(history[name])[-1] for name in ("loss", "chi_loss", "chi_net", "population/chi_pos")}
    assert cells[:3] == ["mine", "59", f"{last['loss']:.3g}"]
    assert cells[3] == sparkline(history, "loss")
    assert cells[4:6] == [f"{last['chi_loss']:.3g}", f"{last['chi_net']:.3g}"]
    assert cells[6] == f"{last['population/chi_pos']:.3g}"
    assert cells[7] == sparkline(history, "population/chi_pos")
    assert cells[8] == "3.0e-05 ± 1.0e-05"
    assert cells[9] == "63"  # 5 + 58, the noise scale of the last window's middle, whose rates differ little
    assert cells[10] == str(history.reach())
    assert cells[11:] == ["0.6 s", "5 s ago"]


def test_what_a_run_does_not_say_is_a_dash():
    cells = line("mine", steps([0.5], "chi_pos"), now=0.0)
    assert cells == ["mine", "0", "-", "", "-", "-", "0.5", "", "-", "-", "0.5", "0 s", "-"]


def test_columns_come_in_the_order_of_their_weight_as_far_as_there_is_room():
    cells = [["r" * 6, "10", "0.5", *["x" * 8] * 10], ["r", "1000", *["y"] * 11]]
    assert fitting(cells, 6) == []
    assert fitting(cells, 8) == [1]
    assert fitting(cells, 9) == [0]  # six letters, a gap of two, and the end of the line
    assert fitting(cells, 15) == [0, 1]
    assert fitting(cells, 21) == [0, 1, 2]
    assert fitting(cells, 31) == [0, 1, 2, 6]
    assert fitting(cells, 1000) == list(range(13))
    by_weight = [HEADINGS[index] for index in sorted(range(13), key=lambda index: COLUMNS[index][1])]
    assert by_weight[:7] == ["run", "step", "loss", "chi_pos", "reach", "last", "chi_net"]
    assert by_weight[7:] == ["net chi_pos", "chi_loss", "", "", "measuring", "noise scale"]
    assert sorted(weight for _, weight in COLUMNS) == list(range(13))


def test_a_narrow_column_is_taken_where_a_weightier_one_has_no_room():
    cells = [["r", "10", "0.5", *["x" * 30] * 9, "y"]]
    assert fitting(cells, 24) == [0, 1, 2, 12]


def test_names_are_cut_in_their_middle():
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcd…ghi"
    assert shortened("abcdefghi", 7) == "abc…ghi"
    assert len(shortened("x" * 99, 30)) == 30


def test_courses_are_drawn_on_a_logarithmic_scale():
    history = lnp.History([{"step": s, "value": 2.0 ** (-math.log1p(s))} for s in range(60)])
    falling = sparkline(history, "value")
    heights = ["▁▂▃▄▅▆▇█".index(bar) for bar in falling]
    assert heights == [round(7 * (1 - i / 15)) for i in range(16)]
    assert sparkline(steps([1.0, 1.0]), "value") == "▁" * 16
    assert sparkline(steps([1.0]), "value") == ""
    assert sparkline(steps([1.0, -1.0, math.nan, math.inf]), "value") == ""
    assert sparkline(steps([1.0, 0.0, 2.0]), "value")[::15] == "▁█"
    assert sparkline(steps([1.0, 1.0, 2.0]), "value")[::15] == "▁█"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s ago"), (0.0, "0 s ago"), (59.0, "59 s ago"), (60.0, "1 min ago"), (3599.0, "60 min ago"),
        (3600.0, "1 h ago"), (86399.0, "24 h ago"), (86400.0, "1 d ago"), (10 * 86400.0, "10 d ago"),
        (math.nan, "-"), (math.inf, "-"),
    ],
)  # fmt: skip
def test_how_long_ago_something_was(seconds, text):
    assert age(seconds) == text


def screen(watched, width=200, now=0.0):
    console = Console(width=width, file=io.StringIO())
    console.print(watched.table(width, now))
    return console.file.getvalue()


def test_names_are_at_the_left_and_numbers_at_the_right(tmp_path):
    for name, size in (("a", 3), ("longer", 30)):
        run(rows=size, layers=False).to_jsonl(tmp_path / f"{name}.jsonl")
    head, _, first, second = [row for row in screen(Watched([tmp_path])).splitlines() if row.strip()]
    assert head.split() == " ".join(HEADINGS).split()
    assert first.startswith(" a ")
    assert second.startswith(" longer ")
    ends = {text: text_of.index(f" {text} ") + len(text) for text, text_of in (("2", first), ("29", second))}
    assert ends["2"] == ends["29"] == head.index("step ") + 3


def test_long_names_take_a_third_of_the_terminal(tmp_path):
    run(rows=3, layers=False).to_jsonl(tmp_path / f"{'x' * 50}.jsonl")
    for width, letters in ((90, 30), (150, 50), (12, 8)):
        assert f" {shortened('x' * 50, letters)} " in screen(Watched([tmp_path]), width)


def test_files_are_read_again_where_they_have_changed(tmp_path, monkeypatch):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file in (path, other):
        run(rows=3, layers=False).to_jsonl(file)
    read, own = [], lnp.History.read
    monkeypatch.setattr(watch.History, "read", lambda file: read.append(file.stem) or own(file))
    watched = Watched([tmp_path])
    screen(watched)
    screen(watched)
    assert read == ["a", "b"]
    run(rows=78, layers=False).to_jsonl(path)
    assert " 77 " in screen(watched)
    assert read == ["a", "b", "a"]
    before = other.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns + 10))
    screen(watched)
    assert read == ["a", "b", "a", "b"]


def test_a_damaged_file_says_so_until_it_is_whole_and_warns_of_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("hello\nworld\n")
    watched = Watched([tmp_path])
    assert "a: " in screen(watched)
    run(rows=6, layers=False).to_jsonl(path)
    with path.open("a") as file:
        file.write("hello\n")
    assert " 5 " in screen(watched)
    assert "a: " not in screen(watched)


def test_the_table_is_shown_again_until_it_is_ended(tmp_path, monkeypatch):
    run(rows=3, layers=False, time=time.time()).to_jsonl(tmp_path / "a.jsonl")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    for terminal, once, times in ((True, False, 3), (True, True, 0), (False, False, 0)):
        console = Console(width=100, file=io.StringIO(), force_terminal=terminal, legacy_windows=False)
        monkeypatch.setattr(rich.console, "Console", lambda console=console: console)
        waited.clear()
        if times:
            with pytest.raises(KeyboardInterrupt):
                watch.watch([tmp_path], every=0.5, once=once)
        else:
            watch.watch([tmp_path], every=0.5, once=once)
        assert waited == [0.5] * times
        assert console.file.getvalue().count("chi_net") >= max(times, 1)
        assert (console.file.getvalue().count("chi_net") > 1) == (times > 1)
        assert "s ago" in console.file.getvalue()
