"""The terminal's table and the page of runs: what they say is what the files hold, whatever the files hold."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

import lnp
import lnp_numpy
from lnp import cli
from lnp.runs.curves import Curve, curve
from lnp.views import figures
from lnp.views.report import page
from lnp.views.watch import BARS, COLUMNS, Watched, line, sparkline

EVIL = "</script><script>alert(1)</script>&<b>"


def history(scale=1.0, size=100, notes=""):
    rows = [
        {
            "step": step, "time": 1000.0 + step, "seconds": 0.5, "loss": scale / (1 + step), "rate": 1.0,
            "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 0.5 / (1 + step), "chi_pos_stderr": 0.01,
            "parameters": size, "samples": 8, "outputs": 3, "layer/a.one/rate": 0.25, "layer/a.two/rate": 0.75,
            "notes": notes,
        }
        for step in range(12)
    ]  # fmt: skip
    return lnp.History(rows)


def test_the_page_holds_everything_and_asks_for_nothing():
    text = page({"small": history(), "large": history(0.5, 1000, "a note")})
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", text)
    assert text.count("Plotly.newPlot(") >= 6
    assert "<b>large</b>, from step 0: a note" in text
    assert "8 samples x 3 outputs" in text
    assert "arXiv 2605.31244" in text
    assert text.count("plotly.js v") == 1


def test_figures_show_what_the_histories_hold():
    runs = {"small": history(), "large": history(0.5, 1000)}
    colours = figures.colours(runs)
    assert len(set(colours.values())) == 2
    loss = figures.along(runs, colours, "loss", lambda run: "loss")
    lines = [trace for trace in loss.data if trace.fill is None]
    for trace, (name, run) in zip(lines, runs.items(), strict=True):
        assert trace.meta == name
        assert np.array_equal(trace.y, curve(run, "loss").mean)
        assert trace.x[0] == figures.ZERO
        assert np.array_equal(trace.x[1:], run["step"][1:])
    against = figures.against_size(runs, colours)
    assert [tuple(trace.x) for trace in against.data] == [(100,), (1000,)]
    assert [trace.y[0] for trace in against.data] == [run.reach().chi_pos for run in runs.values()]
    layers = figures.by_layer(history())
    assert layers.data[0].z[1][0] == 0.75
    assert list(layers.data[0].y) == ["one", "two"]
    assert figures.along(runs, colours, "net", lambda run: "net/rate_per_step") is None


def test_frozen_runs_are_dotted_and_take_no_colour_of_a_size():
    runs = {"small": history(), "large": history(0.5, 1000)}
    frozen = lnp.History([row | {"frozen": True} for row in history(size=500).rows()])
    colours = figures.colours(runs | {"frozen": frozen})
    assert colours == figures.colours(runs) | {"frozen": figures.GREY}
    dashes = {trace.meta: trace.line.dash for trace in figures.against_loss(runs | {"frozen": frozen}, colours).data}
    assert dashes == {"small": "solid", "large": "solid", "frozen": "dot"}
    assert "Dotted: frozen features." in page(runs | {"frozen": frozen})
    assert "Dotted" not in page(runs)


def test_bands_and_limits_on_a_logarithmic_axis():
    """A band that reaches below zero is cut, one with a gap is drawn in parts, and limits are triangles."""
    mean = np.array([1.0, 0.5, np.nan, 0.2, 0.1, np.inf])
    low, high = np.array([0.9, -1.0, np.nan, 0.1, 0.05, 7.0]), np.array([1.1, 2.0, np.nan, 0.3, 0.2, 9.0])
    step = np.arange(6.0)
    figure = figures._figure("noise", "step")
    figures._draw(figure, "run", Curve(step, mean, np.zeros(6), step, step, low, high), "red")
    first, second, limits, line = figure.data
    assert list(first.x) == [0.5, 1.0, 1.0, 0.5]
    assert list(first.y) == [1.1, 2.0, pytest.approx(0.03), 0.9]
    assert list(second.y) == [0.3, 0.2, 0.05, 0.1]
    assert (list(limits.x), list(limits.y), limits.marker.symbol) == ([5.0], [7.0], "triangle-up")
    assert np.array_equal(line.y[:5], mean[:5], equal_nan=True)


def test_names_and_notes_are_text_and_never_code(tmp_path):
    text = page({EVIL: history(notes=EVIL), "other": history()}, title=EVIL)
    assert "<script>alert" not in text
    assert "<b>&lt;/script&gt;" in text
    assert 'data-run="&amp;lt;/script&amp;gt;' in text


def test_runs_without_numbers_for_a_figure_have_a_page():
    empty = lnp.History([{"step": 0, "loss": float("nan"), "chi_loss": 0.0, "chi_net": float("inf"), "chi_pos": -1.0}])
    assert "Figures" in page({"empty": empty})
    with pytest.raises(ValueError, match="no measurements to show"):
        page({"none": lnp.History()})


def test_the_table_of_the_terminal(tmp_path, capsys):
    cells = dict(zip([name for name, _ in COLUMNS], line("run", history(), now=1071.0), strict=True))
    assert (cells["step"], cells["loss"], cells["measuring"], cells["last"]) == ("11", "0.0833", "6 s", "1 min ago")
    falling = sparkline(history(), "loss")
    assert (falling[0], falling[-1]) == (BARS[-1], BARS[0])
    assert sparkline(history(), "chi_net") == BARS[0] * 16
    history().to_jsonl(tmp_path / "run.jsonl")
    assert cli.main(["watch", str(tmp_path)]) == 0  # no terminal: once
    assert "0.0833" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def screen(watched, width=80, now=0.0):
    """What a terminal of this width shows."""
    console = Console(width=width, file=io.StringIO())
    console.print(watched.table(width, now))
    return console.file.getvalue()


def test_files_that_grow_come_and_go(tmp_path):
    watched = Watched([tmp_path])
    assert "holds no .jsonl file" in screen(watched, 200)
    path = tmp_path / "run.jsonl"
    path.touch()
    assert "run: nothing yet" in screen(watched)
    with lnp.Tracker(path, 1) as tracker:
        for step in range(2):
            model = lnp_numpy.LinearModel(weight=np.full((2, 1), 0.1 * step))
            tracker.observe(step, model, (np.eye(2), np.ones((2, 1))))
            assert re.search(rf"run +{step} ", screen(watched))
    (tmp_path / "other.jsonl").write_text("hello\nworld\n")
    told = screen(watched, 300)
    assert "holds no measurements" in told
    assert re.search(r"run +1 ", told)
    path.unlink()
    assert not re.search(r"run +1 ", screen(watched))


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_what_fits_is_shown_whole_and_files_that_cannot_be_read_do_not_crush_it(tmp_path, width):
    names = ("width-16", "a-rather-long-name-of-a-run-of-some-sweep-seed-17", "[bold]")
    for index, name in enumerate(names):
        history(0.5**index, 10**index).to_jsonl(tmp_path / f"{name}.jsonl")
    (tmp_path / "broken.jsonl").write_text("hello\nworld\n")
    (tmp_path / "empty.jsonl").touch()
    shown = screen(Watched([tmp_path]), width)
    table = shown.splitlines()[1:6]
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in "".join(row for row in table if "a-ra" not in row)
    assert all(re.search(r" 11 .*0\.\d{3}", row) for row in table[2:])
    assert "[bold]" in shown
    assert ("noise scale" in shown, "chi_pos" in table[0]) == (width > 130, width >= 40)
    assert "empty: nothing yet" in shown
