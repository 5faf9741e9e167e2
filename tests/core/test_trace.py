"""The estimators of the trace: unbiased, with honest errors, and they stop."""

import itertools

import numpy as np
import pytest
from scipy import stats

from core.dense import independent, kernel, network, offdiagonal, record
from lnp.contract.linearization import while_loop
from lnp.estimators import independent as schemes
from lnp.estimators import trace, weighing
from lnp.estimators.probe import Probe
from lnp.estimators.probing import probe_to_tolerance

SEEDS = 400
JACOBIAN, GRADIENT = network(samples=12, outputs=4, sizes=(20, 10))
ROWS = [tuple(JACOBIAN), ("layer1.weight",)]
THETA = kernel(JACOBIAN)
TRACE = np.trace(THETA)
STARTS = {"per_sample": range(12), "grouped": (0, 1, 3, 4, 6, 7, 9, 10), "joint": (0,)}


def variance(estimator, theta=THETA, outputs=4, samples=12):
    """Of one probe."""
    starts = [*STARTS[estimator], samples]
    slices = [slice(a * outputs, b * outputs) for a, b in itertools.pairwise(starts)]
    return 2 * sum(offdiagonal(theta[s, s]) for s in slices)


def estimates(estimator, probes, seeds=SEEDS):
    lins = [record(JACOBIAN, GRADIENT, signs=independent(GRADIENT.shape, seed)) for seed in range(seeds)]
    found = [trace.estimate(lin, ROWS, estimator, 0.0, probes) for lin in lins]
    assert {f.probes for f in found} == {probes}
    return np.array([[f.trace[0], f.standard_error[0]] for f in found]).T


@pytest.mark.parametrize("estimator", STARTS)
def test_mean_and_variance(estimator):
    """Within 4.5 standard deviations of the theory: chosen seeds aside, one in 100000 right estimators fails."""
    values, _ = estimates(estimator, 4)
    expected = variance(estimator) / 4
    assert abs(values.mean() - TRACE) < 4.5 * (expected / SEEDS) ** 0.5
    squares = (values - TRACE) ** 2
    assert abs(squares.mean() - expected) < 4.5 * squares.std() / SEEDS**0.5


@pytest.mark.parametrize("estimator", STARTS)
def test_standard_error_is_unbiased(estimator):
    """E SE^2 is the variance of the mean, at the fewest probes that have a standard error."""
    _, errors = estimates(estimator, 2)
    assert abs(np.mean(errors**2) - variance(estimator) / 2) < 4.5 * np.std(errors**2) / SEEDS**0.5


@pytest.mark.parametrize(
    ("estimator", "probes", "freedom"), [("per_sample", 4, 36), ("grouped", 8, 56), ("joint", 32, 31)]
)
def test_coverage(estimator, probes, freedom):
    """Within 1, 2, 3 standard errors as often as Student's t says, up to 4 binomial standard deviations of 400 seeds.

    An error bar that is wrong by a factor sqrt(2) misses the first by six of them.
    """
    values, errors = estimates(estimator, probes)
    for multiple in (1, 2, 3):
        p = 1 - 2 * stats.t.sf(multiple, freedom)
        covered = np.mean(np.abs(values - TRACE) <= multiple * errors)
        assert abs(covered - p) < 4 * (p * (1 - p) / SEEDS) ** 0.5, (multiple, covered, p)


def test_noise_falls_from_joint_to_grouped_to_per_sample():
    spread = [np.std(estimates(estimator, 2)[0]) for estimator in ("joint", "grouped", "per_sample")]
    assert spread[0] > 1.5 * spread[1] > 1.5 * spread[2]


@pytest.mark.parametrize("independent", [True, False])
def test_exact(independent):
    calls = []
    lin = record(JACOBIAN, GRADIENT, independent=independent)
    counted = record(
        JACOBIAN,
        GRADIENT,
        independent=independent,
        vjp=lambda v: (calls.append(1), lin.vjp(v))[1],
        sample_square_norms=(independent and (lambda v: (calls.append(1), lin.sample_square_norms(v))[1])) or None,
    )
    found = trace.estimate(counted, ROWS, "exact", 0.0, 1)
    expected = [np.trace(kernel(JACOBIAN, row)) for row in ROWS]
    assert found.trace == pytest.approx(expected, rel=1e-13)
    assert found.standard_error.tolist() == [0, 0]
    assert found.probes == len(calls) == (4 if independent else 48)


