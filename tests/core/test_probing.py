"""Probing to a tolerance with a pilot: samples drawn at random that tell how far one probe can be trusted."""

import numpy as np
import pytest
from scipy import stats

from core.dense import drawn, kernel, network, offdiagonal, record
from core.test_trace import compiled_loop
from lnp.contract.linearization import while_loop
from lnp.estimators import trace
from lnp.estimators.probing import _fill_with_mean

SEEDS = 400
ROWS = [("layer0.weight", "layer1.weight"), ("layer1.weight",)]


def batch(samples, spread):
    """(Jacobian, gradient) of samples whose traces differ by the relative standard deviation `spread`."""
    jacobian, gradient = network(samples, outputs=4, sizes=(30, 10))
    size = np.exp(spread / 2 * np.random.default_rng(5).normal(size=(samples, 1, 1)))
    norms = {name: np.sqrt((array**2).sum((1, 2), keepdims=True)) for name, array in jacobian.items()}
    return {name: array / norms[name] * size for name, array in jacobian.items()}, gradient


def estimates(network, rtol, loop=while_loop):
    """One for each seed of signs and of the pilot's samples."""
    jacobian, gradient = network
    changes = [{"seed": seed, "subset": drawn(jacobian, seed), "while_loop": loop} for seed in range(SEEDS)]
    lins = [record(jacobian, gradient, **change) for change in changes]
    return [trace.estimate(lin, ROWS, "per_sample", rtol, 64) for lin in lins]


def covered(found, jacobian, row):
    """How often the truth lies within 1, 2, 3 standard errors."""
    expected = np.trace(kernel(jacobian, ROWS[row]))
    away = np.array([abs(float(f.trace[row]) - expected) / float(f.standard_error[row]) for f in found])
    return [np.mean(away <= multiple) for multiple in (1, 2, 3)]


def due(freedom):
    """By Student's t."""
    return [1 - 2 * stats.t.sf(multiple, freedom) for multiple in (1, 2, 3)]


def slack(p):
    """4 binomial standard deviations over the seeds."""
    return 4 * (p * (1 - p) / SEEDS) ** 0.5


@pytest.mark.parametrize(
    ("samples", "spread", "rtol", "probed", "freedom"),
    [(160, 0.3, 0.04, 160, 19), (64, 0.05, 0.12, 12, 11), (400, 0.05, 0.05, 50, 49), (20, 0.3, 0.15, 20, 19)],
    ids=["pilot second", "pilot alone", "larger pilot alone", "no pilot"],
)
def test_one_probe(samples, spread, rtol, probed, freedom):
    """Within 1, 2, 3 standard errors as often as Student's t says, where it stops after one probe; upper bounds of the
    error may cover more. An error bar that is wrong by sqrt(2) misses the first by six standard deviations of 400
    seeds, of which four are allowed."""
    network = batch(samples, spread)
    found = estimates(network, rtol)
    assert {(int(f.probes), int(f.probed)) for f in found} == {(1, probed)}
    bound = {160: 0.0, 12: 0.03, 50: 0.06, 20: 0.33}[probed]
    for row in (0, 1):
        for share, p in zip(covered(found, network[0], row), due(freedom), strict=True):
            assert p - slack(p) < share < p + slack(p) + bound, (row, share, p)


@pytest.mark.parametrize("rtol", [0.005, 0.01, 0.02, 0.025])
@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_coverage_wherever_it_stops(rtol, spread):
    """Where the error decides when to stop, it is small by chance now and then: not more often than Student's t with
    the pilot's 11 degrees of freedom allows."""
    network = batch(64, spread)
    found = estimates(network, rtol)
    assert len({int(f.probes) for f in found}) > 1
    for row in (0, 1):
        for share, low, high in zip(covered(found, network[0], row), due(11), due(1000), strict=True):
            assert low - slack(low) < share < high + slack(high), (row, share)


