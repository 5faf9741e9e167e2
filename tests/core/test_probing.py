"""Probing to a tolerance: error bars that hold wherever it stops, for balanced signs and for independent ones."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import lnp
import lnp_numpy
from core.dense import balanced, drawn, independent, kernel, network, offdiagonal, record
from core.test_trace import compiled_loop
from lnp.contract.linearization import while_loop
from lnp.estimators import trace
from lnp.estimators.errors import Error
from lnp.estimators.independent import TRUSTED, Independent
from lnp.estimators.probe import Exact, Probe, compute_if
from lnp.estimators.swapped import Swapped
from lnp.spectral.eager import compile_products

SEEDS = 400
ROWS = [("layer0.weight", "layer1.weight"), ("layer1.weight",)]


def batch(samples, spread=0.3, outputs=4, common=0.0, outlier=1.0):
    """(Jacobian, gradient) of samples whose traces differ by the relative standard deviation `spread`, that have a part
    of what they depend on in common, and one of which is larger.
    """
    jacobian, gradient = network(samples, outputs, sizes=(30, 10))
    size = np.exp(spread / 2 * np.random.default_rng(5).normal(size=(samples, 1, 1)))
    size[samples // 2] *= outlier
    made = {}
    for number, (name, array) in enumerate(jacobian.items()):
        shared = np.random.default_rng(number).normal(size=array.shape[1:])
        mixed = common * shared + (1 - common) * array
        made[name] = mixed / np.sqrt((mixed**2).sum((1, 2), keepdims=True)) * size
    return made, gradient


def estimates(network, rtol, balanced=True, loop=while_loop, pilot=True, seeds=SEEDS, max_probes=64):
    """One for each seed of signs and of the pilot's samples."""
    jacobian, gradient = network
    found = []
    for seed in range(seeds):
        changes = {"seed": seed, "subset": drawn(jacobian, seed) if pilot else None, "while_loop": loop}
        if not balanced:
            changes["signs"] = independent(gradient.shape, seed)
        lin = record(jacobian, gradient, **changes)
        found.append(trace.estimate(lin, ROWS, "per_sample", rtol, max_probes))
    return found


def away_from_truth(found, jacobian, row):
    expected = np.trace(kernel(jacobian, ROWS[row]))
    return np.array([abs(float(f.trace[row]) - expected) / float(f.standard_error[row]) for f in found])


def assert_covered(found, jacobian, row, freedom, bound=0.0):
    """The truth lies within 1, 2, 3 standard errors as often as Student's t says for as few degrees of freedom as
    these, up to 4 binomial standard deviations. An error that is wrong by sqrt(2) misses the first by six of them.
    """
    away = away_from_truth(found, jacobian, row)
    for multiple in (1, 2, 3):
        low, high = (1 - 2 * stats.t.sf(multiple, f) for f in (freedom, 1000))
        share = np.mean(away <= multiple)
        slack = [4 * (p * (1 - p) / len(found)) ** 0.5 for p in (low, high)]
        assert low - slack[0] < share < high + slack[1] + bound, (multiple, share, low, high)


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "independent"])
@pytest.mark.parametrize("rtol", [0.1, 0.03, 0.015])
@pytest.mark.parametrize(("samples", "pilot"), [(64, True), (40, False), (9, False)])
def test_coverage_wherever_it_stops(samples, pilot, rtol, balanced):
    """After one probe and a pilot, after a pair, after more; of whole blocks of four samples and of others."""
    network = batch(samples, common=0.3)
    found = estimates(network, rtol, balanced, pilot=pilot)
    # the spread across samples, which stops without a pilot, holds what their traces differ by, too
    bound = 0.0 if pilot or {int(f.probes) for f in found} - {1} == {int(f.probes) for f in found} else 0.33
    for row in (0, 1):
        assert_covered(found, network[0], row, TRUSTED, bound)


@pytest.mark.parametrize(("samples", "outputs", "rtol"), [(32, 3, 0.1), (32, 3, 0.02), (16, 10, 0.05), (24, 5, 0.03)])
def test_coverage_with_few_outputs(samples, outputs, rtol):
    """Vectors of few signs are alike by chance, unless they swap between samples of different places."""
    network = batch(samples, outputs=outputs, common=0.3)
    found = estimates(network, rtol, pilot=False)
    bound = 0.33 if any(int(f.probes) == 1 for f in found) else 0.0
    assert_covered(found, network[0], 0, TRUSTED, bound)