def test_one_probe_has_an_upper_bound():
    """Over all sign vectors, the spread across groups is not below the variance; one group cannot tell."""
    jacobian, gradient = network(samples=3, outputs=2, sizes=(4,))
    vectors = itertools.product((-1.0, 1.0), repeat=6)
    lins = [record(jacobian, gradient, signs=lambda _, v=v: np.reshape(v, (3, 2))) for v in vectors]
    rows = [tuple(jacobian)]
    found = [trace.estimate(lin, rows, "per_sample", 0.0, 1) for lin in lins]
    values, errors = (np.array([getattr(f, name)[0] for f in found]) for name in ("trace", "standard_error"))
    theta = kernel(jacobian)
    blocks = [np.trace(theta[2 * n : 2 * n + 2, 2 * n : 2 * n + 2]) for n in range(3)]
    # E SE^2 = variance + G/(G - 1) sum_g (T_g - mean)^2: the blocks' traces differ
    assert np.mean(errors**2) == pytest.approx(values.var() + 1.5 * np.sum((blocks - np.mean(blocks)) ** 2), rel=1e-12)
    joint = trace.estimate(lins[0], rows, "joint", 0.0, 1)
    assert np.isnan(joint.standard_error[0])
    assert np.isfinite(joint.trace[0])


def test_standard_error_by_hand():
    """Two groups of signs' values 1, 3 and 10, 14: SE^2 = ((1 + 1) + (4 + 4)) / (2 * 1)."""
    values = iter([np.array([[1.0, 10.0]]), np.array([[3.0, 14.0]])])
    probe = Probe(lambda v: next(values), 2, 1)
    found = probe_to_tolerance(record(JACOBIAN, GRADIENT), probe, 0.0, 2)
    assert (found.mean.tolist(), found.error.variance.tolist(), found.probes) == ([[2.0, 12.0]], [5.0], 2)


def compiled_loop(condition, body, state):
    """As compiling frameworks run it: the count is an array too, and no Python `if` sees it."""
    state = tuple(np.asarray(part) for part in state)
    while condition(state):
        state = tuple(np.asarray(part) for part in body(state))
    return state


@pytest.fixture(params=[while_loop, compiled_loop], ids=["eager", "compiled"])
def stopped(request):
    def stopped(values, groups=1, **limits):
        """Probes that are spent on a sequence of values."""
        drawn = iter(values)
        probe = Probe(lambda v: np.full((1, groups), next(drawn)), groups, 1)
        lin = record(JACOBIAN, GRADIENT, while_loop=request.param)
        return probe_to_tolerance(lin, probe, **{"rtol": 0.1, "max_probes": 64, **limits}).probes

    return stopped


def test_stops_at_the_tolerance(stopped):
    """Values alternating between 0.9 and 1.1 have a standard error near 0.1 / sqrt(k)."""
    values = list(itertools.islice(itertools.cycle([0.9, 1.1]), 64))
    assert stopped(values, rtol=0.1) == 6
    for rtol in (0.03, 0.02):
        k = int(stopped(values, rtol=rtol))
        errors = {n: np.std(values[:n], ddof=1) / n**0.5 / np.mean(values[:n]) for n in (k - 1, k)}
        assert errors[k] <= rtol < errors[k - 1]
    assert stopped(values, rtol=0.001) == 64
    assert stopped(values, rtol=0.001, max_probes=11) == 11


@pytest.mark.parametrize(("groups", "least"), [(1, 6), (2, 4), (5, 2), (6, 1), (100, 1)])
def test_an_error_of_few_differences_stops_nothing(stopped, groups, least):
    """Five degrees of freedom at least, even where all probes agree."""
    assert stopped([1.0] * 64, groups) == least
    assert max((least - 1) * groups, groups - 1) >= schemes.TRUSTED
    assert stopped([1.0] * 64, groups, max_probes=1) == 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_to_resolve_ends(stopped, value):
    with np.errstate(invalid="ignore"):
        assert stopped([value] * 64) <= 6


def test_tolerance_is_that_of_the_whole():
    """The first row decides."""
    drawn = iter([0.9, 1.1] * 32)
    probe = Probe(lambda v: np.array([[1.0], [next(drawn) * 100]]), 1, 2)
    assert probe_to_tolerance(record(JACOBIAN, GRADIENT), probe, 0.001, 64).probes == 6


@pytest.mark.parametrize(
    ("shape", "independent", "asked", "used", "noted"),
    [
        ((100, 2), True, "auto", "exact", False),
        ((100, 3), True, "auto", "per_sample", False),
        ((4, 28), True, "auto", "exact", False),
        ((4, 29), True, "auto", "per_sample", False),
        ((32, 2), True, "auto", "exact", False),
        ((32, 5), True, "auto", "per_sample", False),
        ((16, 16), True, "auto", "per_sample", False),
        ((8, 5), True, "auto", "exact", False),
        ((8, 6), True, "auto", "per_sample", False),
        ((1, 64), True, "auto", "exact", False),
        ((1, 65), True, "auto", "per_sample", False),
        ((4, 4), False, "auto", "exact", False),
        ((17, 1), False, "auto", "joint", False),
        ((17, 1), False, "per_sample", "joint", True),
        ((17, 1), False, "exact", "exact", False),
        ((3, 9), True, "joint", "joint", False),
        ((3, 9), True, "grouped", "grouped", False),
    ],
)
def test_choice(shape, independent, asked, used, noted):
    lin = record(*network(*shape), independent=independent)
    found = weighing.choose(lin, asked, 0.01, 64)
    assert (found.estimator, bool(found.notes)) == (used, noted)


