"""What figures have unless something else is asked for: legends and names, and no fits."""

from __future__ import annotations

import pytest
from matplotlib import pyplot

import lnp.plot
from integrations.drawn_runs import legend, texts
from lnp.plot import laws
from lnp.runs.spectral_reach import Reach
from lnp.tracking.history import History


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def small(size):
    """A run of three measurements, whose positions follow a power law of the loss."""
    row = {"parameters": size, "tokens_per_step": 2}
    return History(row | {"step": s, "loss": 1 / (1 + s), "chi_pos": (1 + s) ** -2.0} for s in range(3))


RUNS = {"a": small(1), "b": small(2)}
LINES = {
    "loss": lambda ax, **options: lnp.plot.position_against_loss(RUNS, ax, **options),
    "compute": lambda ax, **options: lnp.plot.against_compute(RUNS, "loss", ax, **options),
    "seeds": lambda ax, **options: lnp.plot.over_seeds(
        {name: [run] for name, run in RUNS.items()}, "loss", ax, **options
    ),
    "curve": lambda ax, **options: lnp.plot.curve(RUNS, "loss", ax, **options),
}
REACHES = {"size": lnp.plot.reach_against_size, "compute": lnp.plot.reach_against_compute}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_several_runs_have_a_legend(name):
    ax = pyplot.figure().subplots()
    LINES[name](ax)
    assert legend(ax) == ["a", "b"]
    ax = pyplot.figure().subplots()
    LINES[name](ax, legend=False)
    assert legend(ax) is None


@pytest.mark.parametrize("name", REACHES)
def test_reaches_have_names(name):
    ax = pyplot.figure().subplots()
    REACHES[name](RUNS, ax)
    assert (texts(ax), legend(ax)) == (["a", "b"], None)
    ax = pyplot.figure().subplots()
    REACHES[name](RUNS, ax, names=False)
    assert texts(ax) == []


@pytest.mark.parametrize("draw", [lnp.plot.position_against_loss, lambda run, **options: lnp.plot.against_compute(
    run, "loss", **options)])  # fmt: skip
def test_the_fit_of_one_run_has_a_legend(draw):
    assert [name.partition(",")[0] for name in legend(draw({"a": small(1)}, fit=True))] == ["a", "power law"]


@pytest.mark.parametrize(
    ("stderr", "known", "marker"), [(0.1, None, "o"), (0.9, None, "v"), (0.9, True, "o"), (0.1, False, "v")]
)
def test_a_reach_is_a_point_or_a_limit(stderr, known, marker):
    ax = pyplot.figure().subplots()
    laws.draw_reach(ax, 3.0, Reach(1.0, stderr, 0.0, 1), known)
    assert ax.containers[0].lines[0].get_marker() == marker