@pytest.mark.parametrize(("samples", "rtol"), [(9, 0.0), (7, 0.0), (66, 0.03)])
def test_coverage_of_blocks_that_are_not_whole(samples, rtol):
    """What samples have in common does not cancel in them, and is most of the noise here."""
    network = batch(samples, common=0.8)
    assert_covered(estimates(network, rtol, max_probes=4), network[0], 0, TRUSTED - 1)


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "independent"])
def test_coverage_where_one_sample_is_much_larger(balanced):
    """Its noise is that of the whole: neither a pilot without it nor a lucky difference may stop the probing."""
    network = batch(48, outlier=6.0, common=0.3)
    found = estimates(network, 0.1, balanced)
    assert np.median([int(f.probes) for f in found]) > TRUSTED
    assert_covered(found, network[0], 0, TRUSTED)


def test_balanced_signs_leave_out_what_samples_have_in_common():
    """The variance of one probe, by the theory: a fifth of that of independent signs."""
    jacobian, _ = network = batch(64, spread=0.0, common=0.8)
    theta = kernel(jacobian).reshape(64, 4, 64, 4)
    off = np.stack([theta[n, :, n, :] * (1 - np.eye(4)) for n in range(64)])
    due = 2 * 4 / 3 * sum(np.sum((b - b.mean(axis=0)) ** 2) for b in np.split(off, 16))
    found = [np.array([float(f.trace[0]) for f in estimates(network, 0.0, which, max_probes=1)]) for which in (1, 0)]
    balanced, plain = (np.var(values) for values in found)
    assert due == pytest.approx(balanced, rel=0.35)  # samples go to other blocks in each draw
    assert 2 * np.sum(off**2) == pytest.approx(plain, rel=0.3)
    assert balanced < 0.25 * plain


def test_more_precision_costs_more():
    network = batch(160, 0.05)
    spent = [np.mean([f.probes for f in estimates(network, rtol, seeds=100)]) for rtol in (0.1, 0.01, 0.005, 0.002)]
    assert spent[0] < 1.5
    assert spent[0] < spent[1] < spent[2] < spent[3]


def test_error_of_one_probe_by_hand():
    """SE^2 = sum_m (x_m - x'_m)^2 / 2 * sum_n x_n^2 / sum_m x_m^2."""
    jacobian, gradient = batch(64, 0.3)
    lin = record(jacobian, gradient, subset=drawn(jacobian), signs=independent(gradient.shape))
    found = trace.estimate(lin, ROWS, "per_sample", 0.05, 64)
    first, second = (sum(lin.sample_square_norms(lin.signs(i)).values()) for i in (0, 1))
    index = lin.subset(16).index
    assert (found.probes, found.trace[0]) == (1, pytest.approx(first.sum(), rel=1e-13))
    larger = np.sum(first**2) / np.sum(first[index] ** 2)
    difference = (first - second)[index]
    assert found.standard_error[0] ** 2 == pytest.approx(larger * np.sum(difference**2) / 2, rel=1e-12)
    nu = 3 * np.sum(difference**2) ** 2 / np.sum(difference**4) - 2
    assert found.freedom == pytest.approx(min(nu, np.sum(first**2) ** 2 / np.sum(first**4)), rel=1e-12)


def test_error_of_one_balanced_probe_by_hand():
    """SE^2 = N v_R + c max(v_I - v_R, 0), here of blocks that are not whole: 66 = 16 * 4 + 2."""
    jacobian, gradient = batch(66, 0.3, common=0.8)
    lin = record(jacobian, gradient, subset=drawn(jacobian))
    found = trace.estimate(lin, ROWS, "per_sample", 0.2, 64)
    pair = lin.signs.pairs(0)
    first, second = (sum(lin.sample_square_norms(v).values()) for v in (pair.first, pair.second))
    index, d = lin.subset(16).index, first - second
    pairs = [(n, p) for n in index if n < (p := pair.partner[n])]
    assert len(pairs) == 8
    v_r = 3 / 4 * np.mean([(d[n] + d[p]) ** 2 / 4 for n, p in pairs])
    v_i = 3 / 4 * np.mean(d[index] ** 2) / 2
    larger = np.mean(first**2) / np.mean(first[index] ** 2)
    assert v_i > 2 * v_r
    expected = larger * (66 * v_r + 2 * 2 / 3 * (v_i - v_r))
    assert (found.probes, found.trace[0]) == (1, pytest.approx(first.sum(), rel=1e-13))
    assert found.standard_error[0] ** 2 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("max_probes", [2, 3, 6])
