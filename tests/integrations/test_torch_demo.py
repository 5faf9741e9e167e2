"""The demo's table, last lines and figure hold what the runs hold. Here because this session has the libraries."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from rich.console import Console

import lnp
from lnp.demo import Settings, figure, run, screen, summary
from lnp.tracking.history import History

REACHES = {"4 units": (0.002, 0.0001), "8 units": (0.0001, 0.0002), "8 frozen": (0.02, 0.003)}
"""Of which the second is lost in noise: below 0.0005."""


def history(network, size, seed=0):
    """A run of two measurements."""
    own = {"network": network, "width": int(network.split()[0]), "frozen": "frozen" in network, "seed": seed}
    rows = [
        {"step": step, "loss": 2.0 + seed, "chi_loss": 0.5, "chi_net": 30.0 / (1 + step), "chi_pos": 0.003}
        | {"population/chi_pos": 0.004, "parameters": size}
        for step in (0, 1)
    ]
    return History(row | own for row in rows)


LADDER = {
    "4 units": [history("4 units", 100)],
    "8 units": [history("8 units", 200)],
    "8 frozen": [history("8 frozen", 90)],
}


def reach(runs):
    """In the place of what the runs' positions say."""
    return lnp.Reach(*REACHES[runs[0]["network"][0]], 1.0, 5)


