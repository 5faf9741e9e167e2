"""The population's rate, position and noise scale, from batches whose population is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from core.dense import drawn, independent, kernel, network, record
from lnp.contract.linearization import GradientPass
from lnp.estimators.population import why_none
from lnp.results.decomposition import decompose

SAMPLES, OUTPUTS = 5, 3
JACOBIAN, GRADIENT = network(SAMPLES, OUTPUTS)
VALUES = ("rate", "chi_pos")


def of_samples(chosen):
    """The batch of some samples: the loss is a mean over them."""
    chosen = list(chosen)
    jacobian = {name: array[chosen] for name, array in JACOBIAN.items()}
    return jacobian, GRADIENT[chosen] / len(chosen)


def measured(chosen=range(SAMPLES), **options):
    return decompose(record(*of_samples(chosen), separable=True), estimator="exact", population=True, **options)


def gradients():
    """The gradient of each sample's own loss, (N, P)."""
    return np.concatenate([np.einsum("nk,nkp->np", GRADIENT, array) for array in JACOBIAN.values()], axis=1)


def test_rate_is_the_mean_over_pairs_of_different_samples():
    own = gradients()
    pairs = [own[i] @ own[j] for i, j in itertools.permutations(range(SAMPLES), 2)]
    assert measured().population.rate == pytest.approx(np.mean(pairs), rel=1e-12)


def test_rate_is_unbiased():
    """Over every batch of three samples drawn with replacement from the five: exactly the population's."""
    batches = list(itertools.product(range(SAMPLES), repeat=3))
    found = [measured(batch) for batch in batches]
    expected = np.sum(gradients().mean(axis=0) ** 2)
    assert np.mean([d.population.rate for d in found]) == pytest.approx(expected, rel=1e-12)
    noise = np.sum((gradients() - gradients().mean(axis=0)) ** 2) / SAMPLES  # tr Cov
    assert np.mean([d.rate for d in found]) == pytest.approx(expected + noise / 3, rel=1e-12)


def test_position_and_noise_scale():
    d, theta, g = measured(), kernel(JACOBIAN), GRADIENT.reshape(-1) / SAMPLES
    assert d.population.chi_pos == pytest.approx(d.population.rate / (g @ g) / np.trace(theta), rel=1e-12)
    assert d.population.chi_pos == pytest.approx(d.population.rate / d.chi_loss / d.chi_net, rel=1e-12)
    squares = np.mean(np.sum(gradients() ** 2, axis=1))
    assert d.population.gradient_noise == pytest.approx(squares - d.population.rate, rel=1e-12)
    expected = (squares - d.population.rate) / d.population.rate if d.population.rate > 0 else np.inf
    assert d.population.noise_scale == pytest.approx(expected, rel=1e-12)


def test_the_noise_scale_has_the_interval_of_the_share_that_is_no_noise():
    """u = rate / mean ||G||^2, jackknifed, and 1/u - 1 at u less and plus two standard errors."""
    rng = np.random.default_rng(8)
    for own in (gradients(), 2 + rng.normal(size=(SAMPLES, 6))):  # within two errors of zero, and well above

        def share(rows, own=own):
            part = own[rows]
            pairs = [part[i] @ part[j] for i, j in itertools.permutations(range(len(rows)), 2)]
            return np.mean(pairs) / np.mean(np.sum(part**2, axis=1))

        whole = list(range(SAMPLES))
        u, without = share(whole), [share([n for n in whole if n != left]) for left in whole]
        error = ((SAMPLES - 1) / SAMPLES * np.sum((without - np.mean(without)) ** 2)) ** 0.5
        found = of_gradients(own)
        assert found.noise_scale_low == pytest.approx(max(0, 1 / (max(u, 0) + 2 * error) - 1), rel=1e-9)
        high = 1 / (u - 2 * error) - 1 if u > 2 * error else np.inf
        assert found.noise_scale_high == pytest.approx(high, rel=1e-9)
        assert found.noise_scale == pytest.approx(1 / u - 1 if u > 0 else np.inf, rel=1e-9)
        assert found.noise_scale_stderr == (found.noise_scale_high - found.noise_scale_low) / 4
    assert np.isfinite(high)


def test_gradients_that_have_nothing_in_common():
    """Orthogonal ones: the rate is zero, and the noise scale is above all numbers."""
    p = of_gradients(np.eye(3))
    assert (p.rate, p.chi_pos, p.noise_scale, p.noise_scale_high) == (0, 0, np.inf, np.inf)
    assert p.gradient_noise == pytest.approx(1, rel=1e-12)


