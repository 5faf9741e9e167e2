"""The heat map of layers: which colour is which layer's at which step, and what stands beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import LogNorm, Normalize

import lnp.plot
from integrations.drawn_runs import means, run, texts
from lnp.plot.layers import shorten
from lnp.tracking.history import History


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def table(ax):
    """The numbers that the colours stand for, (layers, steps)."""
    (mesh,) = ax.collections
    return np.ma.filled(mesh.get_array().astype(float), math.nan)


def boundaries(ax):
    """Where the cells begin and end along the steps."""
    (mesh,) = ax.collections
    return mesh.get_coordinates()[0, :, 0].tolist()


def history(values, value="rate", **others):
    """A run with a row for each step of {step: {layer: value}}."""
    return History(
        {"step": step, **{f"layer/{name}/{value}": v for name, v in of.items()}, **others}
        for step, of in values.items()
    )


@pytest.mark.parametrize("value", ["chi_pos", "chi_net", "rate"])
def test_values_are_colours_on_a_logarithmic_scale(value):
    ax = lnp.plot.layers(run(), value)
    expected = means(run()[f"layer/0/{value}"])
    assert table(ax) == pytest.approx(np.array([expected, 2 * expected, 3 * expected]))
    (mesh,) = ax.collections
    assert isinstance(mesh.norm, LogNorm)
    assert mesh.get_clim() == pytest.approx((expected.min(), 3 * expected.max()))
    words = {"chi_pos": r"$\chi_\mathrm{pos}$ of the layer", "chi_net": r"$\chi_\mathrm{net}$ of the layer"}
    assert texts(ax) == [words.get(value, "rate of the layer")]


@pytest.mark.parametrize(
    ("value", "words"), [("rate_share", "share of the rate"), ("chi_net_share", r"share of $\chi_\mathrm{net}$")]
)
def test_shares_are_colours_from_zero_on(value, words):
    ax = lnp.plot.layers(run(), value)
    assert table(ax) == pytest.approx(np.array([[1 / 6] * 20, [2 / 6] * 20, [3 / 6] * 20]))
    (mesh,) = ax.collections
    assert type(mesh.norm) is Normalize
    assert mesh.get_clim() == (0, pytest.approx(0.5))
    assert texts(ax) == [words]


def test_rows_go_down_in_the_networks_order_each_with_its_name():
    ax = lnp.plot.layers(history({0: {"a.first": 1.0, "a.second": 2.0}, 4: {"a.first": 3.0, "a.second": 4.0}}), "rate")
    assert ax.yaxis_inverted()
    assert ax.get_yticks().tolist() == [0.5, 1.5]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("training step", "layer", "symlog")
    (mesh,) = ax.collections
    assert mesh.get_coordinates()[:, 0, 1].tolist() == [0, 1, 2]
    assert [ax.spines[side].get_visible() for side in ("top", "right", "left", "bottom")] == [False] * 3 + [True]
    ax = lnp.plot.layers(run(), names=False)
    assert (ax.get_yticks().tolist(), ax.get_ylabel()) == ([], "")
    assert texts(ax) == [r"$\chi_\mathrm{pos}$ of the layer"]  # what is shown unless another value is asked for


def test_cells_end_halfway_between_steps():
    one = {"a": 1.0}
    ax = lnp.plot.layers(history({10: one, 20: one, 40: one}), "rate")
    assert boundaries(ax) == [5, 15, 30, 50]
    assert ax.get_xlim() == (5, 50)
    assert boundaries(lnp.plot.layers(history({0: one, 2: one}), "rate")) == [-0.15, 1, 3]
    assert boundaries(lnp.plot.layers(history({7: one}), "rate")) == [6.5, 7.5]


def test_the_scale_has_its_two_ends_written_out():
    ax = lnp.plot.layers(history({0: {"a": 0.012345, "b": 2.0}, 1: {"a": 123.4, "b": 1.0}}), "rate")
    (bar,) = ax.child_axes
    assert [text.get_text() for text in bar.get_xticklabels()] == ["0.012", "1.2e+02"]
    assert bar.get_xticks() == pytest.approx([0.012345, 123.4])
    assert bar.xaxis.get_ticks_position() == "top"
    assert len(bar.xaxis.get_minorticklocs()) == 0


@pytest.mark.parametrize(
    ("value", "limits"), [(3.0, (1.5, 6.0)), (-1.0, (0.1, 1.0)), (math.nan, (0.1, 1.0)), (math.inf, (0.1, 1.0))]
)
def test_one_value_has_room_on_the_scale(value, limits):
    ax = lnp.plot.layers(history({0: {"a": value, "b": value}, 1: {"a": 3.0 if value == 3 else -2.0}}), "rate")
    (mesh,) = ax.collections
    assert mesh.get_clim() == limits


def test_values_without_a_logarithm_have_no_colour_and_no_share():
    values = {0: {"a": 1.0, "b": -1.0}, 1: {"a": -3.0, "b": 2.0}, 2: {"a": 1.0, "b": 3.0}}
    nan = math.nan
    assert np.array_equal(table(lnp.plot.layers(history(values), "rate")), [[1, nan, 1], [nan, 2, 3]], equal_nan=True)
    shares = table(lnp.plot.layers(history(values), "rate_share"))
    assert np.array_equal(shares, [[nan, nan, 0.25], [nan, nan, 0.75]], equal_nan=True)


def test_layers_that_were_measured_at_fewer_steps_are_interpolated():
    ax = lnp.plot.layers(history({0: {"a": 1.0, "b": 1.0}, 1: {"b": 2.0}, 2: {"a": 5.0, "b": 3.0}}), "rate")
    assert table(ax).tolist() == [[1, 3, 5], [1, 2, 3]]
    ax = lnp.plot.layers(history({0: {"a": 1.0, "b": math.nan}, 1: {"a": 2.0, "b": math.nan}}), "rate")
    assert np.array_equal(table(ax), [[1, 2], [math.nan] * 2], equal_nan=True)


def test_names_are_left_out_where_they_would_run_into_each_other():
    many = history({s: {str(i): 1.0 + i for i in range(100)} for s in range(2)})
    figure = pyplot.figure(figsize=(4, 4))
    ax = lnp.plot.layers(many, "rate", figure.add_axes((0.1, 0.1, 0.8, 0.5)))  # two inches: 13 names of 0.145
    assert ax.get_yticks().tolist() == [i + 0.5 for i in range(0, 100, 8)]
    assert [text.get_text() for text in ax.get_yticklabels()] == [str(i) for i in range(0, 100, 8)]
    flat = lnp.plot.layers(many, "rate", figure.add_axes((0.1, 0.9, 0.8, 0.01)))
    assert [text.get_text() for text in flat.get_yticklabels()] == ["0"]


@pytest.mark.parametrize(("count", "least", "most"), [(2, 4, 4), (45, 45 * 0.145 / 0.75, 10)])
def test_figures_of_many_layers_are_as_high_as_their_names(count, least, most):
    ax = lnp.plot.layers(history({0: {str(i): 1.0 for i in range(count)}}), "rate", names=False)
    assert least <= ax.figure.get_figheight() <= most


def test_names_are_short_and_differ():
    assert shorten(["model.a.x", "model.a.y", "model.b"]) == ["a.x", "a.y", "b"]
    assert shorten(["model.a", "model.a.y"]) == ["a", "a.y"]
    assert shorten(["one.two"]) == ["one.two"]
    assert shorten(["x" * 20, "x" * 21]) == ["x" * 20, "…" + "x" * 19]
    assert shorten(["a.b.c", "a.b.d", "e.b.f"]) == ["a.b.c", "a.b.d", "e.b.f"]


def test_what_has_no_values_has_no_axes():
    given = pyplot.figure().subplots()
    ax = lnp.plot.layers(history({0: {"a": 1.0}}), "chi_net", given)
    assert ax is given
    assert not ax.axison
    assert texts(ax) == ["no values: " + r"$\chi_\mathrm{net}$ of the layer"]
    assert (ax.texts[0].get_position(), ax.texts[0].get_ha(), ax.texts[0].get_va()) == ((0.5, 0.5), "center", "center")
    assert ax.texts[0].get_transform() == ax.transAxes
