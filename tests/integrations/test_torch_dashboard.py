"""The page of runs: which quantity stands in which panel, and what its table and its lines of text say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color

import lnp.plot
from integrations.drawn_runs import legend, means, named, run, texts
from lnp.plot.dashboard import _draw_lines, _draw_one, _draw_several, _draw_table, story
from lnp.tracking.history import History

NAMES = ["measurements", "trained parameters", "loss", "spectral reach", "reached at step"]
NAMES += ["loss scale", "network scale", "position", "measuring took", "notes"]
"""What is said of a run."""


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def panels(page):
    """{(row, column): axes} of a page, without what stands inside of them."""
    places = {ax: ax.get_subplotspec() for ax in page.axes if ax.get_subplotspec() is not None}
    return {(place.rowspan.start, place.colspan.start): ax for ax, place in places.items()}


def words(ax):
    """What a panel shows, in words: its quantity, or against what."""
    if not ax.axison:
        return "text"
    return ax.get_ylabel().partition("  ")[0] + (" / " + ax.get_xlabel() if ax.get_xlabel() != "training step" else "")


def contents(page):
    """What each panel shows, in the order of reading."""
    found = panels(page)
    return [words(found[place]) for place in sorted(found)]


FACTORS = ["loss", "loss scale", "network scale", "spectral position"]
AGAINST = "spectral position / loss"


def test_the_page_of_one_run_has_its_layers_and_its_numbers():
    history = run()
    page = lnp.plot.dashboard({"mine": history})
    noise = "gradient noise scale"
    assert contents(page) == [*FACTORS, noise, AGAINST, "layer", "", "text"]
    assert page.get_suptitle() == "mine"
    axes = [panels(page)[place] for place in sorted(panels(page))]
    assert [ax.get_title(loc="left") for ax in axes] == [*"abcdefgh", ""]
    assert [legend(ax) for ax in axes] == [None] * 3 + [["of the batch", "of the population"]] + [None] * 5
    for ax, column in zip(axes, ("loss", "chi_loss", "chi_net"), strict=False):
        assert named(ax, "mine").get_ydata() == pytest.approx(means(history[column]))
    assert [texts(ax) for ax in axes[6:8]] == [[r"$\chi_\mathrm{pos}$ of the layer"], ["share of the rate"]]
    assert [len(ax.get_yticks()) for ax in axes[6:8]] == [3, 0]
    assert texts(axes[8])[::2] == NAMES[:-1]  # it has no notes
    assert page.get_size_inches() * 25.4 == pytest.approx([297, 210], abs=1)  # A4, in mm


def test_the_lines_of_text_stand_below_each_other_each_beside_its_name():
    ax = pyplot.figure().subplots()
    _draw_lines(ax, [(name, "value") for name in NAMES])
    assert texts(ax) == [part for name in NAMES for part in (name, "value")]
    assert not ax.axison
    places = np.array([text.get_position() for text in ax.texts])
    assert len(set(places[::2, 0])) == len(set(places[1::2, 0])) == 1
    assert places[1, 0] > places[0, 0] == 0.0
    assert np.array_equal(places[::2, 1], places[1::2, 1])
    assert places[0, 1] == 1.0
    assert np.diff(places[::2, 1]).max() < 0
    assert places[-1, 1] > 0.0
    assert all(text.get_transform() == ax.transAxes for text in ax.texts)


def test_the_page_of_a_run_that_knows_less_shows_its_rate_and_its_time():
    page = lnp.plot.dashboard(run(layers=False, population=False), title="A title")
    assert contents(page) == [*FACTORS, "rate", AGAINST, "rate", "seconds per measurement", "text"]
    assert page.get_suptitle() == "A title"
    assert [legend(ax) for ax in page.axes] == [None] * 9


def test_a_run_without_seconds_has_an_empty_panel_for_them():
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in run(layers=False).rows()]
    axes = pyplot.figure().subplots(1, 3)
    _draw_one(History(rows), axes)
    assert [words(ax) for ax in axes] == ["rate", "text", "text"]
    assert texts(axes[1]) == []


def test_the_page_of_several_runs_has_their_reach_and_a_table():
    runs = {"a": run(size=1000), "b": run(1, size=10, population=False), "c": run(2, size=100)}
    page = lnp.plot.dashboard(runs)
    reaches = "spectral reach / trained parameters"
    assert contents(page) == [*FACTORS, "gradient noise scale", AGAINST, reaches, "text", "text"]
    assert page.get_suptitle() == "3 runs"
    axes = [panels(page)[place] for place in sorted(panels(page))]
    assert [ax.get_title(loc="left") for ax in axes] == [*"abcdefg", "", ""]
    assert [legend(ax) for ax in axes] == [None] * 9
    assert texts(axes[6]) == ["a", "b", "c"]
    header, *lines = np.reshape(texts(axes[7]), (4, 5)).tolist()
    assert header == ["run", "size", "loss", "reach", "at step"]
    for line, (name, history) in zip(lines, runs.items(), strict=True):
        found = history.reach()
        assert line[:3] == [name, f"{history['parameters'][-1]:,}", "0.0339"]  # the mean of 2/58, 2/59 and 2/60
        assert line[4] == f"{found.step:,.0f}"
        shown = line[3].removeprefix("below ").partition(" ± ")[0]
        assert float(shown) == pytest.approx(found.chi_pos if found.resolved else found.limit, rel=0.06)
    assert texts(axes[8]) == []


def test_the_rows_of_the_table_have_the_colours_of_the_runs():
    """Also where one has no loss, and where one's name begins as no label in a legend does."""
    runs = {"a": run(rows=6, size=1000), "nothing": run(rows=6, size=None, loss=math.nan), "_b": run(rows=6, size=100)}
    axes = pyplot.figure().subplots(1, 3)
    _draw_several(runs, axes)
    assert texts(axes[1])[::5] == ["run", "a", "nothing", "_b"]
    assert words(axes[0]) == "spectral reach / trained parameters"  # of those that have a size
    factors = lnp.plot.chi_loss(runs)
    drawn = [named(factors, name).get_color() for name in runs]
    assert [same_color(mark.get_color(), one) for mark, one in zip(axes[1].get_lines(), drawn, strict=True)] == [
        True
    ] * 3