@pytest.fixture(autouse=True)
def _reaches(monkeypatch):
    monkeypatch.setattr(summary, "reach", reach)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The four panels of the figure, of which the file takes most of the time."""
    monkeypatch.setattr(figure, "reach", reach)
    monkeypatch.setattr(Figure, "savefig", lambda *given, **options: None)
    figure.draw(LADDER, tmp_path / "reach.png")
    yield pyplot.gcf().axes
    pyplot.close("all")


# --- the figure ---------------------------------------------------------------------------------------------------


def test_panels_show_loss_network_scale_and_position_over_the_steps(drawn):
    shown = [ax.get_lines()[0].get_ydata().tolist() for ax in drawn[:3]]
    assert shown == [[2.0, 2.0], [30.0, 15.0], [0.004, 0.004]]
    assert [ax.get_title(loc="left") for ax in drawn] == ["a", "b", "c", "d"]


def test_networks_are_named_once_beside_the_loss(drawn):
    legends = [ax.get_legend() for ax in drawn]
    assert [legend is not None for legend in legends] == [True, False, False, False]
    assert [text.get_text() for text in legends[0].get_texts()] == list(LADDER)


def test_reach_stands_against_size_with_the_name_of_each_network(drawn):
    texts = {text.get_text(): text.xy for text in drawn[3].texts}
    assert texts == {"4 units": (100, 0.002), "8 units": (200, pytest.approx(0.0005)), "8 frozen": (90, 0.02)}
    points = [bars.lines[0] for bars in drawn[3].containers]
    assert [tuple(point.get_xydata()[0]) for point in points] == [texts[network] for network in LADDER]
    assert (drawn[3].get_xscale(), drawn[3].get_yscale()) == ("log", "log")


def test_the_frozen_networks_mark_is_hollow(drawn):
    styles = [bars.lines[0].get_fillstyle() for bars in drawn[3].containers]
    assert styles == ["full", "full", "none"]


def test_the_figure_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(figure, "reach", reach)
    figure.draw(LADDER, tmp_path / "reach.png")
    pyplot.close("all")
    assert (tmp_path / "reach.png").read_bytes().startswith(b"\x89PNG")


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "factor", "cell"),
    [
        ((2.0, 0.5), 10.0, "20±5"),
        ((2.0, 0.05), 1.0, "2.00±0.05"),
        ((0.0, 0.5), 1.0, "0.0±0.5"),
        ((1.23456, 0.0), 1.0, "1.23"),
        ((1.23456, math.nan), 10.0, "12.3"),
    ],
)
def test_a_cell_is_a_value_with_its_error_where_there_is_one(value, factor, cell):
    assert screen._cell(summary.Value(*value), factor) == cell


def test_the_table_has_last_values_and_reaches_in_the_units_of_its_title():
    table = screen._table(LADDER, Settings(steps=7))
    assert table.title.startswith("After 7 steps: ")
    assert [column.header for column in table.columns] == [
        *("hidden", "size", "loss", "chi_loss", "chi_net", "chi_pos\n(batch)", "chi_pos", "reach")
    ]
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("4", "100", "2", "0.5", "15", "3e+03", "4e+03", "2000±100"),
        ("8", "200", "2", "0.5", "15", "3e+03", "4e+03", "< 500"),
        ("8 frozen", "90", "2", "0.5", "15", "3e+03", "4e+03", "20000±3000"),
    ]


def test_values_of_the_table_are_means_over_seeds():
    runs = {"4 units": [history("4 units", 100, seed) for seed in (0, 4)]}
    assert list(screen._table(runs, Settings()).columns[2].cells) == ["4±2"]  # 2 and 6


def test_a_network_has_one_line_of_the_table_however_narrow(capsys):
    Console(width=40).print(screen._table(LADDER, Settings()))
    below = capsys.readouterr().out.rpartition("─")[2]
    assert [line.split()[0] for line in below.splitlines() if line.strip()] == ["4", "8", "8"]


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch, tmp_path, capsys):
    """What is printed, of a demo whose work is done, in a folder with an odd and long name; and the folder."""
    handed = []
    out = tmp_path / f"[red] :bug: {'long ' * 20}name"
    out.mkdir()

    def stand_in(settings, folder, advance):
        handed.append((settings, folder))
        return LADDER

    monkeypatch.setattr(screen, "run", stand_in)
    monkeypatch.setattr(screen, "draw", lambda ladder, path: path.touch())
    monkeypatch.setattr(screen, "time", SimpleNamespace(perf_counter=iter([100.0, 107.0]).__next__))
    screen.show(Settings(widths=(4, 8), frozen=8, steps=10, points=4, seeds=2), out)
    assert handed == [(Settings(framework="torch", widths=(4, 8), frozen=8, steps=10, points=4, seeds=2), out / "runs")]
    return capsys.readouterr().out, out


def test_the_demo_says_how_many_measurements_took_how_long(shown):
    assert "\n30 measurements in 7 s. " in shown[0]  # 2 seeds, 3 networks, steps 0, 1, 2, 5 and 10


def test_files_are_named_as_they_are(shown):
    printed, out = shown
    assert f"Figure: {out / 'reach.png'}, history: {out / 'history.csv'}\n" in printed
    assert f"Run by run: lnp compare {out / 'runs'}\n" in printed
    assert (out / "reach.png").is_file()
    with (out / "history.csv").open(newline="") as file:
        assert [row["network"] for row in csv.DictReader(file)] == [name for name in LADDER for _ in range(2)]


def test_findings_are_printed_below_the_table(shown):
    words = " ".join(shown[0].split())
    assert words.startswith("Digits, shifted and noisy; one hidden layer; 10 steps of gradient descent on 256 images")
    places = [words.index(finding) for finding in summary.findings(LADDER)]
    assert words.index("8 frozen 90 2 0.5 15 3e+03 4e+03 20000±3000") < places[0] < places[1] < places[2]


def test_the_demo_runs_on_pytorch(tmp_path):
    """Measured over the parameters that are trained, of networks that learn."""
    settings = Settings("torch", (2, 3), 3, steps=30, batch=32, measured=64, points=3, seeds=1)
    ladder = run(settings, tmp_path)
    assert {network: runs[0]["parameters"][0] for network, runs in ladder.items()} == {
        "2 units": 64 * 2 + 2 + 2 * 10 + 10,
        "3 units": 64 * 3 + 3 + 3 * 10 + 10,
        "3 frozen": 3 * 10 + 10,
    }
    free, frozen = ladder["3 units"][0], ladder["3 frozen"][0]
    assert free["loss"][0] == frozen["loss"][0]
    assert free["chi_net"][0] > frozen["chi_net"][0]
    assert frozen["loss"][-1] < frozen["loss"][0]
    assert np.array_equal(free["step"], settings.measurements)