def drawn_batch(rng, samples, noise_scale, parameters=12):
    """Gradients of single samples, whose mean has length 1 and whose covariance the trace `noise_scale`."""
    own = rng.normal(size=(samples, parameters)) * (noise_scale / parameters) ** 0.5
    own[:, 0] += 1
    return own


def of_gradients(own, weights=None):
    """The population's values of samples with these gradients of their sums, (N, P), and weights."""
    total = len(own) if weights is None else np.sum(weights)
    batch = record({"w": own[:, None, :]}, np.full((len(own), 1), 1 / total), separable=True)
    batch = replace(batch, sample_terms=weights)
    return decompose(batch, estimator="exact", population=True).population


@pytest.mark.parametrize(("samples", "noise_scale"), [(8, 1000.0), (8, 8.0), (32, 320.0), (128, 1300.0), (128, 40.0)])
def test_the_intervals_cover(samples, noise_scale):
    """Also where noise dominates, as the jackknife of the ratio did not (10% to 56% for 68%): the true noise scale is
    in the interval of two standard errors in 92% of draws and more, the true rate within one in 60%, two in 90%.
    No noise scale is negative."""
    rng, hits = np.random.default_rng(samples), []
    for _ in range(150):
        p = of_gradients(drawn_batch(rng, samples, noise_scale))
        assert 0 <= p.noise_scale_low <= p.noise_scale <= p.noise_scale_high
        inside = p.noise_scale_low <= noise_scale <= p.noise_scale_high
        off = abs(p.rate - 1) / p.rate_stderr
        hits.append([inside, off < 1, off < 2, p.noise_scale_high < 1e9])
    inside, one, two, bounded = np.mean(hits, axis=0)
    assert inside > 0.92, inside
    assert (one > 0.60) & (two > 0.90), (one, two)
    if noise_scale > 9 * samples:
        assert bounded < 0.2  # nothing is known but what it is above


@pytest.fixture(scope="module")
def unequal():
    """Gradients of six samples' sums, as of padded sequences, (6, P), and their numbers of labels, (6,)."""
    rng, weights = np.random.default_rng(3), np.array([8.0, 7.0, 1.0, 2.0, 8.0, 1.0])
    own = weights[:, None] * (0.6 + rng.normal(size=(6, 4)) * (0.1 / weights[:, None]) ** 0.5)
    return own, weights


def enumerated(own, weights):
    """Relative bias over every batch of four drawn with replacement: of pairs weighed by w_n w_m, and of the mean over
    pairs as if all samples weighed the same."""
    truth, found, often = np.sum((own.mean(axis=0) / weights.mean()) ** 2), [], []
    for chosen in itertools.combinations_with_replacement(range(len(own)), 4):
        often.append(len(set(itertools.permutations(chosen))))
        rows, w = own[list(chosen)], weights[list(chosen)]
        pairs = sum(rows[i] @ rows[j] for i, j in itertools.permutations(range(4), 2))
        expected = pairs / sum(w[i] * w[j] for i, j in itertools.permutations(range(4), 2))
        rate = of_gradients(rows, w).rate
        assert rate == pytest.approx(expected, rel=1e-9)
        found.append((rate, 4 / 3 * pairs / w.sum() ** 2))
    assert sum(often) == len(own) ** 4
    return np.average(found, axis=0, weights=often) / truth - 1


def test_unequal_samples_are_unbiased_where_gradients_do_not_go_with_weights():
    """Every weight once with more and once with less than the common gradient: exactly unbiased, and the mean over
    pairs as if all samples weighed the same is not."""
    rng, weights = np.random.default_rng(0), np.array([8.0, 2.0, 1.0])
    more = rng.normal(size=(3, 4)) * weights[:, None] ** 0.5
    own = np.concatenate([weights[:, None] * 0.5 + more, weights[:, None] * 0.5 - more])
    pairs, plain = enumerated(own, np.tile(weights, 2))
    assert abs(pairs) < 1e-12
    assert plain < -0.05


def test_unequal_samples_have_a_small_bias_else(unequal):
    pairs, plain = enumerated(*unequal)
    assert abs(pairs) < 0.04
    assert abs(plain) > 1.5 * abs(pairs)


def test_the_bias_of_unequal_samples_falls_with_the_batch(unequal):
    own, weights = unequal
    truth, rng = np.sum((own.mean(axis=0) / weights.mean()) ** 2), np.random.default_rng(0)
    biases = {}
    for samples in (4, 16, 64):
        chosen = rng.integers(0, 6, (20000, samples))
        a, w = own[chosen], weights[chosen]
        off = np.sum(a.sum(axis=1) ** 2, axis=1) - np.sum(a**2, axis=(1, 2))
        biases[samples] = np.mean(off / (w.sum(axis=1) ** 2 - np.sum(w**2, axis=1))) / truth - 1
        one = of_gradients(a[0], w[0]).rate  # which is what the package computes
        assert one == pytest.approx(off[0] / (w[0].sum() ** 2 - np.sum(w[0] ** 2)), rel=1e-9)
    assert abs(biases[64]) < 0.01
    assert abs(biases[64]) < abs(biases[4])


