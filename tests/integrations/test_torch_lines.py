"""Quantities over the steps: which numbers the lines, the bands and the marks of a figure stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import pyplot

import lnp.plot
from integrations.drawn_runs import below, edges, legend, marks, means, named, points, run, steps, texts
from lnp.plot import style
from lnp.plot.lines import _draw_line
from lnp.runs.curves import Curve
from lnp.tracking.history import History


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


QUANTITIES = {
    "loss": ("loss", "loss"),
    "chi_loss": ("chi_loss", r"loss scale  $\chi_\mathrm{loss}$"),
    "chi_net": ("chi_net", r"network scale  $\chi_\mathrm{net}$"),
    "chi_pos": ("population/chi_pos", r"spectral position  $\chi_\mathrm{pos}$"),
    "noise_scale": ("population/noise_scale", "gradient noise scale  (samples)"),
}
"""{function: (column, label of the axis)}."""


@pytest.mark.parametrize("name", QUANTITIES)
def test_each_quantity_is_that_of_its_name(name):
    column, label = QUANTITIES[name]
    runs = {"a": run(rows=9), "b": run(1, rows=9)}
    ax = getattr(lnp.plot, name)(runs)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", label)
    assert (ax.get_xscale(), ax.get_yscale()) == ("symlog", "log")
    assert legend(ax) == ["a", "b"]
    assert texts(ax) == []
    for own, history in runs.items():
        assert named(ax, own).get_xdata().tolist() == [1, 4, 7]
        if name != "noise_scale":  # a ratio of means
            assert named(ax, own).get_ydata() == pytest.approx(means(history[column]))


def test_columns_without_a_label_of_their_own_have_their_name():
    assert lnp.plot.curve(steps([1.0, 2.0], "accuracy"), "accuracy").get_ylabel() == "accuracy"


def test_columns_that_there_are_are_told_without_those_of_layers():
    with pytest.raises(KeyError, match="'x' is not a column") as told:
        lnp.plot.curve([run(rows=1), steps([1.0])], "x")
    assert "chi_net_stderr, " in str(told.value)
    assert "layer/" not in str(told.value)
    ax = lnp.plot.curve({"a": steps([1.0], "x"), "b": steps([1.0])}, "x")
    assert points(named(ax, "a")) == [(0, 1)]


def test_lines_have_the_label_and_the_colour_that_are_asked_for():
    ax = pyplot.figure().subplots()
    lnp.plot.curve(run(), "chi_net", ax, label="first", color="red", linestyle=":")
    assert (named(ax, "first").get_color(), named(ax, "first").get_linestyle()) == ("red", ":")
    (dots,) = marks(ax, style.SINGLES)
    assert dots.get_color() == "red"
    lnp.plot.curve({"other": run(), "third": run()}, "chi_net", ax, legend=False)
    assert legend(ax) is None
    assert named(lnp.plot.loss(run()), "run 0").get_color() == style.SINGLE
    assert legend(lnp.plot.loss(run())) is None


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, -1.0, math.nan], "log"), ([-1.0, -2.0], "linear"), ([-1.0, 0.0], "linear"), ([-1.0, math.inf], "linear")],
)
def test_the_axis_is_logarithmic_where_something_is_positive(values, scale):
    ax = pyplot.figure().subplots()
    lnp.plot.curve({"a": steps(values), "b": steps([-1.0, -3.0])}, "value", ax, legend=False)
    assert ax.get_yscale() == scale


def test_a_logarithmic_axis_stays_so():
    ax = pyplot.figure().subplots()
    ax.set_yscale("log")
    lnp.plot.curve(steps([-1.0, -2.0]), "value", ax)
    assert ax.get_yscale() == "log"
    assert [points(mark) for mark in marks(ax, style.OUTSIDE)] == [[(0, 0.02), (1, 0.02)]]


def test_values_that_are_not_finite_are_no_part_of_a_linear_line():
    ax = lnp.plot.curve(steps([-1.0, -math.inf, -2.0]), "value")
    y = named(ax, "run 0").get_ydata()
    assert np.array_equal(y, [-1.0, math.nan, -2.0], equal_nan=True)
    assert marks(ax, style.OUTSIDE) == []


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (59, "o"), (60, "None")])
def test_few_points_are_dots_on_the_line(count, marker):
    ax = pyplot.figure().subplots()
    lnp.plot.curve(steps([1.0] * count), "value", ax)
    assert named(ax, "run 0").get_marker() == marker


def test_the_band_of_a_single_measurement_is_its_error():
    values = {"value_stderr": 0.25}
    ax = lnp.plot.curve(steps([-1.0, -3.0], **values), "value")
    assert edges(marks(ax, style.ERROR)[0]) == {0: (-1.25, -0.75), 1: (-3.25, -2.75)}
    assert below(ax) == ["one standard error"]
    assert marks(lnp.plot.curve(steps([1.0, 2.0]), "value"), style.ERROR) == []


def test_bands_end_below_what_a_logarithmic_axis_shows():
    """At 0.3 of the lowest value; where even the upper end is not above that, there is none."""
    ax = lnp.plot.curve(steps([4.0, 2.0, 3.0, -9.0], value_stderr=3.0), "value")
    (band,) = marks(ax, style.ERROR)
    assert edges(band) == {0: (1.0, 7.0), 1: (0.6, 5.0), 2: (0.6, 6.0)}
    (line,) = (line for line in ax.get_lines() if line.get_label() == "run 0")
    assert band.get_facecolor()[0, :3] == pytest.approx(pyplot.matplotlib.colors.to_rgb(line.get_color()))


def test_values_without_a_place_are_marked_where_they_are():
    rows = [0.1, -0.1, 0.0, math.inf, 0.3]
    ax = lnp.plot.curve(steps(rows), "value")
    (foot,), (top,) = marks(ax, style.OUTSIDE), marks(ax, style.ABOVE)
    assert (points(foot), foot.get_marker()) == ([(1, 0.02), (2, 0.02)], "v")
    assert (points(top), top.get_marker()) == ([(3, 0.98)], "^")
    for mark in (foot, top):
        assert mark.get_transform() == ax.get_xaxis_transform()
        assert not mark.get_clip_on()
        assert mark.get_color() == style.SINGLE
    assert below(ax) == ["at the foot: not above zero", "at the top: not resolved"]


def test_lower_limits_stand_where_they_are():
    rows = [
        {"step": s, "population/rate": rate, "population/rate_stderr": 0.1, "population/gradient_noise": 8.0}
        | {"population/noise_scale": 8 / rate}
        for s, rate in enumerate([1.0, 0.01])
    ]
    ax = lnp.plot.noise_scale({"a": History(rows), "b": History(rows[:1])})
    assert points(named(ax, "a"))[0] == (0, 8)
    (limit,) = marks(ax, style.LIMIT)
    assert (points(limit), limit.get_marker()) == ([(1, pytest.approx(8.01 / 0.21 - 1))], "^")
    assert limit.get_color() == named(ax, "a").get_color()
    assert limit.get_transform() == ax.transData
    assert marks(ax, style.ABOVE) == []


def test_a_limit_that_has_no_place_stands_at_the_top():
    ax = pyplot.figure().subplots()
    step, none = np.arange(4.0), np.full(4, np.inf)
    low = np.array([0.0, 0.5, np.inf, -1.0])
    _draw_line(ax, Curve(step, none, none, step, step, low, none), True, True, {"color": "red"})
    assert [points(mark) for mark in marks(ax, style.LIMIT)] == [[(1, 0.5)]]
    assert [points(mark) for mark in marks(ax, style.ABOVE)] == [[(0, 0.98), (2, 0.98), (3, 0.98)]]


def test_windows_are_bars_and_single_measurements_dots():
    history = run(rows=9)
    ax = lnp.plot.chi_net(history)
    (dots,), (bars,) = marks(ax, style.SINGLES), marks(ax, style.WINDOW)
    assert points(dots) == list(zip(range(9), history["chi_net"].tolist(), strict=True))
    assert (dots.get_marker(), dots.get_linestyle()) == (".", "None")
    expected = [[[first, y], [first + 2, y]] for first, y in zip((0, 3, 6), means(history["chi_net"]), strict=True)]
    assert np.array(bars.get_segments()) == pytest.approx(np.array(expected))
    several = lnp.plot.chi_net([history, history])
    assert marks(several, style.SINGLES) == marks(several, style.WINDOW) == []


def test_single_measurements_without_a_logarithm_have_no_dot():
    rows = [{"step": s, "value": v, "window": s // 2} for s, v in enumerate([1.0, -0.5, 3.0, 4.0, 7.0])]
    ax = lnp.plot.curve(History(rows), "value")
    (dots,), (bars,) = marks(ax, style.SINGLES), marks(ax, style.WINDOW)
    assert np.array_equal(dots.get_ydata(), [1.0, math.nan, 3.0, 4.0, 7.0], equal_nan=True)
    assert np.array(bars.get_segments())[:, :, 1].tolist() == [[0.25] * 2, [3.5] * 2]  # the last window is one row


def test_negative_measurements_have_dots_on_a_linear_axis():
    rows = [{"step": s, "value": -1.0 - s, "window": s // 2} for s in range(4)]
    ax = lnp.plot.curve(History(rows), "value")
    (dots,), (bars,) = marks(ax, style.SINGLES), marks(ax, style.WINDOW)
    assert dots.get_ydata().tolist() == [-1, -2, -3, -4]
    assert np.array(bars.get_segments())[:, :, 1].tolist() == [[-1.5] * 2, [-3.5] * 2]


@pytest.mark.parametrize("rows", [300, 4000, 4001])
def test_dots_are_left_out_where_they_would_be_all_that_is_seen(rows):
    """Of a history of that many rows a window is a stretch of steps."""
    ax = lnp.plot.curve(steps([1.0] * rows), "value")
    assert len(marks(ax, style.SINGLES)) == (rows == 4000)
    assert marks(ax, style.WINDOW) == []


def test_windows_of_the_noise_scale_have_no_dots():
    """Single measurements of it are ratios that scatter over decades."""
    ax = lnp.plot.noise_scale(run())
    assert marks(ax, style.SINGLES) == []
    assert len(marks(ax, style.WINDOW)) == 1


@pytest.mark.parametrize(
    ("values", "limits"),
    [([4.0, 4.0], (2, 8)), ([-4.0, -4.0], (-5, -3)), ([0.0, 0.0], (-1, 1)), ([math.nan], (0, 1))],
)
def test_a_quantity_that_does_not_change_has_room_around_it(values, limits):
    assert lnp.plot.curve(steps(values), "value").get_ylim() == pytest.approx(limits)


@pytest.mark.parametrize(
    ("values", "limits"), [([4.0, 4.4], (2, 8)), ([-4.4, -4.0], (-5, -3)), ([1e-12, 3e-12], (5e-13, 6e-12))]
)
def test_a_quantity_that_changes_has_no_more_room_than_others(values, limits):
    low, high = lnp.plot.curve(steps(values), "value").get_ylim()
    assert limits[0] < low < values[0] < values[1] < high < limits[1]


@pytest.mark.parametrize(
    "options", [{"color": "red", "linestyle": "--"}, {"color": style.FROZEN}, {"color": style.FROZEN, "linestyle": ":"}]
)
def test_lines_that_are_dashed_or_red_alone_are_not_told_to_be_frozen(options):
    ax = lnp.plot.curve(steps([1.0, 2.0]), "value", pyplot.figure().subplots(), **options)
    assert marks(ax, style.FROZEN_LINE) == []


def test_frozen_runs_are_told_below_the_figure():
    runs = {"free": steps([1.0, 2.0]), "frozen": steps([1.0, 2.0], frozen=True)}
    ax = lnp.plot.curve(runs, "value")
    assert marks(ax, style.FROZEN_LINE) == [named(ax, "frozen")]
    assert below(ax) == ["frozen features"]
    ax = lnp.plot.over_seeds({name: [of] for name, of in runs.items()}, "value", pyplot.figure().subplots())
    assert marks(ax, style.FROZEN_LINE) == [named(ax, "frozen")]
