"""What all figures share: ticks that can be read, colours that tell runs apart, and what is said of the marks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import colormaps, pyplot
from matplotlib.colors import to_hex

from integrations.drawn_runs import below, legend, steps
from lnp.plot import style
from lnp.tracking.history import History


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def test_figures_are_of_their_size_and_marked_as_ones_own():
    ax = style.axes()
    assert ax.figure.get_size_inches().tolist() == [6, 4]
    assert style.axes(height=7.0).figure.get_size_inches().tolist() == [6, 7]
    assert ax.figure.get_gid() == style.OWN
    assert style.axes(ax) is ax
    assert ax.figure.number in pyplot.get_fignums()  # what a notebook shows


def along(first, last):
    """Axes of something from one step to another."""
    ax = pyplot.figure().subplots()
    ax.plot([first, last], [1, 2])
    style.step_axis(ax)
    return ax


DECADES = [
    ((0, 0), [0, 1]),
    ((0, 1), [0, 1]),
    ((0, 9), [0, 1]),
    ((0, 10), [0, 1, 10]),
    ((2, 59), [0, 1, 10]),
    ((0, 1e5), [0, 1, 10, 1e2, 1e3, 1e4, 1e5]),
    ((0, 1e6), [0, 1, 1e2, 1e4, 1e6]),
    ((0, 5e7), [0, 1, 1e2, 1e4, 1e6]),
    ((0, 1e12), [0, 1, 1e3, 1e6, 1e9, 1e12]),
    ((10, 1000), [0, 1, 10, 100, 1000]),
    ((5, 5), [0, 1]),
]


@pytest.mark.parametrize(("ends", "ticks"), DECADES)
def test_steps_have_a_tick_at_powers_of_ten(ends, ticks):
    ax = along(*ends)
    assert ax.get_xscale() == "symlog"
    assert ax.xaxis.get_major_locator().locs.tolist() == ticks
    decades = int(math.log10(max(ends[1], 1)))
    minor = [m * 10**k for k in range(decades + 1) for m in range(2, 10)]
    assert ax.xaxis.get_minor_locator().locs.tolist() == minor
    assert ax.get_xlim()[0] == (pytest.approx(10 / 1.15) if ends == (10, 1000) else -0.15)
    assert ax.xaxis.get_major_formatter()(1000).startswith("$")


def test_steps_that_begin_late_have_ticks_between_powers_of_ten():
    ax = along(300, 4000)
    assert ax.get_xlim()[0] == pytest.approx(300 / 1.15)
    assert ax.xaxis.get_major_locator().locs.tolist() == [m * 10**k for k in range(4) for m in (1, 2, 5)]
    assert [ax.xaxis.get_major_formatter()(step) for step in (500, 2000)] == ["500", "2,000"]
    assert along(3, 4).get_xlim()[0] == pytest.approx(3 / 1.15)
    assert along(3, 4).xaxis.get_major_formatter()(5) == "5"
    assert along(2, 4).get_xlim()[0] == -0.15


def test_steps_of_nothing_have_ticks():
    ax = pyplot.figure().subplots()
    style.step_axis(ax)
    assert ax.xaxis.get_major_locator().locs.tolist() == [0, 1]


def values(low, high, scale="log"):
    ax = pyplot.figure().subplots()
    ax.set(yscale=scale, ylim=(low, high))
    before = ax.yaxis.get_major_locator()
    style.log_ticks(ax.yaxis)
    shown = [tick for tick in ax.get_yticks() if min(low, high) <= tick <= max(low, high)]
    return ax, before, shown


def test_logarithmic_axes_of_few_decades_have_ticks_that_can_be_read():
    ax, _, shown = values(1.0, 20.0)
    assert shown == pytest.approx([1, 2, 5, 10, 20])
    assert [ax.yaxis.get_major_formatter()(tick) for tick in (0.25, 5.0)] == ["0.25", "5"]
    assert ax.yaxis.get_minor_formatter()(3.0) == ""
    assert values(20.0, 1.0)[2] == pytest.approx([1, 2, 5, 10, 20])
    assert values(100.0, 2000.0)[2] == pytest.approx([100, 200, 500, 1000, 2000])
    for high in (3.0, 4.9):  # less than 0.7 decades
        _, _, shown = values(1.0, high)
        assert 3 <= len(shown) <= 5
        assert np.diff(shown) == pytest.approx([shown[1] - shown[0]] * (len(shown) - 1))
    assert values(1.0, 5.1)[2] == pytest.approx([1, 2, 5])


def test_other_axes_keep_their_ticks():
    ax, before, _ = values(1.0, 32.0)  # more than 1.5 decades
    assert ax.yaxis.get_major_locator() is before
    assert ax.yaxis.get_minor_formatter()(3.0) == ""
    assert values(1.0, 31.0)[0].yaxis.get_major_locator() is not before
    ax, before, _ = values(1.0, 20.0, "linear")
    assert ax.yaxis.get_major_locator() is before


def sized(*sizes):
    return {str(i): History([{"step": 0} | ({"parameters": size} if size else {})]) for i, size in enumerate(sizes)}


def viridis(*places):
    return [colormaps["viridis"](0.85 * (1 - place)) for place in places]


def test_larger_runs_are_darker():
    assert style.colours(sized(10)) == [style.SINGLE]
    assert style.colours(sized(100, 10, 1000)) == viridis(0.5, 0, 1)
    assert style.colours(sized(10, 1000, 10)) == viridis(0, 1, 0)


def test_runs_of_one_size_have_distinct_colours():
    for sizes in ([10, 10], [10, None], [None, None]):
        assert style.colours(sized(*sizes)) == [colormaps["tab10"](i) for i in range(2)]
    assert len({to_hex(colour) for colour in style.colours(sized(*[10] * 10))}) == 10
    assert style.colours(sized(*[10] * 10))[9] == colormaps["tab10"](9)
    many = style.colours(sized(*[10] * 11))
    assert len({to_hex(colour) for colour in many}) == 11
    assert many[0] == colormaps["turbo"](0.05)


def test_frozen_runs_take_no_colour_of_the_others():
    frozen = {"color": style.FROZEN, "linestyle": "--"}
    runs = sized(10, 1000)
    assert style.lines(runs | {"frozen": steps([1.0], frozen=True)}) == [{"color": one} for one in viridis(0, 1)] + [
        frozen
    ]
    assert style.lines({"a": steps([1.0], frozen=True)}) == [frozen]


@pytest.mark.parametrize(("entries", "shown"), [(1, False), (2, True), (4, True), (5, True)])
def test_legends_of_many_stand_beside_the_axes(entries, shown):
    ax = pyplot.figure().subplots()
    for index in range(5):
        ax.plot([index], label=str(index))
    style.legend(ax, entries)
    assert legend(ax) == ([str(index) for index in range(5)] if shown else None)
    if shown:
        assert not ax.get_legend().get_frame_on()
        ax.figure.canvas.draw()
        box = ax.get_legend().get_window_extent().transformed(ax.transAxes.inverted())
        assert (box.x0 >= 1) == (entries > 4)
        assert abs(box.y0 + box.y1 - 1) < 0.1 or entries <= 4


def test_nothing_has_no_legend():
    ax = pyplot.figure().subplots()
    style.legend(ax, 3)
    assert legend(ax) is None


def test_marks_are_explained_once_as_they_are_drawn():
    figure = pyplot.figure()
    ax = figure.subplots()
    style.explain(figure)
    assert below(ax) == []
    for meaning in style.MARKS:
        ax.plot([1], gid=meaning)
    ax.plot([1], gid="another")
    style.explain(figure)
    style.explain(figure)
    assert below(ax) == list(style.MARKS)
    (said,) = figure.legends
    shown = dict(zip(below(ax), said.legend_handles, strict=True))
    markers = {meaning: one.get_marker() for meaning, one in shown.items() if one.get_marker() != "None"}
    assert markers == {
        "single measurement": ".", "end of the run": "o", "lower limit": "^", "upper limit": "v",
        "at the foot: not above zero": "v", "at the top: not resolved": "^",
    }  # fmt: skip
    assert [shown["frozen features"].get_linestyle(), shown["frozen features"].get_color()] == ["--", style.FROZEN]


def test_tidy_axes_are_explained_in_figures_of_ones_own_alone():
    for own in (True, False):
        ax = style.axes() if own else pyplot.figure().subplots()
        ax.plot([1], gid=style.END)
        style.tidy(ax, "x", "y")
        assert below(ax) == (["end of the run"] if own else [])
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")
        assert [ax.spines[side].get_visible() for side in ("top", "right", "left", "bottom")] == [False] * 2 + [
            True
        ] * 2


def test_values_have_a_place_on_an_axis_or_none():
    values = np.array([2.0, 0.0, -1.0, math.inf, -math.inf, math.nan])
    assert np.array_equal(style.positive(values), [2.0, *[math.nan] * 5], equal_nan=True)
    assert np.array_equal(style.finite(values), [2.0, 0.0, -1.0, *[math.nan] * 3], equal_nan=True)
