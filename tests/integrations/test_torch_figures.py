"""Figures show what the histories hold, and come out whole for odd ones. Here because this session has Matplotlib."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib import pyplot

import lnp
import lnp.plot
import lnp_numpy
from integrations.drawn_runs import WIDTH, below, run
from lnp.cli import main
from lnp.tracking.history import History


def test_position_without_preference_is_marked():
    """At 1 / (N K) of a single run's batch, and nowhere where that is far from what is shown."""
    ax = lnp.plot.chi_pos(run(outputs=10))
    assert [text.get_text() for text in ax.texts] == ["no preference (batch)"]
    assert ax.texts[0].xy[1] == pytest.approx(1 / 320)
    assert not lnp.plot.chi_pos(run(outputs=10_000)).texts
    assert not lnp.plot.chi_pos(run()).texts
    assert not lnp.plot.chi_pos([run(outputs=10), run(outputs=10)]).texts


def test_net_position_stands_beside_those_of_first_order():
    ax = lnp.plot.chi_pos(run(**{"net/chi_pos": 1e-5, "net/chi_pos_stderr": 1e-6}))
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "net, of the fall of the loss"
    assert ax.get_ylim()[0] < 1e-5
    assert len(lnp.plot.chi_pos(run(**{"net/chi_pos": math.nan})).get_legend().get_texts()) == 2


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