def test_the_table_is_aligned_and_each_mark_stands_in_its_row():
    ax = pyplot.figure().subplots()
    cells = [(name, "1", "2", "3", "4") for name in "abc"]
    _draw_table(ax, ("run", "size", "loss", "reach", "at step"), cells, ["red", "green", "blue"])
    places = np.reshape([text.get_position() for text in ax.texts], (4, 5, 2))
    assert np.diff(places[0, :, 0]).min() > 0
    assert (places[:, :, 0] == places[0, :, 0]).all()
    assert (places[:, :, 1] == places[:, :1, 1]).all()
    heights = places[:, 0, 1]
    gap = heights[1] - heights[2]
    assert heights[0] == 1.0
    assert gap == pytest.approx(heights[2] - heights[3])
    assert heights[0] - heights[1] >= gap > 0.05
    sides = np.reshape([text.get_ha() for text in ax.texts], (4, 5)).tolist()
    assert sides == [["left", *["right"] * 4]] * 4  # numbers end at one place, whatever their digits
    assert [mark.get_color() for mark in ax.get_lines()] == ["red", "green", "blue"]
    for mark, height in zip(ax.get_lines(), heights[1:], strict=True):
        assert height > mark.get_ydata()[0] == mark.get_ydata()[1] > height - gap
        assert mark.get_xdata()[0] < mark.get_xdata()[1] < places[0, 0, 0]
    shown = (*ax.texts, *ax.get_lines())
    assert all(part.get_transform() == ax.transAxes and not part.get_in_layout() for part in shown)
    assert all(not mark.get_clip_on() for mark in ax.get_lines())


def test_runs_without_sizes_are_compared_by_their_rates():
    runs = {"a": run(size=None, population=False), "b": run(1, size=None, population=False)}
    page = lnp.plot.dashboard(runs, title="")
    assert contents(page) == [*FACTORS, "rate", AGAINST, "rate", "text", "text"]
    assert [legend(ax) for ax in page.axes] == [None] * 9
    assert texts(panels(page)[2, 1])[5:7] == ["a", "-"]
    assert page.get_suptitle() == ""


@pytest.mark.parametrize("count", [6, 7])
def test_reaches_have_names_where_they_are_few(count):
    axes = pyplot.figure().subplots(1, 3)
    _draw_several({f"run {i}": run(i, rows=6, size=10 + i) for i in range(count)}, axes)
    assert len(texts(axes[0])) == (6 if count == 6 else 0)


@pytest.mark.parametrize("count", [2, 14, 16])
def test_a_long_table_says_how_many_runs_are_not_in_it(count):
    ax = pyplot.figure().subplots()
    cells = [(f"run {i}", "1", "2", "3", "4") for i in range(count)]
    _draw_table(ax, ("run", "size", "loss", "reach", "at step"), cells, [f"C{i}" for i in range(count)])
    assert texts(ax)[5::5][:14] == [f"run {i}" for i in range(min(count, 14))]
    assert texts(ax)[75:] == (["and 2 more"] if count == 16 else [])
    lowest = [text.get_position()[1] for text in ax.texts]
    assert lowest == sorted(lowest, reverse=True)
    assert lowest[-1] >= 0.0
    assert ax.texts[-1].get_position()[0] == ax.texts[5 if count == 16 else 4 + 5 * count].get_position()[0]


def test_a_run_is_told_in_numbers_and_words():
    rows = [
        {"step": s, "loss": 4 / (1 + s), "chi_loss": 2.0, "chi_net": 3.0 + s, "chi_pos": 0.1, "chi_pos_stderr": 0.01}
        | {"seconds": math.nan if s == 3 else 0.5 if s else 2.0, "parameters": 26122}
        | ({"notes": "one mask; no population values" if s else "one mask"} if s < 2 else {})
        for s in range(30)
    ]
    told = dict(story(History(rows)))
    assert list(told) == NAMES
    assert told["measurements"] == "30, up to step 29"
    assert told["trained parameters"] == "26,122"
    assert told["loss"] == "4 to 0.133"
    reach = History(rows).reach()
    assert told["spectral reach"].startswith("0.1")
    assert told["reached at step"] == f"{reach.step:.0f}"
    assert told["loss scale"] == told["position"] == "within 25% from step 1"
    assert told["network scale"] == "still moving at the end"
    assert told["measuring took"] == "2 s, then 0.5 s each"
    assert told["notes"] == "in the column notes"


def test_what_is_not_known_of_a_run_is_not_told():
    history = History([{"step": 0, "loss": 1.0, "net/chi_pos": 3e-5, "net/chi_pos_stderr": 1e-5, "seconds": math.nan}])
    told = dict(story(history))
    assert list(told) == [*NAMES[:1], *NAMES[2:5], "net position"]
    assert told["net position"] == "3.0e-05 ± 1.0e-05"
    assert (told["spectral reach"], told["reached at step"]) == ("-", "-")
