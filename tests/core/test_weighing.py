"""Which estimator `auto` uses: what it is likely to cost for the error bar that is asked for."""

import numpy as np
import pytest

from core.dense import drawn, independent, kernel, network, record
from core.test_trace import compiled_loop
from lnp.contract.linearization import while_loop
from lnp.estimators import trace, weighing
from lnp.estimators.errors import LARGE
from lnp.results.decomposition import decompose
from lnp.results.finished import explained

LOOPS = pytest.mark.parametrize("loop", [while_loop, compiled_loop], ids=["eager", "compiled"])


def correlated(samples, outputs, size, common):
    """A network whose outputs share the fraction `common` of what they depend on: its probes are the noisier."""
    jacobian, gradient = network(samples, outputs, (size,))
    (name, own), shared = next(iter(jacobian.items())), np.random.default_rng(9).normal(size=size)
    return {name: (1 - common) * own + common * shared}, gradient


def estimated(lin, rtol, asked="auto", max_probes=64, **options):
    choice = weighing.choose(lin, asked, rtol, max_probes)
    rows = [tuple(lin.vjp(lin.signs(0)))]
    return choice, weighing.estimate_chosen(lin, rows, choice, rtol, max_probes, **options)


@LOOPS
@pytest.mark.parametrize(("samples", "outputs"), [(16, 10), (40, 7), (12, 24)])
def test_orthogonal_probes_take_over(loop, samples, outputs):
    """Outputs that all but agree: random signs vary by as much as they are, and K orthogonal probes are exact."""
    jacobian, gradient = correlated(samples, outputs, 20, 0.9)
    signs = independent(gradient.shape)
    lin = record(jacobian, gradient, while_loop=loop, subset=drawn(jacobian), sample_cost=1.0, signs=signs)
    choice, found = estimated(lin, 0.01)
    expected = np.trace(kernel(jacobian))
    assert choice.estimator == "per_sample"  # nothing was known of it before
    assert found.trace[0] == pytest.approx(expected, rel=1e-13)
    assert found.standard_error[0] == 0
    assert float(found.freedom) == LARGE
    assert outputs + 2 <= found.probes < 64
    assert trace.WAYS[found.way] == "exact"
    assert found.samples == pytest.approx([np.sum(rows**2) for rows in next(iter(jacobian.values()))], rel=1e-13)


@LOOPS
@pytest.mark.parametrize(
    ("asked", "outputs", "common", "rtol", "max_probes"),
    [
        ("per_sample", 10, 0.9, 0.01, 64),  # the user has asked for it
        ("auto", 10, 0.9, 0.01, 10),  # not within the probes that are allowed
        ("auto", 60, 0.0, 0.01, 64),  # the random probes that are still needed are fewer
    ],
)
def test_random_probes_go_on(loop, asked, outputs, common, rtol, max_probes):
    jacobian, gradient = correlated(16, outputs, 100, common)
    lin = record(jacobian, gradient, while_loop=loop, sample_cost=1.0)
    _, found = estimated(lin, rtol, asked, max_probes)
    assert found.standard_error[0] > 0
    assert abs(found.trace[0] - np.trace(kernel(jacobian))) < 4 * found.standard_error[0]


def test_the_name_of_what_was_used():
    """A record of numbers: what the user reads is the estimator that gave them."""
    jacobian, gradient = correlated(16, 10, 20, 0.9)
    for changes, name in (({}, "exact"), ({"while_loop": compiled_loop}, "exact")):
        lin = record(jacobian, gradient, loss=0.5, sample_cost=1.0, signs=independent(gradient.shape), **changes)
        d = explained(decompose(lin, rtol=0.01))
        assert (d.estimator, d.chi_net_stderr) == (name, 0)
        assert d.chi_net * 6 == pytest.approx(np.trace(kernel(jacobian)))
    flat, gradient = network(64, 40, (3000,))
    d = explained(decompose(record(flat, gradient, loss=0.5, sample_cost=64.0), rtol=0.02))
    assert (d.estimator, d.samples) == ("joint", 64)


@LOOPS
@pytest.mark.parametrize(("size", "rtol"), [(3000, 0.02), (3000, 0.006), (800, 0.02)])
def test_the_whole_batch_where_single_samples_are_dear(loop, size, rtol):
    """Many rows that have little in common: probes of the whole batch vary little, and samples one by one cost N."""
    jacobian, gradient = network(32, 20, (size,))
    lin = record(jacobian, gradient, while_loop=loop, sample_cost=20.0, sample_square_norms=pytest.fail)
    _, found = estimated(lin, rtol)
    assert trace.WAYS[found.way] == "joint"
    assert weighing.TRUSTED < found.probes <= 64
    assert found.standard_error[0] <= rtol * found.trace[0]
    assert abs(found.trace[0] - np.trace(kernel(jacobian))) < 4 * found.standard_error[0]


