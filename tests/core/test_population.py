"""The population's rate, position and noise scale, from batches whose population is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from core.dense import drawn, kernel, network, record
from lnp.contract.linearization import GradientPass
from lnp.results.decomposition import decompose

SAMPLES, OUTPUTS = 5, 3
JACOBIAN, GRADIENT = network(SAMPLES, OUTPUTS)
VALUES = ("rate", "chi_pos", "noise_scale")


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
    assert d.population.noise_scale == pytest.approx((squares - d.population.rate) / d.population.rate, rel=1e-12)


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


def test_the_probing_adds_to_the_error():
    """The trace's relative standard error beside the jackknife's, for the same samples' traces."""
    batch = record(*of_samples(range(SAMPLES)), separable=True)
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