def test_errors_of_unequal_samples_are_the_jackknife(unequal):
    own, weights = unequal
    whole = of_gradients(own, weights)

    def without(left):
        kept = [n for n in range(6) if n != left]
        return of_gradients(own[kept], weights[kept])

    for name in VALUES:
        values = np.array([getattr(without(left), name) for left in range(6)])
        expected = (5 / 6 * np.sum((values - values.mean()) ** 2)) ** 0.5
        assert getattr(whole, f"{name}_stderr") == pytest.approx(expected, rel=1e-9), name


def test_weights_count_up_to_a_factor(unequal):
    own, weights = unequal
    assert of_gradients(own, weights).noise_scale_low == pytest.approx(
        replace_weights(own, weights, 0.01 * weights).noise_scale_low, rel=1e-9
    )
    assert of_gradients(own, np.full(6, 3.0)).rate == pytest.approx(of_gradients(own / 3).rate, rel=1e-9)
    spread = 6 * np.sum(weights**2) / np.sum(weights) ** 2
    p, q = of_gradients(own, weights), np.sum(own**2) / np.sum(weights) ** 2
    assert p.gradient_noise == pytest.approx(6 * q - spread * p.rate, rel=1e-9)


def replace_weights(own, weights, said):
    batch = record({"w": own[:, None, :]}, np.full((len(own), 1), 1 / weights.sum()), separable=True)
    return decompose(replace(batch, sample_terms=said), estimator="exact", population=True).population


def test_the_errors_of_unequal_samples_cover():
    """The truth of a padded population within one standard error in 60% or more of draws, two in 90%."""
    rng, hits = np.random.default_rng(11), []
    for _ in range(200):
        weights = rng.choice([1.0, 2.0, 8.0], 24)
        own = weights[:, None] * 0.5 + rng.normal(size=(24, 3)) * weights[:, None] ** 0.5
        p = of_gradients(own, weights)
        hits.append([abs(p.rate - 0.75) < k * p.rate_stderr for k in (1, 2)])
    one, two = np.mean(hits, axis=0)
    assert (0.58 < one < 0.85) & (two > 0.88), (one, two)