def test_microbatches_are_the_groups():
    jacobian, gradient = network(samples=6, outputs=3)
    plain = record(jacobian, gradient)
    norms = lambda v: {name: array.reshape(2, 3).sum(1) for name, array in plain.sample_square_norms(v).items()}
    lin = record(jacobian, gradient, independent=False, group_square_norms=norms, groups=2)
    assert weighing.choose(lin, "auto", 0.01, 64).estimator == "grouped"
    probe = trace.grouped_probe(lin, [tuple(jacobian)])
    v = lin.signs(0)
    assert probe.groups == 2
    assert probe.square_norms(v)[0] == pytest.approx(sum(norms(v).values()))


@pytest.mark.parametrize("estimator", ["exact", "per_sample", "grouped", "joint"])
def test_an_estimator_that_was_asked_for_is_used(estimator):
    found = trace.estimate(record(JACOBIAN, GRADIENT), ROWS, estimator, 0.1, 8)
    assert (found.estimator, found.way) == (estimator, 0)


@pytest.mark.parametrize("samples", [1, 5, 8, 9, 20])
def test_groups_cover_the_batch_once(samples):
    """With J the identity per sample, each group's squared norm counts its elements."""
    jacobian = {"w": np.ones((samples, 1, 1))}
    parts = []
    lin = record(jacobian, np.ones((samples, 1)), vjp=lambda v: parts.append(v) or {"w": v})
    probe = trace.grouped_probe(lin, [("w",)])
    sizes = probe.square_norms(np.ones((samples, 1)))
    assert probe.groups == min(8, samples) == len(parts)
    assert np.array_equal(sum(parts), np.ones((samples, 1)))
    assert sizes.max() - sizes.min() <= 1
    assert all(np.count_nonzero(np.diff(part[:, 0])) <= 2 for part in parts)


def test_norms_of_micro_batches_are_used_where_these_are_the_groups():
    """With one group, the whole batch, for the joint estimator; with several for the grouped one."""
    asked = []

    def norms(groups):
        def group_square_norms(v):
            asked.append(groups)
            return {name: np.full(groups, 7.0) for name in JACOBIAN}

        return record(JACOBIAN, GRADIENT, group_square_norms=group_square_norms, groups=groups)

    v = np.ones_like(GRADIENT)
    for lin, probe, groups in (
        (norms(1), trace.joint_probe, 1),
        (norms(3), trace.grouped_probe, 3),
    ):
        asked.clear()
        made = probe(lin, ROWS)
        assert made.groups == groups
        assert made.square_norms(v).tolist() == [[14.0] * groups, [7.0] * groups]
        assert asked == [groups]
    asked.clear()
    assert trace.grouped_probe(norms(1), ROWS).groups == trace.GROUPS
    own = trace.joint_probe(record(JACOBIAN, GRADIENT), ROWS).square_norms(v)
    np.testing.assert_allclose(trace.joint_probe(norms(3), ROWS).square_norms(v), own)
    assert asked == []
    with_groups = record(JACOBIAN, GRADIENT, groups=3)
    assert trace.grouped_probe(with_groups, ROWS).groups == trace.GROUPS


def test_probes_that_a_tolerance_of_one_or_none_is_likely_to_ask_for():
    assert weighing.expected_probes(16, 0.0, 64) == 64
    assert weighing.expected_probes(16, 1.0, 64) == 2
    assert weighing.expected_probes(1000, 0.001, 64) == pytest.approx(10)


def weighed(samples, rtol, sample_cost, **changes):
    """How the trace was estimated where "per_sample" may give way."""
    jacobian, gradient = network(samples, 4, sizes=(20, 10))
    lin = record(jacobian, gradient, sample_cost=sample_cost, **changes)
    found = weighing.estimate_chosen(lin, ROWS, weighing.Choice("per_sample", weighed=True), rtol, 64)
    return trace.WAYS[int(found.way)] if found.way else found.estimator


def test_the_whole_batch_is_tried_where_single_samples_are_dear():
    def never(*_):
        raise AssertionError("the whole batch was tried")

    assert weighed(200, 0.01, 10.0, vjp=never) == "per_sample"  # 2 probes of 200 samples, at 10 pull-backs each
    assert weighed(40, 0.5, 1e4) == "joint"
    assert weighed(40, 0.01, 1e4) == "exact"  # the whole batch would need more than the 64 probes there are
