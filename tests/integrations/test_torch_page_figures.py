"""The figures of the page for a browser: which numbers are drawn where, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plotly.colors import sample_colorscale

import lnp
from integrations.drawn_runs import means, run, steps
from lnp.runs.curves import NET_POSITION, Curve
from lnp.views import figures


def sized(*sizes):
    return {str(i): run(rows=3, size=size, layers=False) for i, size in enumerate(sizes)}


def test_larger_runs_are_redder_and_runs_of_one_size_distinct():
    scale = sample_colorscale(list(figures.BY_SIZE), [0.0, 0.5, 1.0])
    assert list(figures.colours(sized(100, 10, 1000)).values()) == [scale[1], scale[0], scale[2]]
    assert list(figures.colours(sized(10, 1000, 10)).values()) == [scale[0], scale[2], scale[0]]
    for sizes in ([10], [10, 10], [10, None]):
        assert list(figures.colours(sized(*sizes)).values()) == list(figures.QUALITATIVE[: len(sizes)])
    assert len(set(figures.colours(sized(*[10] * 10)).values())) == 10
    assert figures.colours(sized(*[10] * 11))["10"] == figures.QUALITATIVE[0]
    frozen = {"f": run(rows=3, size=7, frozen=True)}
    assert figures.colours(frozen | sized(10)) == {"f": figures.GREY, "0": figures.QUALITATIVE[0]}
    assert figures.colours(frozen) == {"f": figures.GREY}


def along(runs, column="loss", **options):
    return figures.along(runs, dict.fromkeys(runs, "red"), "A title", lambda run: column, **options)


def curves(figure):
    """The traces that are no bands."""
    return [trace for trace in figure.data if trace.fill is None]


def test_a_column_stands_over_the_steps():
    runs = {"a": run(rows=9), "b": run(rows=9, frozen=True), "none": steps([1.0])}
    figure = along(runs, "chi_net")
    assert (figure.layout.title.text, figure.layout.xaxis.title.text) == ("A title", "training step")
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type, figure.layout.showlegend) == ("log", "log", False)
    assert [trace.meta for trace in curves(figure)] == ["a", "b"]
    for trace, dash in zip(curves(figure), ("solid", "dot"), strict=True):
        assert list(trace.x) == [1, 4, 7]
        assert trace.y == pytest.approx(means(runs["a"]["chi_net"]))
        assert (trace.line.dash, trace.line.color, trace.marker.color) == (dash, "red", "red")
    assert trace.hovertemplate == "%{meta}<br>%{text}<br>%{y:.4g}<extra></extra>"
    error = 1 / 3**0.5  # of windows of three neighbours
    assert list(trace.text) == [f"step {step}<br>± {error:.1f}" for step in (1, 4, 7)]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert [band.meta for band in bands] == ["a", "b"]
    middle = means(runs["a"]["chi_net"])
    assert list(bands[0].x) == [1, 4, 7, 7, 4, 1]
    assert bands[0].y == pytest.approx([*(middle + error), *(middle - error)[::-1]])
    assert (bands[0].hoverinfo, bands[0].mode, bands[0].fillcolor, bands[0].line.width) == ("skip", "lines", "red", 0)
    assert along({"a": steps([1.0])}) is None


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(0, [1, 2, 5]), (9, [1, 2, 5]), (10, [1, 2, 5, 10, 20, 50]), (1000, [1, 10, 100, 1000]), (999, [1, 2, 5, 10, 20,
    50, 100, 200, 500])],
)  # fmt: skip
def test_steps_have_ticks_with_a_place_for_the_first(last, ticks):
    rows = [{"step": step, "loss": 1.0} for step in sorted({0, last})]
    axis = along({"short": lnp.History(rows[:1]), "a": lnp.History(rows)}).layout.xaxis
    assert list(axis.tickvals) == [0.5, *ticks]
    assert list(axis.ticktext) == ["0", *(f"{tick:,}" for tick in ticks)]


def test_the_net_position_is_dashed_and_has_no_band():
    runs = {"a": run(rows=9, **{NET_POSITION: 1e-3, "net/chi_pos_stderr": 1e-4}), "b": run(rows=9)}
    figure = along(runs, "chi_pos", dashed=NET_POSITION)
    assert [(trace.meta, trace.line.dash) for trace in curves(figure)] == [
        ("a", "solid"),
        ("a", "dash"),
        ("b", "solid"),
    ]
    assert curves(figure)[1].y == pytest.approx([1e-3] * 3)
    assert len(figure.data) == 5
    assert [trace.meta for trace in curves(along(runs, "chi_pos"))] == ["a", "b"]


def test_few_points_are_marked_and_single_measurements_say_their_error_where_they_have_one():
    for count, mode in ((40, "lines+markers"), (41, "lines")):
        assert curves(along({"a": steps([1.0] * count, "loss")}))[0].mode == mode
    (trace,) = curves(along({"a": steps([1.0, 2.0], "loss")}))
    assert list(trace.text) == ["step 0", "step 1"]
    assert curves(along({"a": steps([1.0] * 42, "loss")}))[0].x[0] == 0.5
    late = lnp.History([{"step": 12_000, "loss": 1.0, "loss_stderr": 0.25}])
    figure = along({"a": late})
    assert [trace.fill for trace in figure.data] == [None]  # of one point no band
    assert list(figure.data[0].text) == ["step 12,000<br>± 0.2"]
    assert along({"a": steps([-1.0, math.nan], "loss")}) is None


def test_errors_of_zero_are_not_told():
    (trace,) = curves(along({"a": steps([1.0, 2.0], "loss", loss_stderr=0.0)}))
    assert list(trace.text) == ["step 0", "step 1"]


def test_lines_say_their_numbers_and_bands_nothing():
    band, line = along({"<a>": steps([1.0, 2.0], "loss", loss_stderr=0.1)}).data
    assert (band.fill, band.hoverinfo, band.hovertemplate) == ("toself", "skip", None)
    assert (line.hoverinfo, line.hovertemplate) == (None, "%{meta}<br>%{text}<br>%{y:.4g}<extra></extra>")
    assert band.meta == line.meta == "&lt;a&gt;"


def test_limits_say_that_they_are_limits():
    found = Curve(
        *(np.array(part, dtype=float) for part in zip(*[(1200, math.inf, math.nan, 0, 0, 0.5, 9)] * 2, strict=True))
    )
    figure = figures._figure("title", "x")
    figures._draw(figure, "run", found, "red")
    (limits,) = figure.data
    assert (list(limits.y), limits.mode, limits.marker.symbol) == ([0.5, 0.5], "markers", "triangle-up")
    assert list(limits.text) == ["step 1,200<br>above"] * 2
    figure = figures._figure("title", "x")
    nowhere = [(1, math.inf, 0, 0, 0, -1, 9), (2, 3, 0, 0, 0, 3, 3), (3, math.inf, 0, 0, 0, 0, 9)]
    figures._draw(figure, "run", Curve(*(np.array(part, dtype=float) for part in zip(*nowhere, strict=True))), "red")
    assert [trace.mode for trace in figure.data] == ["lines+markers"]


def threes(values):
    return np.convolve(values, np.full(3, 1 / 3), "valid")


def test_the_position_stands_over_the_loss_and_ends_in_a_dot():
    runs = {"a": run(), "b": run(population=False), "none": steps([math.nan], "chi_pos"), "loss": steps([1.0], "loss")}
    figure = figures.against_loss(runs, dict.fromkeys(runs, "red"))
    assert [trace.meta for trace in figure.data] == ["a", "b"]
    for trace, column in zip(figure.data, ("population/chi_pos", "chi_pos"), strict=True):
        assert trace.x == pytest.approx(threes(means(runs[trace.meta]["loss"])))
        assert trace.y == pytest.approx(threes(means(runs[trace.meta][column])))
        assert [size > 0 for size in trace.marker.size] == [False] * 17 + [True]
        assert trace.text[-1] == "step 55"
        assert (trace.mode, trace.line.dash) == ("lines+markers", "solid")
    assert figure.layout.xaxis.autorange == "reversed"
    assert (figure.layout.title.text, figure.layout.xaxis.title.text) == ("spectral position against loss", "loss")
    assert figures.against_loss({"none": runs["none"]}, {"none": "red"}) is None
    rows = [{"step": s, "loss": 1.0, "chi_pos": v} for s, v in enumerate([0.5, 0.5, 0.5, -9.0])]
    (trace,) = figures.against_loss({"a": lnp.History(rows)}, {"a": "red"}).data
    assert [size > 0 for size in trace.marker.size] == [True, False]
    rows = [{"step": s, "loss": 1.0 - s, "chi_pos": 0.5} for s in range(4)]
    (trace,) = figures.against_loss({"a": lnp.History(rows)}, {"a": "red"}).data
    assert [size > 0 for size in trace.marker.size] == [False, False]


def test_reaches_stand_over_the_size_with_their_errors_and_limits_point_down():
    unresolved = {"population/chi_pos": 1e-5, "population/chi_pos_stderr": 1e-3}
    runs = {"a": run(size=10), "b": run(size=1000, **unresolved), "no size": run(size=None), "negative": run(size=-1)}
    runs |= {"nothing": run(size=5, **{"population/chi_pos": 0.0}), "zero": run(size=None, parameters=0)}
    figure = figures.against_size(runs, {name: f"colour of {name}"[-3:] for name in runs} | {"a": "red", "b": "blue"})
    resolved, limit = figure.data
    reach = runs["a"].reach()
    assert (list(resolved.x), list(resolved.y)) == ([10], [reach.chi_pos])
    assert (list(resolved.error_y.array), resolved.error_y.color) == ([reach.stderr], "red")
    assert resolved.text[0] == f"± {str(reach).partition(' ± ')[2]}"
    assert (resolved.marker.symbol, resolved.mode) == ("circle", "markers")
    assert (list(limit.x), list(limit.y)) == ([1000], [runs["b"].reach().limit])
    assert (limit.marker.symbol, list(limit.text), limit.error_y.array) == ("triangle-down", ["upper limit"], None)
    assert figure.layout.xaxis.title.text == "trained parameters"
    assert figures.against_size({"no size": runs["no size"]}, {"no size": "red"}) is None
    assert list(figures.against_size({"one": run(size=1)}, {"one": "red"}).data[0].x) == [1]


def test_layers_are_shares_of_the_whole_rate_from_top_to_bottom():
    rows = [{"step": 1000 * s, "rate": 4.0 * s, "layer/b.x/rate": 1.0, "layer/a/rate": 3.0} for s in range(3)]
    figure = figures.by_layer(lnp.History(rows))
    (mesh,) = figure.data
    assert np.array_equal(mesh.z, [[math.inf, 0.25, 0.125], [math.inf, 0.75, 0.375]])
    assert (list(mesh.x), list(mesh.y)) == (["0", "1,000", "2,000"], ["b.x", "a"])
    axes = figure.layout.xaxis, figure.layout.yaxis
    assert [axis.type for axis in axes] == ["category"] * 2
    assert (axes[1].autorange, axes[1].nticks, axes[1].automargin) == ("reversed", 2, True)
    assert mesh.colorbar.tickformat == ".0%"
    names = {f"layer/{name}/rate": 1.0 for name in ("m.a<b>", "m.b", "m")}
    assert list(figures.by_layer(lnp.History([{"step": 0, "rate": 1.0, **names}])).data[0].y) == [
        "a&lt;b&gt;",
        "b",
        "m",
    ]
    assert figures.by_layer(run(layers=False)) is None
    many = {f"layer/{i}/rate": 1.0 for i in range(100)}
    heights = [figures.by_layer(lnp.History([{"step": 0, "rate": 1.0, **of}])).layout.height for of in (names, many)]
    assert heights[0] == along({"a": run()}).layout.height
    assert heights[1] > 100 * 12  # a line of text for each


TITLES = ["loss", "loss scale", "network scale", "spectral position", "spectral position against loss"]
SIZES, LAYERS = "spectral reach against size", "share of each layer in the rate"
NOISE, NET = "gradient noise scale (samples)", "fall of the loss per step"


def both():
    """Two runs of few measurements, of which one knows more."""
    return {"a": run(rows=6, **{"net/rate_per_step": 1.0, NET_POSITION: 1e-3}), "b": run(1, rows=6, population=False)}


def test_all_that_one_run_has_is_shown_in_order():
    drawn = figures.all_of({"a": both()["a"]}, {"a": "red"})
    assert [figure.layout.title.text for figure, _ in drawn] == [*TITLES, NOISE, NET, LAYERS]
    assert drawn[-1][1] == "Of the speed at which the loss falls."


def test_all_that_several_runs_have_is_shown_in_order_with_what_its_marks_mean():
    runs = both()
    drawn = figures.all_of(runs, {"a": "red", "b": "blue"})
    assert [figure.layout.title.text for figure, _ in drawn] == [*TITLES, SIZES, NOISE, NET]
    columns = ["loss", "chi_loss", "chi_net", "population/chi_pos", None, None, None, "net/rate_per_step"]
    for (figure, _), column in zip(drawn, columns, strict=True):
        if column is not None:
            assert curves(figure)[0].y == pytest.approx(means(runs["a"][column]))
    assert [trace.line.dash for trace in curves(drawn[3][0])] == ["solid", "dash", "solid"]
    assert curves(drawn[3][0])[2].y == pytest.approx(means(runs["b"]["chi_pos"]))
    captions = [text for _, text in drawn]
    assert captions[:3] == ["Bands: one standard error."] * 3 == [captions[7]] * 3
    assert captions[3].startswith("Bands: one standard error. The population's position where it is known")
    assert captions[4] == "Training goes from right to left, to the dot."
    assert captions[5] == "Triangles that point down are upper limits."
    assert captions[6] == "Bands: one standard error. Triangles: above that."


def test_dotted_lines_are_said_to_be_frozen():
    runs = {"f": run(rows=3, frozen=True, layers=False), "a": run(rows=3, layers=False)}
    assert figures.all_of(runs, dict.fromkeys(runs, "red"))[0][1] == (
        "Bands: one standard error. Dotted: frozen features."
    )