def test_error_of_pairs_by_hand(max_probes):
    """SE^2 = N v_R (m - 2)/(m - 1) / k + 4/k^2 c max(v_I - v_R, 0), of a number of samples that is odd."""
    jacobian, gradient = batch(9, 0.3, common=0.8)
    lin = record(jacobian, gradient)
    found = trace.estimate(lin, ROWS, "per_sample", 0.0, max_probes)
    k = max_probes // 2 * 2
    values, squares, own = [], [], []
    for pair in map(lin.signs.pairs, range(k // 2)):
        x, y = (sum(lin.sample_square_norms(v).values()) for v in (pair.first, pair.second))
        values += [x.sum(), y.sum()]
        pairs = [(n, p) for n, p in enumerate(pair.partner) if n < p]
        squares += [((x - y)[n] + (x - y)[p]) ** 2 / 4 for n, p in pairs]
        own += [(x - y)[n] ** 2 / 2 for both in pairs for n in both]
    v_r, v_i, used = 3 / 4 * np.mean(squares), 3 / 4 * np.mean(own), 10 * (k // 2) % 4
    assert v_i > 1.5 * v_r
    expected = 9 * v_r * 2 / 3 / k + 4 / k**2 * used * (4 - used) / 3 * (v_i - v_r)
    assert found.probes == k
    assert found.trace[0] == pytest.approx(np.mean(values), rel=1e-13)
    assert found.standard_error[0] ** 2 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rtol", "max_probes"), [(0.0, 4), (0.01, 1)])
@pytest.mark.parametrize("balanced", [True, False])
def test_no_pilot_where_it_tells_nothing(rtol, max_probes, balanced):
    jacobian, gradient = batch(64, 0.3)
    changes = {} if balanced else {"signs": independent(gradient.shape)}
    lin = record(jacobian, gradient, subset=None, **changes)
    with_pilot = record(jacobian, gradient, subset=lambda size: pytest.fail("drawn"), **changes)
    one, other = (trace.estimate(each, ROWS, "per_sample", rtol, max_probes) for each in (lin, with_pilot))
    assert one.probes == other.probes == max_probes
    assert one.standard_error == pytest.approx(other.standard_error, rel=1e-14)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("rtol", [0.2, 0.05, 0.02, 0.005])
def test_compiled_loops_give_the_same(rtol, balanced):
    network = batch(64, 0.3)
    run = partial(estimates, network, rtol, balanced, seeds=20)
    for one, other in zip(run(), run(loop=compiled_loop), strict=True):
        assert int(one.probes) == int(other.probes)
        assert one.trace == pytest.approx(other.trace, rel=1e-14)
        assert one.standard_error == pytest.approx(other.standard_error, rel=1e-14)
        assert float(one.freedom) == pytest.approx(float(other.freedom), rel=1e-12)


def test_a_probe_varies_as_its_kernel_says():
    """The batch of these tests: 2 sum_n offdiag ||Theta_nn||_F^2, by which the tolerances above were chosen."""
    jacobian, _ = batch(160, 0.3)
    theta = kernel(jacobian)
    variance = 2 * sum(offdiagonal(theta[4 * n : 4 * n + 4, 4 * n : 4 * n + 4]) for n in range(160))
    assert 0.01 < variance**0.5 / np.trace(theta) < 0.03


class TestIndependentErrors:
    """The error of the average of probes whose values are given, by hand."""

    VALUES = np.array([[[1.0, 4.0, 9.0]], [[2.0, 8.0, 3.0]], [[3.0, 3.0, 6.0]], [[2.0, 5.0, 2.0]]])

    def averaged(self, rtol=0.1):
        lin = SimpleNamespace(xp=np, signs=lambda index: index, outputs=np.zeros((3, 1)))
        probe = SimpleNamespace(square_norms=lambda index: self.VALUES[index], groups=3, pilot=None, exact=None)
        found = Independent(lin, probe, rtol, 64)
        state = found.first()[0]
        for _ in self.VALUES[1:]:
            state = found.turn(state)
        return found, state

    def test_the_spread_of_probes_within_each_group(self):
        found, state = self.averaged()
        mean = self.VALUES.mean(axis=0)
        squares = ((self.VALUES - mean) ** 2).sum(axis=0)
        assert state[1] == pytest.approx(mean)
        error = found.error(state)
        assert error.variance == pytest.approx([squares.sum() / (4 * 3)])
        by_squares = (3 + 2) * squares.sum() ** 2 / (squares**2).sum() - 2
        by_values = 3 * (mean**2).sum() ** 2 / (mean**4).sum()
        assert error.freedom == pytest.approx(min(by_squares, by_values))
        assert by_values < by_squares

    @pytest.mark.parametrize(("variance", "freedom", "enough"), [(0.99, 9, True), (1.01, 9, False), (0.5, 4.9, False)])
    def test_what_is_enough(self, variance, freedom, enough):
        found, _ = self.averaged(rtol=0.1)
        error = Error(np.array([variance]), np.array(freedom))
        assert bool(found.suffices(np.array([[4.0, 6.0]]), error)) is enough
        assert bool(found.suffices(np.array([[math.nan, 6.0]]), error))

    def test_the_tolerance_is_of_the_sum(self):
        found, _ = self.averaged(rtol=0.2)
        assert bool(found.suffices(np.array([[4.0, 6.0]]), Error(np.array([3.9]), np.array(9))))

    def test_probes_until_an_error_is_trusted(self):
        for groups, least in ((1, 6), (2, 4), (3, 3), (4, 3), (5, 2), (100, 2)):
            assert self.alone(groups=groups).least == least

    def alone(self, rtol=0.1, most=64, groups=2, exact=None, pilot=None):
        lin = SimpleNamespace(xp=np, outputs=np.zeros((2, 1)), while_loop=while_loop)
        return Independent(lin, Probe(None, groups, 1, pilot=pilot, exact=exact), rtol, most)

    def test_a_pilot_of_fewer_samples_may_spare_a_second_probe(self):
        piloted = lambda groups, most=64: self.alone(most=most, groups=groups, pilot=lambda: None).piloted
        assert [piloted(32), piloted(16), piloted(32, 2), piloted(32, 1)] == [True, False, True, False]
        assert not self.alone(groups=32).piloted
        assert not self.alone(rtol=0.0, groups=32, pilot=lambda: None).piloted

    @pytest.mark.parametrize(
        ("variance", "freedom", "most", "cheaper"),
        [
            (1.7, 9, 64, True), (1.6, 9, 64, False),  # 6 * 1.7 probes for a variance of 1, or 6 + 4 with exact ones
            (0.1, 2.9, 64, True), (0.1, 3.0, 64, False), (0.1, 3.1, 64, False),  # 10 for 5 degrees, at 3 of 6
            (1.7, 9, 11, True), (1.7, 9, 10, False),  # it would end before
        ],
    )  # fmt: skip
    def test_exact_probes_take_over_where_more_random_ones_are_needed(self, variance, freedom, most, cheaper):
        found, state = self.alone(most=most, exact=Exact(4, lambda: None)), (6, np.array([[4.0, 6.0]]), None, None)
        assert bool(found._exact_is_cheaper(state, Error(np.array([variance]), np.array(freedom)))) is cheaper

    @pytest.mark.parametrize(("most", "probes"), [(64, 10), (7, 10), (6, 6)])
    def test_exact_probes_are_made_where_the_loop_has_stopped_for_them(self, most, probes):
        """And not where it has used up its probes."""
        exact = np.array([[5.0, 5.5]])
        found = self.alone(most=most, exact=Exact(4, lambda: exact))
        mean, squares = np.array([[4.0, 6.0]]), np.array([[90.0, 80.0]])
        made = found.finished((np.asarray(6, np.int32), mean, squares, squares), Error(np.array([9.0]), 9.0), False)
        assert int(made.probes) == probes
        assert np.array_equal(made.mean, exact if probes == 10 else mean)
        assert int(made.exact) == (probes == 10)
        assert (made.error.variance[0] == 0) == (probes == 10)


def test_the_error_of_pairs_that_swap_by_hand():
    """Seven samples in blocks of eight, two rounds: 16 places, so that whole blocks were used."""
    lin = SimpleNamespace(xp=np, signs=balanced((7, 5)), outputs=np.zeros((7, 5)))
    found = Swapped(lin, SimpleNamespace(groups=7), 0.1, 64)
    assert (found.least, lin.signs.block) == (4, 8)
    mean = np.array([[9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    squares, own = np.array([[2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 0.0]]), np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]])
    error = found.error((4, mean, squares, own))
    residual = 7 / 8 * 18 / (8 * 6)  # three pairs in each of two rounds
    assert error.variance == pytest.approx([7 / 4 * (6 / 7) * residual])
    assert error.freedom == pytest.approx(0.5 * 4 * (81 + 6) ** 2 / (6561 + 6))
    partly = found.error((6, mean, squares, own))  # 24 places are whole blocks too
    assert partly.variance == pytest.approx([7 / 6 * (6 / 7) * 7 / 8 * 18 / (8 * 9)])


@pytest.mark.parametrize(("condition", "found", "times"), [(True, (2,), 1), (False, (1,), 0)])
def test_what_depends_on_a_condition_is_computed_once(condition, found, times):
    made = []

    def compute():
        made.append(1)
        return (2,)

    assert compute_if(SimpleNamespace(while_loop=while_loop), np.asarray(condition), compute, (1,)) == found
    assert len(made) == times


def test_products_are_made_once():
    made = []
    lin = SimpleNamespace(while_loop=while_loop, xp=np, outputs=np.zeros((2, 3)))
    double = compile_products(lin, lambda v: made.append(1) or 2 * v)
    assert np.array_equal(double(np.ones((2, 3))), np.full((2, 3), 2.0))
    assert len(made) == 1


@pytest.mark.parametrize(("rounds", "used"), [(1, 6), (2, 4), (3, 2), (4, 0)])
def test_the_common_noise_of_a_block_that_is_not_full(rounds, used):
    """Six samples in blocks of eight, which go on from round to round."""
    lin = SimpleNamespace(xp=np, signs=balanced((6, 5)), outputs=np.zeros((6, 5)))
    squares, own = np.array([[2.0, 2.0, 3.0, 3.0, 4.0, 4.0]]), np.array([[11.0, 12.0, 13.0, 14.0, 15.0, 16.0]])
    error = Swapped(lin, SimpleNamespace(groups=6), 0.1, 64).error((2 * rounds, np.ones((1, 6)), squares, own))
    residual, whole = (7 / 8 * squares.sum() / (8 * 3 * rounds), 7 / 8 * own.sum() / (2 * 6 * rounds))
    expected = 6 / (2 * rounds) * (6 / 7) * residual + used * (8 - used) / 7 / rounds**2 * (whole - residual)
    assert error.variance == pytest.approx([expected])


def test_probes_that_were_not_enough_are_told_of():
    """Where as many were spent as without max_probes=; fewer are the user's own choice."""
    rng = np.random.default_rng(0)
    model = lnp_numpy.LinearModel(weight=rng.normal(size=(30, 100)))
    batch = (rng.normal(size=(3, 30)), rng.normal(size=(3, 100)))

    def said(**options):
        d = lnp.decompose(model, batch, estimator="joint", **options)
        return [note for note in d.notes if "less certain than rtol" in note]

    assert said(rtol=1e-4) == [
        "chi_net is less certain than rtol=0.0001 asks for, after 64 probes: a larger batch, or samples that do not "
        "interact, would need fewer"
    ]
    assert said(rtol=1e-4, max_probes=63) == said(rtol=0.1) == said(rtol=0.0) == []
    response = lnp.cross_response(model, batch, batch, estimator="joint", rtol=1e-4)
    spectrum = lnp.spectrum(model, batch, estimator="joint", rtol=1e-4)
    for d in (response.trained, response.measured, spectrum.decomposition):
        assert "less certain than rtol=0.0001" in d.notes[-1]
        assert d.rtol == 0


def test_a_pilot_without_the_largest_sample_has_no_more_freedom_than_that_one():
    jacobian, gradient = network(64, 5, sizes=(30, 10))
    signs = balanced(gradient.shape)
    missed = next(n for n in range(64) if n not in signs.drawn(32))
    jacobian = {name: array.copy() for name, array in jacobian.items()}
    for array in jacobian.values():
        array[missed] *= 30
    lin = record(jacobian, gradient, subset=drawn(jacobian))
    probe = trace.per_sample_probe(lin, ROWS)
    pair = lin.signs.pairs(0)
    values = probe.square_norms(pair.first)
    error = Swapped(lin, probe, 0.1, 64)._by_pilot(values, pair.second)
    assert error.freedom == pytest.approx(np.sum(values[0] ** 2) ** 2 / np.sum(values[0] ** 4))
    assert error.freedom < 1.01