@LOOPS
def test_single_samples_where_the_whole_batch_is_noisy(loop):
    """Samples that all but agree: no number of probes of the batch within reach gives the error that is asked for."""
    jacobian, gradient = correlated(32, 20, 3000, 0.9)
    dear, cheap = (record(jacobian, gradient, while_loop=loop, sample_cost=cost) for cost in (32.0, 1.0))
    one, other = estimated(dear, 0.05)[1], estimated(cheap, 0.05)[1]
    assert one.probes == other.probes > 0
    assert one.trace[0] == pytest.approx(other.trace[0], rel=1e-14)
    assert one.standard_error[0] == pytest.approx(other.standard_error[0], rel=1e-14)


@pytest.mark.parametrize("changes", [{"sample_cost": 4.0}, {"apart": True}, {"max_probes": 8}, {"rtol": 0.0}])
def test_no_trial_where_it_saves_nothing(changes):
    """Cheap single samples, and those that are needed for the population's values anyway."""
    jacobian, gradient = network(32, 20, (3000,))
    lin = record(jacobian, gradient, sample_cost=changes.get("sample_cost", 32.0), vjp=pytest.fail)
    rtol, max_probes = changes.get("rtol", 0.02), changes.get("max_probes", 64)
    choice = weighing.Choice("per_sample", weighed=True)
    found = weighing.estimate_chosen(lin, [tuple(jacobian)], choice, rtol, max_probes, changes.get("apart", False))
    assert found.estimator == "per_sample"
    assert found.samples is not None


@pytest.mark.parametrize(("cost", "probes"), [(15.5, 0), (16.0, 8)])
def test_a_trial_of_eight_probes_from_four_times_its_cost(cost, probes):
    """Two probes of single samples are likely to be enough; no number of those of the whole batch within reach is."""
    (jacobian, gradient), made = correlated(32, 20, 300, 0.9), []
    plain = record(jacobian, gradient)
    lin = record(jacobian, gradient, sample_cost=cost, vjp=lambda v: (made.append(1), plain.vjp(v))[1])
    choice = weighing.Choice("per_sample", weighed=True)
    weighing.estimate_chosen(lin, [tuple(jacobian)], choice, 0.02, 64)
    assert len(made) == probes


def test_no_pilot_where_it_saves_nothing():
    """Samples drawn at random that cost as much as the whole batch."""
    jacobian, gradient = network(64, 10, (30,))
    rows = [tuple(jacobian)]
    lin = record(jacobian, gradient, subset=lambda size: pytest.fail("drawn"), subset_pays=False)
    assert trace.estimate(lin, rows, "per_sample", 0.05, 64).trace[0] > 0
    seen = []
    lin = record(jacobian, gradient, subset=lambda size: seen.append(size) or drawn(jacobian)(size))
    trace.estimate(lin, rows, "per_sample", 0.05, 64)
    assert seen == [16]


def test_coverage_after_a_trial():
    """Within 1, 2, 3 standard errors about as often as Student's t with 7 degrees of freedom says."""
    jacobian, gradient = network(32, 20, (800,))
    truth, away = np.trace(kernel(jacobian)), []
    for seed in range(300):
        lin = record(jacobian, gradient, seed=seed, sample_cost=32.0)
        found = estimated(lin, 0.02)[1]
        assert trace.WAYS[found.way] == "joint"
        away.append(abs(found.trace[0] - truth) / found.standard_error[0])
    for multiple, low, high in ((1, 0.54, 0.74), (2, 0.86, 0.98), (3, 0.95, 1.0)):
        assert low <= np.mean(np.array(away) <= multiple) <= high


def test_nothing_that_responds():
    """J = 0: no probe is within a tolerance of zero, and none is needed."""
    jacobian, gradient = network(16, 10, (5,))
    lin = record({name: 0 * array for name, array in jacobian.items()}, gradient, sample_cost=32.0)
    _, found = estimated(lin, 0.01)
    assert (found.trace[0], found.standard_error[0]) == (0, 0)
    assert trace.estimate(lin, [tuple(jacobian)], "per_sample", 0.01, 64).probes == 1