def test_more_precision_costs_more():
    network = batch(160, 0.05)
    spent = [np.mean([f.probes * f.probed for f in estimates(network, rtol)]) for rtol in (0.1, 0.03, 0.01, 0.003)]
    assert spent[0] == 20
    assert spent[0] * 4 < spent[1] < spent[2] < spent[3]


def test_samples_that_were_not_probed_have_the_mean_of_the_others():
    """So that the population's jackknife finds those of the pilot at their places."""
    jacobian, gradient = batch(64, 0.05)
    subset = drawn(jacobian)
    lin = record(jacobian, gradient, subset=subset)
    found = trace.estimate(lin, ROWS, "per_sample", 0.2, 64)
    index = subset(12).index
    own = sum(lin.sample_square_norms(lin.signs(1)).values())[index]
    assert found.samples[index] == pytest.approx(own, rel=1e-13)
    assert np.delete(found.samples, index) == pytest.approx(np.full(52, own.mean()), rel=1e-13)
    assert found.trace[0] == pytest.approx(found.samples.sum(), rel=1e-13)
    assert found.standard_error[0] == pytest.approx(64 * np.std(own, ddof=1) / 12**0.5, rel=1e-12)


def test_error_of_one_probe_by_hand():
    """SE^2 = N/M sum_m (x_m - x'_m)^2 / 2."""
    jacobian, gradient = batch(64, 0.3)
    subset = drawn(jacobian)
    lin = record(jacobian, gradient, subset=subset)
    found = trace.estimate(lin, ROWS, "per_sample", 0.05, 64)
    first, second = (sum(lin.sample_square_norms(lin.signs(i)).values()) for i in (0, 1))
    index = subset(12).index
    assert found.trace[0] == pytest.approx(first.sum(), rel=1e-13)
    assert found.standard_error[0] ** 2 == pytest.approx(64 / 12 * np.sum((first - second)[index] ** 2) / 2, rel=1e-12)


@pytest.mark.parametrize(("rtol", "max_probes"), [(0.0, 3), (0.01, 1)])
def test_no_pilot_where_it_tells_nothing(rtol, max_probes):
    jacobian, gradient = batch(64, 0.3)
    lin = record(jacobian, gradient, subset=None)
    with_pilot = record(jacobian, gradient, subset=lambda size: pytest.fail("drawn"))
    one, other = (trace.estimate(each, ROWS, "per_sample", rtol, max_probes) for each in (lin, with_pilot))
    assert one.probes == other.probes == max_probes
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-14)


@pytest.mark.parametrize("rtol", [0.2, 0.05, 0.02, 0.005])
def test_compiled_loops_give_the_same(rtol):
    network = batch(64, 0.3)
    for one, other in zip(estimates(network, rtol)[:20], estimates(network, rtol, compiled_loop)[:20], strict=True):
        assert (int(one.probes), int(one.probed)) == (int(other.probes), int(other.probed))
        assert one.trace == pytest.approx(other.trace, rel=1e-14)
        assert one.standard_error == pytest.approx(other.standard_error, rel=1e-14)


def test_a_probe_varies_as_its_kernel_says():
    """The batch of these tests: 2 sum_n offdiag ||Theta_nn||_F^2, by which the tolerances above were chosen."""
    jacobian, _ = batch(160, 0.3)
    theta = kernel(jacobian)
    variance = 2 * sum(offdiagonal(theta[4 * n : 4 * n + 4, 4 * n : 4 * n + 4]) for n in range(160))
    assert 0.01 < variance**0.5 / np.trace(theta) < 0.03


def test_a_large_batch_is_filled_up_without_a_table_of_pairs():
    """Which, of 25,000 among 200,000 samples, would take 40 GB."""
    index = np.sort(np.random.default_rng(0).permutation(200_000)[:25_000])
    few = np.arange(25_000.0)[None, :]
    found = _fill_with_mean(np, few, index, 200_000)
    assert np.array_equal(found[:, index], few)
    assert np.all(np.delete(found, index, axis=1) == few.mean())