CURVES = ["loss", "chi_loss", "chi_net", "chi_pos", "noise_scale", "position_against_loss"]
ODD = {
    "one row": lambda: run(rows=1),
    "two rows": lambda: run(rows=2),
    "no layers": lambda: run(layers=False),
    "no population": lambda: run(population=False),
    "no size": lambda: run(size=None),
    "loss of zero": lambda: run(loss=0.0, chi_loss=0.0),
    "all nan": lambda: run(loss=math.nan, chi_net=math.nan, chi_pos=math.nan, **{"population/chi_pos": math.nan}),
    "infinite": lambda: run(loss=math.inf, chi_net=math.inf),
    "negative positions": lambda: run(**{"population/chi_pos": -1e-3, "population/rate": -1.0}),
    "constant": lambda: run(**{f"layer/{i}/{n}": 1.0 for i in range(3) for n in ("rate", "chi_net", "chi_pos")}),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("count", [1, 13])
def test_axes_go_in_and_come_out(name, count):
    runs = {f"width {2**i}": run(i, size=10 * 2**i) for i in range(count)}
    ax = pyplot.figure().subplots()
    assert getattr(lnp.plot, name)(runs, ax=ax) is ax
    labels = [line.get_label() for line in ax.get_lines()]
    assert set(runs) <= set(labels) or (name, count) == ("chi_pos", 1)
    assert getattr(lnp.plot, name)(runs) is not ax
    ax.figure.canvas.draw()


@pytest.mark.parametrize("kind", ODD)
def test_the_page_is_drawn_for_odd_runs(kind, tmp_path):
    pages = [{"odd": ODD[kind]()}]
    if kind in ("no size", "loss of zero", "negative positions"):
        pages.append({"odd": ODD[kind](), "plain": run()})
    for runs in pages:
        page = lnp.plot.dashboard(runs)
        page.set_layout_engine("none")  # which takes most of the time
        page.savefig(tmp_path / "page.png", dpi=40)


def test_a_curve_is_the_windows_means():
    history = run()
    line = lnp.plot.chi_net(history).get_lines()[0]
    expected = history["chi_net"].reshape(-1, WIDTH).mean(axis=1)
    assert line.get_ydata() == pytest.approx(expected)
    assert line.get_xdata() == pytest.approx(np.arange(1, 60, WIDTH))


def test_values_without_a_logarithm_are_marked_at_the_foot():
    values = [0.1, 0.1, -0.1, 0.1]
    history = History({"step": i, "chi_pos": v} for i, v in enumerate(values))
    marks = [line for line in lnp.plot.curve(history, "chi_pos").get_lines() if line.get_marker() == "v"]
    assert [line.get_xdata().tolist() for line in marks] == [[2]]


def test_the_heat_map_shows_each_layer():
    ax = lnp.plot.layers(run(), "rate_share")
    (mesh,) = ax.collections
    assert mesh.get_array().shape == (3, 60 // WIDTH)
    assert np.asarray(mesh.get_array())[:, 0] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "2"]


def test_layers_without_a_value_are_said_to_have_none():
    rows = [{"step": 0, "loss": 1.0, "chi_pos": 0.5, "layer/head/chi_net": 1.0}]
    ax = lnp.plot.layers(History(rows), "chi_pos")
    assert [text.get_text() for text in ax.texts] == ["no values: " + r"$\chi_\mathrm{pos}$ of the layer"]


def test_nested_sizes_have_a_line_each():
    floor = {f"nested/{size}/chi_pos": 1 / size for size in (16, 8)}
    ax = lnp.plot.nested_sizes(run(**floor))
    named = {line.get_label(): line.get_ydata()[0] for line in ax.get_lines() if not line.get_label().startswith("_")}
    assert list(named) == ["8 samples", "16 samples", "32, the whole batch", "of the population"]
    assert (named["8 samples"], named["16 samples"]) == (1 / 8, 1 / 16)
    for wrong, words in ((run(), "a run without nested batches"), ([run(**floor)] * 2, "2 runs")):
        with pytest.raises(ValueError, match=f"received {words}"):
            lnp.plot.nested_sizes(wrong)


def test_reach_is_shown_over_the_size():
    runs = {str(n): run(size=n) for n in (10, 1000)}
    ax = lnp.plot.reach_against_size(runs)
    assert [c.lines[0].get_xdata().tolist() for c in ax.containers] == [[10.0], [1000.0]]
    with pytest.raises(ValueError, match="tags="):
        lnp.plot.reach_against_size(run(size=None))


def test_a_reach_that_is_a_limit_points_down():
    unresolved = {"population/chi_pos": 1e-5, "population/chi_pos_stderr": 1e-3}
    ax = lnp.plot.reach_against_size({"value": run(size=10), "limit": run(size=1000, **unresolved)})
    at = run(size=1000, **unresolved).reach().limit
    (limit,) = [c for c in ax.containers if c.lines[0].get_xdata().tolist() == [1000.0]]
    assert limit.lines[0].get_ydata().tolist() == [at]
    assert limit.lines[0].get_marker() == "v"


def test_compute_is_an_axis():
    runs = {str(n): run(size=n, tokens_per_step=32) for n in (10, 1000)}
    ax = lnp.plot.reach_against_compute(runs)
    assert [c.lines[0].get_xdata().tolist() for c in ax.containers] == [[6 * n * 32 * 59.0] for n in (10, 1000)]
    ax = lnp.plot.against_compute(runs, "loss")
    assert ax.get_lines()[0].get_xdata()[-1] == pytest.approx(6 * 10 * 32 * 55)  # the middle of the last three windows
    with pytest.raises(ValueError, match="tokens_per_step"):
        lnp.plot.against_compute(run())


def test_a_noise_scale_that_is_a_limit_points_up():
    rows = [
        {"step": s, "population/rate": 0.01 if s else 1.0, "population/rate_stderr": 0.1}
        | {"population/gradient_noise": 8.0, "population/noise_scale": 8.0}
        for s in range(3)
    ]
    marks = [line for line in lnp.plot.noise_scale(History(rows)).get_lines() if line.get_marker() == "^"]
    assert [line.get_xdata().tolist() for line in marks] == [[1, 2]]
    assert marks[0].get_ydata() == pytest.approx([8.01 / 0.21 - 1] * 2)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: lnp.plot.curve(run(), "chi_positive"), "Expected one of step, loss"),
        (lambda: lnp.plot.layers([run(), run()]), "received 2 runs"),
        (lambda: lnp.plot.layers(run(layers=False)), "by_layer=True"),
        (lambda: lnp.plot.layers(run(), "chi"), "Expected one of chi_pos"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, message):
    with pytest.raises((ValueError, KeyError), match=message):
        draw()


