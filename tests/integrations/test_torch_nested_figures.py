"""Positions over the batch size: those of the batches, those that are expected, and the population's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import pyplot

import lnp.plot
from integrations.drawn_runs import legend, means, named, points, run
from lnp.batches.nested import NestedBatches
from lnp.plot import style


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def batches(sizes, positions, errors, population=None):
    """Nested batches of which the largest has the population's values: (chi_pos, stderr)."""
    values = {"loss": 1.0, "rate": 1.0, "chi_loss": 2.0, "chi_net": 5.0, "chi_net_stderr": 0.0, "loss_terms": 1}
    values |= {"probes": 1, "degrees_of_freedom": 9.0, "layers": None, "outputs": 1, "estimator": "exact"}
    if population is not None:
        population = lnp.Population(3.0, population[0], 4.0, 0.1, population[1], 3.0, 5.0, 12.0)
    found = []
    for size, position, error in zip(sizes, positions, errors, strict=True):
        own = population if size == sizes[-1] else None
        measured = {"samples": size, "chi_pos": position, "chi_pos_stderr": error, "population": own}
        found.append(lnp.Decomposition(**values, **measured))
    return NestedBatches(tuple(found))


def test_each_batch_has_a_point_with_its_error():
    ax = pyplot.figure().subplots()
    assert lnp.plot.nested_batches(batches([8, 16, 64], [0.5, 0.25, -0.1], [0.1, math.nan, 0.1]), ax) is ax
    (container,) = ax.containers
    x, y = container.lines[0].get_data()
    assert list(x) == [8, 16, 64]
    assert np.array_equal(y, [0.5, 0.25, math.nan], equal_nan=True)
    bars = container.lines[2][0].get_segments()[:2]
    assert [bar[:, 1].tolist() for bar in bars] == [[0.4, 0.6], [0.25, 0.25]]
    assert (container.get_label(), container.lines[0].get_color()) == ("of the batch", style.BATCH)
    assert legend(ax) == ["of the batch"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("samples in the batch", r"spectral position  $\chi_\mathrm{pos}$")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xticks().tolist() == [8, 16, 64]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["8", "16", "64"]
    assert len(ax.xaxis.get_minorticklocs()) == 0


@pytest.mark.parametrize("count", [10, 11])
def test_many_sizes_have_the_ticks_of_any_axis(count):
    ax = lnp.plot.nested_batches(batches([2**k for k in range(count)], [0.5] * count, [0.1] * count))
    assert (ax.get_xticks().tolist() == [2**k for k in range(count)]) == (count == 10)


def test_the_population_is_a_line_with_a_band_and_what_it_lets_expect_is_dashed():
    ax = lnp.plot.nested_batches(batches([8, 16, 64], [0.5, 0.25, 0.1], [0.0] * 3, (0.3, 0.1)))
    assert sorted(legend(ax)) == ["expected", "of the batch", "of the population"]
    expected = named(ax, "expected")
    assert expected.get_linestyle() == "--"
    assert expected.get_color() == style.BATCH
    assert expected.get_xdata()[[0, -1]] == pytest.approx([8, 64])
    assert len(expected.get_xdata()) >= 30
    for x, y in points(expected):
        assert y == pytest.approx((3 + 12 / x) / (2 * 5))
    population = named(ax, "of the population")
    assert (population.get_ydata()[0], population.get_color()) == (0.3, style.SINGLE)
    (band,) = ax.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize(("value", "limit"), [(0.2, 0.4), (0.1, 0.3), (-0.5, 0.2)])
def test_a_population_within_two_errors_of_zero_is_an_upper_limit(value, limit):
    ax = lnp.plot.nested_batches(batches([4, 5, 9], [0.5, 0.3, 0.25], [0.0] * 3, (value, 0.1)))
    line = named(ax, "of the population, below")
    assert (line.get_ydata()[0], line.get_linestyle()) == (pytest.approx(limit), ":")
    assert line.get_color() == style.SINGLE
    (mark,) = [one for one in ax.get_lines() if one.get_marker() == "v"]
    assert points(mark) == [(pytest.approx(6), pytest.approx(limit))]
    assert mark.get_color() == style.SINGLE
    assert len(ax.patches) == 0


def test_a_population_without_an_error_is_not_drawn():
    ax = lnp.plot.nested_batches(batches([4, 9], [0.5, 0.25], [0.0] * 2, (0.3, math.nan)))
    assert sorted(legend(ax)) == ["expected", "of the batch"]


def test_larger_batches_are_darker_and_the_population_is_in_colour():
    floor = {f"nested/{size}/chi_pos": 1 / size for size in (16, 8)} | {"nested/8/rate": 1.0, "nested/8/chi_net": 1.0}
    history = run(**floor)
    ax = lnp.plot.nested_sizes(history)
    names = ["8 samples", "16 samples", "32, the whole batch", "of the population"]
    assert legend(ax) == names
    shades = [float(named(ax, name).get_color()) for name in names[:3]]
    assert shades == pytest.approx([0.75, 0.425, 0.1])
    assert named(ax, names[3]).get_color() == style.SINGLE
    assert named(ax, names[2]).get_ydata() == pytest.approx(means(history["chi_pos"]))
    assert named(ax, names[3]).get_ydata() == pytest.approx(means(history["population/chi_pos"]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", r"spectral position  $\chi_\mathrm{pos}$")


def test_a_whole_batch_of_unknown_size_is_named_so():
    rows = [{"step": s, "chi_pos": 0.5, "nested/8/chi_pos": 0.7} for s in range(3)]
    ax = pyplot.figure().subplots()
    assert lnp.plot.nested_sizes(lnp.History(rows), ax) is ax
    assert legend(ax) == ["8 samples", "whole batch"]
    growing = lnp.History([row | {"samples": 10 + row["step"]} for row in rows])
    assert legend(lnp.plot.nested_sizes(growing))[-1] == "12, the whole batch"
    with pytest.raises(ValueError, match="received 0 runs"):
        lnp.plot.nested_sizes([])