def test_labels_that_are_ignored_make_samples_weigh_less():
    """By the NumPy backend: named and unknown losses, of which the latter are said to count labels."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.integers(0, 3, 7)
    y[[1, 4]] = -100
    model = lnp_numpy.LinearModel(weight=rng.normal(size=(4, 3)))
    found = lnp.decompose(model, (x, y), estimator="exact", population=True).population
    kept = y >= 0
    expected = lnp.decompose(model, (x[kept], y[kept]), estimator="exact", population=True).population
    assert found.rate == pytest.approx(expected.rate, rel=1e-9)


def test_errors_are_the_jackknife():
    """SE^2 = (N - 1)/N sum_n (value without n - their mean)^2."""
    without = [measured([n for n in range(SAMPLES) if n != left]).population for left in range(SAMPLES)]
    whole = measured().population
    for name in VALUES:
        values = np.array([getattr(one, name) for one in without])
        expected = ((SAMPLES - 1) / SAMPLES * np.sum((values - values.mean()) ** 2)) ** 0.5
        assert getattr(whole, f"{name}_stderr") == pytest.approx(expected, rel=1e-10), name


def test_errors_from_some_of_the_samples():
    """The variance among samples drawn at random is unbiased for that among all: over many draws the squared errors
    have the mean that all samples give, within 4.5 standard deviations; the values themselves do not change."""
    jacobian, gradient = network(48, OUTPUTS, seed=3)
    gradient = gradient + 0.5  # a rate that is not all noise
    measure = lambda **changes: (
        decompose(record(jacobian, gradient, separable=True, **changes), estimator="exact", population=True).population
    )
    whole, found = measure(), [measure(subset=drawn(jacobian, seed)) for seed in range(300)]
    assert {p.rate for p in found} == {whole.rate}
    for name in VALUES[:2]:  # the noise scale's too, but for rounding of its ratio
        squares = np.array([getattr(p, f"{name}_stderr") ** 2 for p in found])
        expected = getattr(whole, f"{name}_stderr") ** 2
        assert squares.std() > 0.1 * expected
        assert abs(squares.mean() - expected) < 4.5 * squares.std() / len(squares) ** 0.5


def test_a_cheaper_way_to_inner_products_is_taken():
    jacobian, gradient = of_samples(range(SAMPLES))
    plain = drawn(jacobian)

    lin = record(jacobian, gradient, separable=True)

    def gradient_pass(per_sample, products, vector):
        u, index = lin.vjp(gradient), plain(SAMPLES).index
        along = np.sum(gradient[index] * plain(SAMPLES).jvp(u), axis=1)
        return GradientPass(lin.inner_products(u, u), lin.sample_square_norms(gradient), along, index)

    changes = {"subset": lambda size: replace(plain(size), jvp=None), "jvp": None, "gradient_pass": gradient_pass}
    found = decompose(replace(lin, **changes), estimator="exact", population=True)
    for name in VALUES:
        expected = getattr(measured().population, f"{name}_stderr")
        assert getattr(found.population, f"{name}_stderr") == pytest.approx(expected, rel=1e-12)


def test_inner_products_need_a_way():
    """Without Jacobian-vector products, a backward pass that tells them, of samples that are drawn."""
    lin = record(*of_samples(range(SAMPLES)), separable=True, jvp=None)
    for changes in ({"gradient_pass": lambda *_: pytest.fail("asked")}, {"subset": drawn(JACOBIAN)}):
        assert why_none(replace(lin, **changes), True, True) == "the backend has no Jacobian-vector products"
    assert why_none(replace(lin, gradient_pass=lambda *_: None, subset=drawn(JACOBIAN)), True, True) == ""


def test_the_probing_adds_to_the_error():
    """The trace's relative standard error beside the jackknife's, for the same samples' traces."""
    batch = record(*of_samples(range(SAMPLES)), separable=True, signs=independent(GRADIENT.shape))
    d = decompose(batch, estimator="per_sample", max_probes=3, rtol=0.0, population=True)
    probing = abs(d.population.chi_pos) * d.chi_net_stderr / d.chi_net
    assert d.population.chi_pos == pytest.approx(d.population.rate / d.chi_loss / d.chi_net, rel=1e-12)
    assert d.population.chi_pos_stderr > probing > 0
    blocks = np.mean(
        [np.sum(batch.sample_square_norms(batch.signs(i))[name]) for name in JACOBIAN for i in range(3)]
    ) * len(JACOBIAN)  # fmt: skip
    assert d.chi_net * 6 == pytest.approx(blocks, rel=1e-12)
    jackknife = jackknifed_position(
        batch, np.stack([sum(batch.sample_square_norms(batch.signs(i)).values()) for i in range(3)])
    )
    assert d.population.chi_pos_stderr**2 == pytest.approx(jackknife**2 + probing**2, rel=1e-10)


def jackknifed_position(batch, probes):
    traces, own, g = probes.mean(axis=0), gradients() / SAMPLES, np.asarray(batch.loss_gradient)
    values = []
    for left in range(SAMPLES):
        kept = [n for n in range(SAMPLES) if n != left]
        square, norms = np.sum(own[kept].sum(axis=0) ** 2), np.sum(own[kept] ** 2)
        count = SAMPLES - 1
        values.append(count / (count - 1) * (square - norms) / np.sum(g[kept] ** 2) / traces[kept].sum())
    return ((SAMPLES - 1) / SAMPLES * np.sum((values - np.mean(values)) ** 2)) ** 0.5


@pytest.mark.parametrize(
    ("changes", "estimator", "words"),
    [
        ({"separable": False}, "exact", "mean over samples"),
        ({}, "joint", "one at a time"),
        ({"independent": False}, "exact", "one at a time"),
        ({"jvp": None}, "exact", "Jacobian-vector"),
    ],
)
def test_reasons_against_it(changes, estimator, words):
    d = decompose(record(JACOBIAN, GRADIENT, **{"separable": True, **changes}), estimator=estimator, population=True)
    assert d.population is None
    assert any("no population values" in note and words in note for note in d.notes)


def test_two_samples_are_too_few():
    assert measured(range(3)).population is not None
    d = measured(range(2))
    assert d.population is None
    assert any("fewer than three" in note for note in d.notes)


def test_a_failed_check_gives_nan():
    batch = record(JACOBIAN, GRADIENT, separable=True, coupled=lambda: np.asarray(True))
    d = decompose(batch, estimator="exact", population=True)
    assert all(np.isnan(getattr(d.population, name)) for name in VALUES)


def test_only_when_asked_for():
    d = decompose(record(JACOBIAN, GRADIENT, separable=True))
    assert d.population is None
    assert d.notes == ()