def test_the_commands_write_figures(tmp_path, capsys):
    for name in ("a", "b"):
        run().to_jsonl(tmp_path / f"{name}.jsonl")
    assert main(["plot", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out" / "a.svg"), "--title", "A"]) == 0
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "ab.png")]) == 0
    assert (tmp_path / "out" / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "ab.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("Figure:") == 2


def test_files_that_say_less(tmp_path, capsys):
    """Rows that a tracker was handed tell no seconds; another program's tell no loss."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in run(layers=False).rows()]
    History(rows).to_jsonl(tmp_path / "handed.jsonl")
    assert main(["plot", str(tmp_path / "handed.jsonl"), "--out", str(tmp_path / "handed.png")]) == 0
    (tmp_path / "other.jsonl").write_text('{"step": 0, "x": 1.0}\n')
    assert main(["plot", str(tmp_path / "other.jsonl"), "--out", str(tmp_path / "other.png")]) == 1
    assert "lnp: 'loss' is not a column of the runs" in capsys.readouterr().err


def test_every_mark_is_explained_below_a_figure_of_its_own():
    assert below(lnp.plot.chi_net(run())) == ["window", "single measurement", "one standard error"]
    values = [0.1, 0.1, -0.1, 0.1]
    ax = lnp.plot.curve(History({"step": i, "chi_pos": v} for i, v in enumerate(values)), "chi_pos")
    assert below(ax) == ["at the foot: not above zero"]
    given = pyplot.figure().subplots()
    lnp.plot.chi_net(run(), given)
    assert below(given) == []
    lnp.plot.explain(given.figure)
    lnp.plot.explain(given.figure)
    assert len(below(given)) == 3
    page = lnp.plot.dashboard({"a": run(), "b": run(1, frozen=True)})
    assert below(page.axes[0]) == ["one standard error", "end of the run", "frozen features"]


def test_frozen_runs_are_dashed_in_a_colour_of_their_own():
    ax = lnp.plot.loss({"free": run(size=10), "larger": run(size=90), "frozen": run(size=20, frozen=True)})
    free, larger, frozen = (line for line in ax.get_lines() if line.get_label() in ("free", "larger", "frozen"))
    assert [line.get_linestyle() for line in (free, larger, frozen)] == ["-", "-", "--"]
    assert frozen.get_color() == lnp.plot.style.FROZEN
    alone = lnp.plot.loss({"free": run(size=10), "larger": run(size=90)}).get_lines()
    assert [free.get_color(), larger.get_color()] == [alone[0].get_color(), alone[1].get_color()]


def test_means_over_seeds_have_bands_of_their_errors():
    seeds = [run(seed) for seed in range(3)]
    ax = lnp.plot.over_seeds({"width 4": seeds, "width 8": seeds[:2]}, "population/chi_pos")
    line = ax.get_lines()[0]
    values = np.array([one["population/chi_pos"].reshape(-1, WIDTH).mean(axis=1) for one in seeds])
    assert line.get_ydata() == pytest.approx(values.mean(axis=0))
    edge = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == pytest.approx((values.mean(axis=0) + values.std(axis=0, ddof=1) / 3**0.5).max())
    with pytest.raises(ValueError, match="at different steps"):
        lnp.plot.over_seeds({"width 4": [run(), run(rows=6)]}, "loss")


def test_power_laws_are_drawn_through_the_points():
    ax = lnp.plot.power_law([10, 100, 1000], [0.1, 0.01, 0.001], [0.01, 0.001, 0.0001])
    (law,) = [line for line in ax.get_lines() if line.get_linestyle() == "-."]
    assert law.get_ydata()[[0, -1]] == pytest.approx([0.1, 0.001])
    assert law.get_label().startswith("power law, exponent -1.0")
    sizes = {str(n): run(size=n, tokens_per_step=1, **{"population/chi_pos": 1 / n}) for n in (10, 1000)}
    for draw, exponent in ((lnp.plot.reach_against_size, -1), (lnp.plot.reach_against_compute, -1)):
        (law,) = [line for line in draw(sizes, fit=True).get_lines() if line.get_linestyle() == "-."]
        x, y = np.log(law.get_xdata()), np.log(law.get_ydata())
        assert (y[-1] - y[0]) / (x[-1] - x[0]) == pytest.approx(exponent)
    with pytest.raises(ValueError, match="received 1 points"):
        lnp.plot.reach_against_size(run(), fit=True)


def test_fits_along_runs_find_the_exponent_that_is_in_them():
    rows = [
        {"step": s, "loss": s**-0.5, "population/chi_pos": s**-1.5, "population/chi_pos_stderr": 1e-6 * s**-1.5}
        | {"parameters": 10, "tokens_per_step": 2}
        for s in range(1, 30)
    ]
    for draw, exponent in ((lnp.plot.position_against_loss, 3.0), (lnp.plot.against_compute, -1.5)):
        (law,) = [line for line in draw(History(rows), fit=True).get_lines() if line.get_linestyle() == "-."]
        x, y = np.log(law.get_xdata()), np.log(law.get_ydata())
        assert (y[-1] - y[0]) / (x[-1] - x[0]) == pytest.approx(exponent, rel=1e-6)
    compute = law.get_xdata()
    assert compute[[0, -1]] == pytest.approx([6 * 10 * 2, 6 * 10 * 2 * 29])


def spectra():
    model = lnp_numpy.LinearModel(weight=np.zeros((2, 1)))
    batch = (np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.0], [1.0]]))
    return model, batch


def test_a_spectrum_shows_shares_and_the_position():
    s = lnp.spectrum(*spectra())  # eigenvalues 4 and 1, of equal weight: shares 0.8 and 0.2
    ax = lnp.plot.spectrum({0: s, 300: s}, decades=2, bins=8)
    assert [text.get_text().partition(":")[0] for text in ax.texts] == ["step 0", "step 300"]
    heights = [bar.get_height() for bar in ax.patches if hasattr(bar, "get_height")][:8]
    assert sorted(heights)[-2:] == pytest.approx([0.2, 0.8])
    (marker, _) = [line for line in ax.get_lines() if line.get_marker() == "^"]
    assert marker.get_xdata()[0] == pytest.approx(s.chi_pos) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="without probes"):
        lnp.plot.density(s)
    ax = lnp.plot.density({0: lnp.spectrum(*spectra(), probes=2)})
    assert ax.get_lines()[0].get_ydata().max() > 0.5


def test_a_kernel_is_shown_around_zero():
    model, batch = spectra()
    ax = lnp.plot.kernel(lnp.kernel(model, batch))
    assert np.asarray(ax.images[0].get_array()) == pytest.approx(np.diag([4.0, 1.0]))
    assert ax.images[0].get_clim() == (-4.0, 4.0)
    per_class = lnp.kernel(model, batch, kind="per_class")
    assert lnp.plot.kernel(per_class, of_class=0).images[0].get_clim() == (-4.0, 4.0)
    for wrong in ({"kernel": per_class}, {"kernel": per_class, "of_class": 1}):
        with pytest.raises(ValueError, match="Expected of_class= from 0 to 0"):
            lnp.plot.kernel(**wrong)
    with pytest.raises(ValueError, match="there is one matrix"):
        lnp.plot.kernel(lnp.kernel(model, batch), of_class=0)


def test_fifty_layers_have_a_name_each_where_there_is_room_and_colours_that_tell_them_apart():
    rows = [{"step": s, "loss": 1.0} | {f"layer/{i}/rate": 1.0 + i for i in range(50)} for s in range(4)]
    ax = lnp.plot.layers(History(rows), "rate_share")
    ax.figure.canvas.draw()
    assert len(ax.get_yticklabels()) == 50
    assert ax.collections[0].get_clim() == (0.0, pytest.approx(50 / 1275))
    small = lnp.plot.layers(History(rows), "rate_share", pyplot.figure(figsize=(3, 2)).subplots())
    assert len(small.get_yticklabels()) < 20
