"""Positions and noise scales over the steps: whose they are, and which levels are marked beside them."""

from __future__ import annotations

import math

import pytest
from matplotlib import pyplot

import lnp.plot
from integrations.drawn_runs import edges, legend, marks, means, named, points, run, steps, texts
from lnp.plot import style
from lnp.tracking.history import History


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


POSITION = r"spectral position  $\chi_\mathrm{pos}$"


def test_one_run_has_the_positions_of_its_batch_and_of_the_population():
    history = run()
    ax = lnp.plot.chi_pos(history)
    batch, population = named(ax, "of the batch"), named(ax, "of the population")
    assert batch.get_ydata() == pytest.approx(means(history["chi_pos"]))
    assert population.get_ydata() == pytest.approx(means(history["population/chi_pos"]))
    assert (batch.get_color(), batch.get_linestyle()) == (style.BATCH, "--")
    assert (population.get_color(), population.get_linestyle()) == (style.SINGLE, "-")
    assert legend(ax) == ["of the batch", "of the population"]
    assert ax.get_ylabel() == POSITION
    assert legend(lnp.plot.chi_pos(history, legend=False)) is None
    ax = lnp.plot.chi_pos(history, label="mine", color="red")
    assert legend(ax) == ["of the batch", "mine"]
    assert named(ax, "mine").get_color() == "red"


def test_positions_of_the_batch_are_all_that_is_shown_where_one_run_has_no_others():
    runs = {"a": run(), "b": run(population=False)}
    ax = lnp.plot.chi_pos(runs)
    assert legend(ax) == ["a", "b"]
    assert ax.get_ylabel() == r"spectral position  $\chi_\mathrm{pos}$ (batch)"
    assert named(ax, "a").get_ydata() == pytest.approx(means(runs["a"]["chi_pos"]))
    assert legend(lnp.plot.chi_pos(runs, legend=False)) is None
    ax = lnp.plot.chi_pos(run(population=False, outputs=10))
    assert points(named(ax, "of the batch"))[0][0] == 1
    assert texts(ax) == ["no preference (batch)"]
    assert legend(ax) is None
    assert texts(lnp.plot.chi_pos([run(population=False, outputs=10)] * 2)) == []


def net(value, **others):
    return run(**{"net/chi_pos": value, "net/chi_pos_stderr": value / 10}, **others)


def test_the_net_position_of_one_run_has_a_colour_and_a_name():
    ax = lnp.plot.chi_pos(net(1e-3))
    line = named(ax, "net, of the fall of the loss")
    assert line.get_ydata().tolist() == pytest.approx([1e-3] * 20)
    assert line.get_color() == style.NET
    assert legend(ax) == ["of the batch", "of the population", "net, of the fall of the loss"]
    assert ax.get_ylabel() == POSITION
    assert legend(lnp.plot.chi_pos(net(1e-3), legend=False)) is None
    assert legend(lnp.plot.chi_pos([net(1e-3)] * 2)) == ["run 0", "run 1"]


def test_a_net_position_that_is_known_at_some_steps_is_shown_there():
    rows = [row if row["step"] < 3 else row | {"net/chi_pos": math.inf} for row in net(1e-3, rows=6).rows()]
    ax = lnp.plot.chi_pos(History(rows), pyplot.figure().subplots())
    assert points(named(ax, "net, of the fall of the loss"))[0] == (1, pytest.approx(1e-3))


def test_the_net_position_stands_beside_the_batchs_where_the_populations_is_not_known():
    ax = lnp.plot.chi_pos(net(1e-3, population=False), label="mine")
    assert legend(ax) == ["mine", "net, of the fall of the loss"]
    assert ax.get_ylabel() == POSITION


@pytest.mark.parametrize(
    ("terms", "shown"), [(0, False), (40, False), (60, True), (600, True), (18_000, True), (22_000, False)]
)
def test_the_position_without_preference_is_marked_where_it_is_near(terms, shown):
    """Up to ten times beyond the limits of the axis, which are 5e-4 and 2e-3 around a position of 1e-3."""
    history = steps([1e-3, 1e-3], "chi_pos", samples=20, outputs=terms / 20)
    ax = lnp.plot.chi_pos(history)
    if not shown:
        assert texts(ax) == []
        return
    (line,) = (line for line in ax.get_lines() if line.get_linestyle() == ":")
    assert points(line) == [(0, pytest.approx(1 / terms)), (1, pytest.approx(1 / terms))]
    (text,) = ax.texts
    assert (text.get_text(), text.xy, text.get_ha()) == ("no preference (batch)", (0, line.get_ydata()[0]), "left")
    assert text.xycoords == ("axes fraction", "data")


def test_the_position_without_preference_needs_samples_and_outputs():
    for known in ({"samples": 60}, {"outputs": 10}, {"samples": math.nan, "outputs": 10}):
        assert texts(lnp.plot.chi_pos(steps([1e-3, 1e-3], "chi_pos", **known))) == []
    changing = [{"step": s, "chi_pos": 1e-3, "samples": 2**s, "outputs": 50 - s} for s in range(5)]
    assert lnp.plot.chi_pos(History(changing)).texts[0].xy[1] == pytest.approx(1 / (16 * 46))  # of the last batch
    assert lnp.plot.chi_pos(steps([1.0], "chi_pos", samples=1, outputs=1)).texts[0].xy[1] == 1


def test_the_batch_stands_beside_the_noise_scale_of_one_run():
    rows = [{"step": s, "population/rate": 1.0, "population/noise_scale": 8.0, "samples": 2**s} for s in range(4)]
    ax = lnp.plot.noise_scale(History(rows))
    (line,) = (line for line in ax.get_lines() if line.get_linestyle() == ":")
    assert line.get_ydata()[0] == 8
    (text,) = ax.texts
    assert (text.get_text(), text.xy, text.get_ha()) == ("batch of 8", (1, 8), "right")
    assert texts(lnp.plot.noise_scale([History(rows)] * 2)) == []


def test_means_over_seeds_have_the_labels_of_the_quantity_and_of_the_runs():
    runs = {"a": [run(0, rows=9), run(1, rows=9)], "b": [run(2, rows=9)]}
    ax = pyplot.figure().subplots()
    assert lnp.plot.over_seeds(runs, "chi_net", ax) is ax
    assert legend(ax) == ["a", "b"]
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", r"network scale  $\chi_\mathrm{net}$")
    assert legend(lnp.plot.over_seeds(runs, "loss", legend=False)) is None


def test_bands_of_seeds_are_errors_of_their_mean():
    ax = lnp.plot.over_seeds({"a": [steps([-1.0, -2.0]), steps([-3.0, -2.0])]}, "value")
    assert points(named(ax, "a")) == [(0, -2), (1, -2)]
    (band,) = marks(ax, style.ERROR)
    assert edges(band) == {0: (-3, -1), 1: (-2, -2)}
    assert legend(ax) is None


@pytest.mark.parametrize(
    ("values", "scale"), [([math.inf, -1.0], "linear"), ([0.0, 0.0], "linear"), ([1.0, -2.0], "log")]
)
def test_the_axis_of_means_over_seeds_is_logarithmic_where_something_is_positive(values, scale):
    runs = {"a": [steps(values)], "b": [steps([-1.0, -2.0])]}
    assert lnp.plot.over_seeds(runs, "value").get_yscale() == scale
