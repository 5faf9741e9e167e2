"""Runs against each other, and power laws through them: what stands where, and whose it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color
from matplotlib.lines import CARETDOWNBASE

import lnp.plot
from integrations.drawn_runs import below, edges, legend, marks, means, named, points, run, texts
from lnp.plot import laws, style
from lnp.runs.power_law import PowerLaw
from lnp.tracking.history import History


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def threes(values):
    """Means of three neighbours."""
    return np.convolve(values, np.full(3, 1 / 3), "valid")


REACH = r"spectral reach  (lowest $\chi_\mathrm{pos}$)"
COMPUTE = "compute  $6ND$  (floating-point operations)"


def test_the_position_stands_over_the_loss_and_the_run_ends_in_a_dot():
    runs = {"a": run(), "b": run(population=False)}
    ax = lnp.plot.position_against_loss(runs)
    for name, column in (("a", "population/chi_pos"), ("b", "chi_pos")):
        line = named(ax, name)
        assert line.get_xdata() == pytest.approx(threes(means(runs[name]["loss"])))
        assert line.get_ydata() == pytest.approx(threes(means(runs[name][column])))
    ends = marks(ax, style.END)
    assert [points(end) for end in ends] == [points(named(ax, name))[-1:] for name in runs]
    assert [end.get_color() for end in ends] == [named(ax, name).get_color() for name in runs]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss", r"spectral position  $\chi_\mathrm{pos}$")
    assert (ax.get_xscale(), ax.get_yscale(), ax.xaxis_inverted()) == ("log", "log", True)
    assert legend(ax) == ["a", "b"]
    assert below(ax) == ["end of the run"]
    assert legend(lnp.plot.position_against_loss(runs, legend=False)) is None


def rows(positions, loss=lambda step: 1 / (1 + step), **others):
    return History({"step": s, "loss": loss(s), "chi_pos": v, **others} for s, v in enumerate(positions))


def test_positions_and_losses_without_a_logarithm_are_no_part_of_the_line():
    ax = lnp.plot.position_against_loss({"a": rows([0.5] * 5 + [-9.0]), "b": rows([0.5] * 5, loss=lambda s: 2.0 - s)})
    assert np.array_equal(np.isnan(named(ax, "a").get_ydata()), [False] * 3 + [True])
    assert np.array_equal(np.isnan(named(ax, "b").get_xdata()), [False, True, True])
    assert [points(end) for end in marks(ax, style.END)] == [
        points(named(ax, "a"))[2:3],
        points(named(ax, "b"))[:1],
    ]


@pytest.mark.parametrize("nothing", [rows([-1.0] * 3), rows([math.nan] * 3), rows([0.5] * 3, loss=lambda s: math.nan)])
def test_a_run_without_positions_or_losses_has_no_line(nothing):
    ax = lnp.plot.position_against_loss({"nothing": nothing})
    assert ax.get_lines()[:] == []
    assert ax.get_xscale() == "linear"
    ax = lnp.plot.position_against_loss({"nothing": nothing, "b": rows([0.5] * 3)})
    assert ax.get_lines()[0].get_label() == "b"


def test_a_fit_has_a_place_in_the_legend():
    history = rows([1 / (1 + s) ** 2 for s in range(9)])
    for names in (["a"], ["a", "b"]):
        ax = lnp.plot.position_against_loss(dict.fromkeys(names, history), fit=True)
        assert [name.partition(",")[0] for name in legend(ax)] == [*names, "power law"]
        assert "exponent 2" in legend(ax)[-1]
        assert (ax.get_xscale(), ax.xaxis_inverted()) == ("log", True)
    assert legend(lnp.plot.position_against_loss({"a": history})) is None
    assert legend(lnp.plot.position_against_loss({"a": history}, fit=True, legend=False)) is None


def law(ax):
    (line,) = [line for line in ax.get_lines() if line.get_linestyle() == "-."]
    return line


def test_a_fit_takes_the_windows_that_have_a_place_on_the_axes():
    """Those without a position, or with one that is neither above zero nor has an error, tell nothing."""
    good = [(1 + s) ** -2.0 for s in range(5)]
    expected = law(lnp.plot.position_against_loss(rows(good), fit=True))
    ax = lnp.plot.position_against_loss(rows([*good, math.nan, -3.0, 0.0]), fit=True)
    assert np.array(points(law(ax))) == pytest.approx(np.array(points(expected)))
    bad = [{"step": 5 + i, "loss": loss, "chi_pos": 7.0} for i, loss in enumerate((-1.0, 0.0, math.inf))]
    bad.append({"step": 9, "loss": 0.5, "chi_pos": -1.0, "chi_pos_stderr": 0.0})
    ax = lnp.plot.position_against_loss(History([*rows(good).rows(), *bad]), fit=True)
    assert np.array(points(law(ax))) == pytest.approx(np.array(points(expected)))
    assert law(ax).get_color() == "black"


def curved(errors):
    """A run whose positions are no power law of the loss, with these errors in units of their own."""
    values = [3.0, 0.25, 0.11, 0.0625]
    rows = [{"step": s, "loss": 1 / (1 + s), "chi_pos": v} for s, v in enumerate(values)]
    return [row | {"chi_pos_stderr": error * value} for row, value, error in zip(rows, values, errors, strict=True)]


def test_upper_limits_bend_a_fit():
    free = curved([0.1, 0.2, 0.3, 0.4])
    free[3] |= {"chi_pos": -1e-3, "chi_pos_stderr": 1e-3}
    bent = law(lnp.plot.position_against_loss(History(free), fit=True))
    reaches = [lnp.Reach(row["chi_pos"], row["chi_pos_stderr"], 0.0, 1) for row in free]
    expected = lnp.power_law([row["loss"] for row in free], reaches)
    assert bent.get_ydata()[0] == pytest.approx(expected.predict(1 / 4)[0])


def test_a_limit_counts_in_a_fit_only_where_all_windows_have_errors():
    free = curved([0.1, 0.2, 0.0, 0.4])
    free[3] |= {"chi_pos": -1e-3, "chi_pos_stderr": 1e-3}
    drawn = law(lnp.plot.position_against_loss(History(free), fit=True))
    losses, values = ([row[name] for row in free[:3]] for name in ("loss", "chi_pos"))
    assert drawn.get_ydata()[-1] == pytest.approx(lnp.power_law(losses, values).predict(1)[0])


@pytest.mark.parametrize("last", [0.4, 0.0, math.inf, math.nan])
def test_errors_count_in_a_fit_only_where_all_windows_have_one(last):
    errors = [0.1, 0.2, 0.3, last]
    rows = curved(errors)
    drawn = law(lnp.plot.position_against_loss(History(rows), fit=True))
    losses, values = ([row[name] for row in rows] for name in ("loss", "chi_pos"))
    known = [error * value for error, value in zip(errors, values, strict=True)] if last == 0.4 else None
    assert drawn.get_ydata()[-1] == pytest.approx(lnp.power_law(losses, values, known).predict(1)[0])


def test_a_column_stands_over_the_compute():
    runs = {str(n): run(n, size=n, tokens_per_step=32) for n in (10, 1000)}
    ax = lnp.plot.against_compute(runs)
    for name, history in runs.items():
        steps = threes(means(history["step"]))
        assert named(ax, name).get_xdata() == pytest.approx(6 * int(name) * 32 * steps)
        assert named(ax, name).get_ydata() == pytest.approx(threes(means(history["population/chi_pos"])))
    assert (ax.get_xlabel(), ax.get_ylabel()) == (COMPUTE, r"spectral position  $\chi_\mathrm{pos}$")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert legend(ax) == ["10", "1000"]
    assert legend(lnp.plot.against_compute(runs, legend=False)) is None
    assert legend(lnp.plot.against_compute(runs["10"], fit=True))[1].startswith("power law")
    assert legend(lnp.plot.against_compute(runs["10"], fit=True, legend=False)) is None
    assert lnp.plot.against_compute(runs["10"], "accuracy").get_ylabel() == "accuracy"
    first = History([{"step": 0, "population/chi_pos": 0.5, "parameters": 3, "tokens_per_step": 2}])
    assert np.isnan(named(lnp.plot.against_compute(first), "run 0").get_xdata()).all()
    two = History([row | {"step": step} for step, row in enumerate(first.rows() * 2)])
    assert named(lnp.plot.against_compute(two), "run 0").get_xdata() == pytest.approx([6 * 3 * 2 * 0.5])


def test_runs_without_what_an_axis_needs_are_told_what_to_say():
    message = r"No run says how many parameters it has. Expected Tracker\(..., tags=\{'parameters': n\}\)"
    with pytest.raises(ValueError, match=message):
        lnp.plot.reach_against_size(run(rows=3, size=None))
    message = "has and how many tokens a step takes.*'parameters': n, 'tokens_per_step': t}"
    for draw in (lnp.plot.reach_against_compute, lnp.plot.against_compute):
        with pytest.raises(ValueError, match=message):
            draw(run(rows=3))
    some = {"a": run(rows=3, size=None), "b": run(rows=3)}
    assert len(lnp.plot.reach_against_size(some).containers) == 1


def reaches(ax):
    """[(x, y, lowest, highest, marker)] of the points with their errors."""
    found = []
    for container in ax.containers:
        ((x, y),) = points(container.lines[0])
        ((_, low), (_, high)) = container.lines[2][0].get_segments()[0]
        found.append((x, y, low, high, container.lines[0].get_marker()))
    return found


def test_reaches_have_their_errors_their_names_and_their_colours():
    runs = {"a": run(size=10), "b": run(1, size=1000)}
    ax = lnp.plot.reach_against_size(runs)
    for name, history, found in zip(runs, runs.values(), reaches(ax), strict=True):
        reach = history.reach()
        expected = (history["parameters"][0], reach.chi_pos, reach.chi_pos - reach.stderr, reach.chi_pos + reach.stderr)
        assert found == (*map(pytest.approx, expected), "o")
        (text,) = [text for text in ax.texts if text.get_text() == name]
        assert text.xy == (found[0], found[1])
    colours = [container.lines[0].get_color() for container in ax.containers]
    assert all(same_color(one, line["color"]) for one, line in zip(colours, style.lines(runs), strict=True))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trained parameters", REACH)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlim()[0] < 10 < 1000 < ax.get_xlim()[1]
    assert legend(ax) is None
    assert texts(lnp.plot.reach_against_size(runs, names=False)) == []
    computed = {name: run(size=10, tokens_per_step=2) for name in "a"}
    ax = lnp.plot.reach_against_compute(computed)
    assert (ax.get_xlabel(), ax.get_ylabel(), texts(ax)) == (COMPUTE, REACH, ["a"])
    assert texts(lnp.plot.reach_against_compute(computed, names=False)) == []


def test_one_size_has_room_around_it():
    for runs in ({"a": run(size=10)}, {"a": run(size=10), "b": run(1, size=10)}):
        ax = lnp.plot.reach_against_size(runs)
        assert ax.get_xlim() == (5, 20)
    low, high = lnp.plot.reach_against_size({"a": run(size=10), "b": run(size=11)}).get_xlim()
    assert 9 < low < 10
    assert 11 < high < 12


def test_frozen_runs_are_hollow_and_no_part_of_the_fit():
    runs = {str(n): run(size=n, **{"population/chi_pos": 1 / n}) for n in (10, 1000)}
    runs["frozen"] = run(size=100, frozen=True, **{"population/chi_pos": 0.5})
    ax = lnp.plot.reach_against_size(runs, fit=True)
    faces = [container.lines[0].get_markerfacecolor() for container in ax.containers]
    assert [face == "white" for face in faces] == [False, False, True]
    assert law(ax).get_ydata()[[0, -1]] == pytest.approx([0.1, 0.001])
    assert law(ax).get_xdata()[[0, -1]] == pytest.approx([10, 1000])
    assert legend(ax) == [law(ax).get_label()]


def test_runs_whose_reach_has_no_place_on_the_axis_are_left_out():
    nothing = {"zero": run(size=10, **{"population/chi_pos": 0.0}), "no parameters": run(size=None, parameters=0)}
    nothing["none"] = run(size=10, chi_pos=math.nan, **{"population/chi_pos": math.nan})
    nothing["size"] = run(size=-3)
    ax = lnp.plot.reach_against_size(nothing)
    assert (len(ax.containers), texts(ax), ax.get_yscale()) == (0, [], "linear")
    ax = lnp.plot.reach_against_size(nothing | {"a": run(size=1)})
    assert (len(ax.containers), texts(ax)) == (1, ["a"])


def test_the_law_through_points_has_a_band_of_its_error():
    sizes, values, errors = [10, 100, 1000], [0.1, 0.012, 0.001], [0.01, 0.001, 0.0001]
    ax = lnp.plot.power_law(sizes, values, errors, label="widths", color="red")
    fitted = lnp.power_law(sizes, values, errors)
    for x, y in points(law(ax)):
        assert y == pytest.approx(fitted.predict(x)[0])
    assert law(ax).get_xdata()[[0, -1]] == pytest.approx([10, 1000])
    assert len(law(ax).get_xdata()) >= 30
    (band,) = marks(ax, style.ERROR)
    found = edges(band)
    for x in law(ax).get_xdata()[[0, 30, -1]]:
        value, error = fitted.predict(x)
        assert found[x] == pytest.approx((value - error, value + error))
    assert legend(ax)[0] == law(ax).get_label()
    exponent, fit = legend(ax)[0].splitlines()
    assert exponent == f"power law, exponent {lnp.results.rounding.with_error(fitted.exponent, fitted.exponent_stderr)}"
    assert fit == f"$\\chi^2$ per degree {fitted.chi_square_per_degree:.3g}"
    assert legend(ax)[1:] == ["widths"]
    assert ax.containers[0].get_label() == "widths"
    assert [found[:4] for found in reaches(ax)] == [
        (x, y, pytest.approx(y - e), pytest.approx(y + e)) for x, y, e in zip(sizes, values, errors, strict=True)
    ]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale()) == ("size", "", "log", "log")
    assert law(ax).get_color() == "red"


def test_a_law_of_points_without_errors_says_its_exponent_alone():
    ax = lnp.plot.power_law([10, 100, 1000], [0.1, 0.012, 0.001])
    assert len(legend(ax)[0].splitlines()) == 1
    assert [found[2:4] for found in reaches(ax)] == [(y, y) for y in (0.1, 0.012, 0.001)]
    assert law(ax).get_color() == style.SINGLE
    assert legend(lnp.plot.power_law([10, 100], [0.1, 0.01], legend=False)) is None
    assert marks(lnp.plot.power_law([10, 100], [0.1, 0.01]), style.ERROR) == []  # two points tell no error
    assert law(lnp.plot.power_law([10, 100], [0.1, 0.01], legend=False)).get_label().startswith("_")


def test_bands_end_where_they_would_be_all_that_is_seen():
    """Nine tenths below the law, and wherever the error is ten times the value."""
    flat = draw_law(PowerLaw(0.0, 2.0, 0.0, 0.0, np.diag([81.0, 100.0 / np.log(10) ** 2]), 0.0, 0), 1.0, 10.0)
    assert min(edges(flat)) == 1.0
    assert edges(flat)[1.0] == pytest.approx((0.2, 20.0))
    assert 0.4 < np.log10(max(edges(flat))) < 0.45  # where 81 + (10 log10 size)^2 is 100


def draw_law(law, low, high):
    """The band of a law."""
    ax = pyplot.figure().subplots()
    laws.draw_law(ax, law, low, high, color="red")
    (band,) = marks(ax, style.ERROR)
    return band


def test_limits_are_triangles_with_an_arrow_and_errors_are_bars():
    ax = pyplot.figure().subplots()
    limit = lnp.Reach(0.01, 0.04, 1.0, 5)
    points_of = [lnp.Reach(1.0, 0.1, 1.0, 5), lnp.Reach(0.5, 0.1, 1.0, 5), lnp.Reach(0.2, 0.05, 1.0, 5), limit]
    assert lnp.plot.power_law([1, 10, 100, 1000], points_of, ax=ax) is ax
    found = reaches(ax)
    assert [one[4] for one in found] == ["o", "o", "o", "v"]
    assert found[3][:2] == (1000, pytest.approx(0.09))
    assert 0 < found[3][2] < found[3][1] == found[3][3]
    arrows = [any(cap.get_marker() == CARETDOWNBASE for cap in container.lines[1]) for container in ax.containers]
    assert arrows == [False, False, False, True]
    assert [artist.get_xdata().tolist() for artist in marks(ax, style.UPPER)] == [[1000]]
    assert lnp.plot.power_law([1, 10, 100], [1.0, 0.5, 0.2], [0.1, 0.1, 1.0]).containers[2].lines[0].get_marker() == "v"


def test_a_fit_of_limits_alone_without_errors_is_refused():
    free = curved([0.1, 0.2, 0.0, 0.4])
    for row in free[1:]:
        row |= {"chi_pos": -1e-3, "chi_pos_stderr": 1e-3}
    free[0]["chi_pos_stderr"] = 0.0
    with pytest.raises(ValueError, match="fit=True received 1 points to fit"):
        lnp.plot.position_against_loss(History(free), fit=True)
