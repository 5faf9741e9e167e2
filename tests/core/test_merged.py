"""One decomposition from those of a batch's parts, against the whole batch measured at once."""

import dataclasses

import numpy as np
import pytest

from core.dense import network, record
from lnp.contract.trees import map_leaves
from lnp.estimators.population import Samples
from lnp.estimators.signs import seed_of_part
from lnp.losses.doubts import CONSTANT
from lnp.losses.sample_losses import SampleLosses
from lnp.results.decomposition import Total
from lnp.results.finished import explained, finished
from lnp.results.merged import OF_THE_WHOLE, DecomposePart, merged

SIZES, OUTPUTS, TERMS, WEIGHTS = (5, 1, 2, 6), 3, (5, 2, 4, 12), (0.2, 0.3, 0.1, 0.4)
JACOBIAN, GRADIENT = network(sum(SIZES), OUTPUTS, sizes=(5, 2, 4))
ROWS = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr", "loss_terms")
EXACT = {"estimator": "exact", "rtol": 0.01, "max_probes": 64, "by_layer": True, "population": True}
EXACT["sample_losses"] = False


def part(lin, **settings):
    """A part, with its numbers on the host, as a backend hands them over."""

    def number(leaf):
        return float(leaf) if isinstance(leaf, np.ndarray | np.generic) and leaf.ndim == 0 else leaf

    return map_leaves(number, DecomposePart(**EXACT | settings)(lin))


def values(of):
    """The numbers of a layer or of population values."""
    return {name: float(value) for name, value in vars(of).items()}


def rows_of(jacobian, rows):
    return {name: array[rows] for name, array in jacobian.items()}


def of_whole(**changes):
    """The whole batch: the parts' Jacobians below each other, and a_p g_p."""
    g = np.concatenate([a * GRADIENT[rows] for a, rows in zip(WEIGHTS, ROWS, strict=True)])
    shares = np.concatenate([np.full(len(rows), a / len(rows)) for a, rows in zip(WEIGHTS, ROWS, strict=True)])
    loss = np.asarray(np.dot(WEIGHTS, TERMS))  # a part's loss is its number of terms
    return record(JACOBIAN, g, terms=sum(TERMS), loss=loss, separable=True, sample_terms=shares, **changes)


def of_parts(**changes):
    kept = zip(ROWS, TERMS, strict=True)
    kept = [(rows, {"terms": n, "loss": np.asarray(float(n))} | changes) for rows, n in kept]
    return [record(rows_of(JACOBIAN, rows), GRADIENT[rows], separable=True, **own) for rows, own in kept]


def the_gradient(found, weights=WEIGHTS):
    """sum_p a_p J_p^T g_p, of gradients that were divided by their magnitudes."""
    names = found[0].vector
    return {name: sum(a * p.magnitude * p.vector[name] for a, p in zip(weights, found, strict=True)) for name in names}


def products_of(records, u):
    """<J_m^T g_m, u> for all samples of each part."""
    return [np.sum(lin.loss_gradient * lin.jvp(u), axis=1) for lin in records]


def the_merged(records, products=True, **settings):
    found = [part(lin, **settings) for lin in records]
    u = the_gradient(found)
    squares = {name: float(np.sum(array**2)) for name, array in u.items()}
    known = products_of(records, u) if products else None
    return merged([one.decomposition for one in found], WEIGHTS, squares, True, known)


def the_whole(**settings):
    return explained(part(of_whole(), **settings).decomposition)


def test_parts_of_unequal_size_terms_and_weight():
    found, expected = the_merged(of_parts()), the_whole()
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
    assert (found.samples, found.outputs, found.estimator) == (14, OUTPUTS, "exact")
    assert isinstance(found.outputs, int)
    assert found.preference == pytest.approx(expected.preference, rel=1e-12)
    for layer, one in expected.layers.items():
        assert values(found.layers[layer]) == pytest.approx(values(one), rel=1e-12)


def test_population_of_all_samples_with_the_jackknife_of_the_whole():
    found, expected = the_merged(of_parts()), the_whole()
    assert values(found.population) == pytest.approx(values(expected.population), rel=1e-10)


def test_jackknife_of_some_samples_of_each_part_is_right_on_average():
    """Squared errors from 3 of 48 samples in each of three parts, over draws, against those from all samples."""
    jacobian, g = network(144, OUTPUTS)
    records = [record(rows_of(jacobian, own), g[own], separable=True) for own in np.split(np.arange(144), 3)]
    found, weights = [part(lin) for lin in records], [1 / 3] * 3
    u = the_gradient(found, weights)
    squares = {name: float(np.sum(array**2)) for name, array in u.items()}
    every, parts = products_of(records, u), [one.decomposition for one in found]

    def of_some(index):
        some = [replace(d.contributions, d.contributions.samples, i) for d, i in zip(parts, index, strict=True)]
        pairs = zip(parts, some, strict=True)
        fewer = [dataclasses.replace(d, contributions=contributions) for d, contributions in pairs]
        products = [p[i] for p, i in zip(every, index, strict=True)]
        return merged(fewer, weights, squares, True, products).population.rate_stderr ** 2

    def replace(contributions, samples, index):
        return contributions._replace(samples=Samples(*(values[index] for values in samples)))

    rng = np.random.default_rng(0)
    variances = [of_some([rng.permutation(48)[:3] for _ in parts]) for _ in range(600)]
    expected, error = of_some([np.arange(48)] * 3), np.std(variances) / np.sqrt(600)
    assert abs(np.mean(variances) - expected) < 3 * error
    assert error < 0.03 * expected  # so that what the means have from few samples shows, which is 0.2, or 0.1


def test_errors_without_products_are_no_smaller():
    """The parts' own errors, averaged: larger, and of the same order."""
    jacobian, g = network(64, OUTPUTS, sizes=(40, 30))
    rows = np.split(np.arange(64), 4)
    records = [record(rows_of(jacobian, own), g[own], separable=True) for own in rows]
    found = [part(lin) for lin in records]
    u = the_gradient(found, [0.25] * 4)
    squares = {name: float(np.sum(array**2)) for name, array in u.items()}
    parts = [one.decomposition for one in found]
    known, unknown = (merged(parts, [0.25] * 4, squares, True, p).population for p in (products_of(records, u), None))
    assert unknown.rate == known.rate
    for name in ("rate_stderr", "chi_pos_stderr"):
        assert (
            1 < getattr(unknown, name) / getattr(known, name) < 4
        )  # sqrt(64 / 16) at most where noise is all there is
    low, high = unknown.noise_scale_low, unknown.noise_scale_high
    assert low <= known.noise_scale_low
    assert high >= known.noise_scale_high


def test_errors_are_those_of_parts_left_out():
    """SE^2 = (P - 1)/P sum_p (value without part p - their mean)^2, of 12 parts unlike in size, terms and weight."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 4, 12)
    n, rows = sizes.sum(), np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])
    jacobian, g = network(n, OUTPUTS)
    jacobian = {name: 1 + array for name, array in jacobian.items()}  # so that the rate is above zero
    kept = enumerate(rows)
    found = [part(record(rows_of(jacobian, own), 1 + g[own], terms=2 + p, separable=True)) for p, own in kept]
    a = rng.uniform(0.02, 0.1, 12)

    def measured(some, **known):
        """The population's values, and the share of the rate in the mean squared gradient."""
        weights = a[some] * a.sum() / a[some].sum()
        u = the_gradient([found[p] for p in some], weights)
        squares = {name: float(np.sum(array**2)) for name, array in u.items()}
        values = merged([found[p].decomposition for p in some], weights, squares, True, **known).population
        samples = sizes[some].sum()
        spread = samples * np.sum((weights / a.sum()) ** 2 / sizes[some])
        return values, values.rate / (values.gradient_noise + spread * values.rate), spread

    u = [the_gradient([one], [weight]) for one, weight in zip(found, a, strict=True)]
    flat = np.stack([np.concatenate([array.ravel() for array in one.values()]) for one in u])
    products = [(float(one @ flat.sum(axis=0)), float(one @ one)) for one in flat]
    whole, share, spread = measured(np.arange(12), part_products=products)
    without = [measured(np.delete(np.arange(12), p)) for p in range(12)]
    for name in ("rate", "chi_pos"):
        values = [getattr(values, name) for values, *_ in without]
        assert getattr(whole, f"{name}_stderr") == pytest.approx(np.sqrt(11 * np.var(values)), rel=1e-9), name
    error = np.sqrt(11 * np.var([share for _, share, _ in without]))
    assert whole.noise_scale_low == pytest.approx(1 / (share + 2 * error) - spread, rel=1e-9)
    assert whole.noise_scale_low > 0


def test_few_parts_are_not_left_out():
    """Below twelve the parts' own errors are averaged, as where nothing is known of their products."""
    records, weights = of_parts()[::3], (0.4, 0.6)
    parts = [part(lin).decomposition for lin in records]
    squares = dict.fromkeys(JACOBIAN, 1.0)
    plain, known = (merged(parts, weights, squares, True, part_products=p) for p in (None, [(1.0, 1.0)] * 2))
    assert values(known.population) == values(plain.population)
    errors = [finished(one).population.rate_stderr for one in parts]
    assert plain.population.rate_stderr == pytest.approx(np.hypot(0.4 * errors[0], 0.6 * errors[1]), rel=1e-12)
    single = [part(lin).decomposition for lin in of_parts()]  # of which one has a single sample, which tells no error
    assert np.isnan(merged(single, WEIGHTS, squares, True).population.rate_stderr)


@pytest.mark.parametrize("products", [True, False])
def test_errors_go_with_the_loss(products):
    """Of 3 L the rate and its error are 9 times as large, and the position and its error are the same."""
    records, results = of_parts()[::3], []
    found = [part(lin) for lin in records]
    for weights in ((0.2, 0.5), (0.6, 1.5)):
        u = the_gradient(found, weights)
        squares = {name: float(np.sum(array**2)) for name, array in u.items()}
        known = products_of(records, u) if products else None
        results.append(merged([one.decomposition for one in found], weights, squares, True, known).population)
    one, three = results
    for name, power in (("rate", 9), ("rate_stderr", 9), ("chi_pos", 1), ("chi_pos_stderr", 1), ("noise_scale_low", 1)):
        assert getattr(three, name) == pytest.approx(power * getattr(one, name), rel=1e-9), name


def test_error_bars_of_parts_hold():
    """Parts have signs of their own: the truth is within the errors as often as Student's t with their freedom says."""
    from scipy.stats import t

    jacobian, g = network(36, 6)
    rows, exact = np.split(np.arange(36), [20]), float(sum(np.sum(array**2) for array in jacobian.values()))
    settings = EXACT | {"estimator": "per_sample", "rtol": 0.0, "max_probes": 4, "by_layer": False, "population": False}
    within, expected = 0, 0.0
    for seed in range(200):
        records = [record(rows_of(jacobian, own), g[own], seed=seed_of_part(seed, p)) for p, own in enumerate(rows)]
        d = merged([part(lin, **settings).decomposition for lin in records], (0.5, 0.5), {"layer0.weight": 1.0})
        within += abs(d.chi_net * d.loss_terms - exact) < d.chi_net_stderr * d.loss_terms
        expected += 2 * t.cdf(1, d.degrees_of_freedom) - 1
    assert abs(within - expected) < 3 * np.sqrt(200 * 0.68 * 0.32)


def test_freedom_is_satterthwaites():
    parts = []
    for size, freedom in ((3.0, 4.0), (1.0, 10.0)):
        lin = of_parts()[0]
        d = part(lin).decomposition
        parts.append(type(d)(**vars(d) | {"chi_net_stderr": size, "degrees_of_freedom": freedom}))
    found = merged(parts, (0.5, 0.5), dict.fromkeys(JACOBIAN, 1.0), True)
    assert found.degrees_of_freedom == pytest.approx((9 + 1) ** 2 / (81 / 4 + 1 / 10))
    assert found.chi_net_stderr == pytest.approx(np.hypot(3, 1) / 2)
    assert the_merged(of_parts()).degrees_of_freedom == 1e6
    parts[0] = dataclasses.replace(parts[0], chi_net_stderr=np.nan)
    assert merged(parts, (0.5, 0.5), dict.fromkeys(JACOBIAN, 1.0), True).degrees_of_freedom == 0


def test_gradients_that_float32_cannot_square():
    parts = []
    for rows in ROWS:
        lin = record(rows_of(JACOBIAN, rows), GRADIENT[rows] * 1e-25, dtype="float32", separable=True)
        parts.append(part(lin))
    u = the_gradient(parts)
    squares = {name: float(np.sum(np.asarray(array, dtype=float) ** 2)) for name, array in u.items()}
    found = merged([one.decomposition for one in parts], WEIGHTS, squares, True)
    expected = the_merged(of_parts())
    assert found.rate == pytest.approx(expected.rate * 1e-50, rel=1e-5)
    assert found.population.rate == pytest.approx(expected.population.rate * 1e-50, rel=1e-4)
    assert found.chi_pos == pytest.approx(expected.chi_pos, rel=1e-5)


def test_single_samples_make_a_population():
    """Processes with one sample each: parts know no spread, the whole does."""
    rows = [[n] for n in range(6)]
    records = [record(rows_of(JACOBIAN, own), GRADIENT[own], separable=True) for own in rows]
    found = [part(lin) for lin in records]
    weights = [1 / 6] * 6
    u = the_gradient(found, weights)
    squares = {name: float(np.sum(array**2)) for name, array in u.items()}
    parts = [one.decomposition for one in found]
    d = merged(parts, weights, squares, True, products_of(records, u))
    chosen = list(range(6))
    whole = part(record(rows_of(JACOBIAN, chosen), GRADIENT[chosen] / 6, separable=True))
    assert values(d.population) == pytest.approx(values(finished(whole.decomposition).population), rel=1e-10)
    assert merged(parts[:3], [1 / 3] * 3, squares, True).population is not None
    d = merged(parts[:2], [0.5, 0.5], squares, True)
    assert d.population is None
    assert d.notes[-1] == "no population values: fewer than three samples tell nothing about their spread"


def test_notes_names_and_losses_of_samples():
    made = []
    for lin, note in zip(of_parts(), ("one", "two", "one", "two"), strict=True):
        d = part(lin).decomposition
        of_samples = SampleLosses(np.arange(d.samples), np.full(d.samples, 1 / d.samples))
        made.append(type(d)(**vars(d) | {"notes": (note, "all"), "sample_losses": of_samples, "loss_name": "mine"}))
    d = merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True)
    assert d.notes == ("one", "all", "two")
    made[1] = dataclasses.replace(made[1], total=Total(1.0, 1.0))
    assert OF_THE_WHOLE in merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True).notes
    assert d.loss_name == "mine"
    assert d.sample_losses.shares == pytest.approx(np.repeat(np.divide(WEIGHTS, SIZES), SIZES))
    assert d.sample_losses.parts == pytest.approx(
        np.concatenate([w * np.arange(n) for w, n in zip(WEIGHTS, SIZES, strict=True)])
    )
    assert d.contributions is None
    assert d.magnitude == 1


def test_other_estimators_and_widths():
    joint = part(of_parts()[0], estimator="joint", population=False).decomposition
    exact = part(of_parts()[1], population=False).decomposition
    wider = type(exact)(**vars(exact) | {"outputs": 10})
    d = merged([wider, joint], (0.5, 0.5), dict.fromkeys(JACOBIAN, 1.0), True)
    assert d.estimator == "joint"
    assert d.probes == joint.probes > exact.probes
    assert d.samples * d.outputs == pytest.approx(1 * 10 + 5 * OUTPUTS)
    assert "parts of the batch took different estimators: joint, exact" in d.notes


def test_a_loss_gradient_of_zero():
    parts = [part(record(JACOBIAN, 0 * GRADIENT, separable=True)).decomposition]
    d = merged(parts, [1.0], dict.fromkeys(JACOBIAN, 0.0), True)
    assert d.rate == d.chi_loss == 0
    assert np.isnan(d.chi_pos)
    assert "the loss gradient is zero: chi_pos is 0/0, nan" in d.notes


def test_one_weight_for_each_part():
    with pytest.raises(ValueError, match="Received 0 parts and 1 weights"):
        merged([], [1.0], {})
    with pytest.raises(ValueError, match="Received 0 parts and 0 weights"):
        merged([], [], {})
    with pytest.raises(ValueError, match="Received 1 parts and 2 weights"):
        merged([part(of_parts()[0]).decomposition], [0.5, 0.5], {})


@pytest.mark.parametrize(("constant", "said"), [([True] * 4, True), ([True, True, False, True], False)])
def test_one_target_is_noted_where_all_parts_have_it(constant, said):
    made = [
        dataclasses.replace(part(lin).decomposition, evidence={"constant": (np.asarray(same), np.array([1.0, 1.0]))})
        for lin, same in zip(of_parts(), constant, strict=True)
    ]
    assert (CONSTANT in merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True).notes) is said


def test_shares_of_samples_add_up_to_one_whatever_the_weights():
    made = []
    for lin in of_parts():
        d = part(lin).decomposition
        of_samples = SampleLosses(np.ones(d.samples), np.full(d.samples, 1 / d.samples))
        made.append(dataclasses.replace(d, sample_losses=of_samples))
    found = merged(made, [3 * a for a in WEIGHTS], dict.fromkeys(JACOBIAN, 1.0), True).sample_losses
    assert found.shares == pytest.approx(np.repeat(np.divide(WEIGHTS, SIZES), SIZES))
    assert found.parts == pytest.approx(np.repeat(np.multiply(3, WEIGHTS), SIZES))


def test_terms_are_whole_where_they_can_be():
    made = [part(lin).decomposition for lin in of_parts()]
    assert isinstance(merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True).loss_terms, int)
    made[0] = dataclasses.replace(made[0], loss_terms=5.5)
    assert merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True).loss_terms == sum(TERMS) + 0.5


@pytest.mark.parametrize("place", [0, 3])
def test_digits_that_one_part_has_lost_are_noted(place):
    made = [part(lin).decomposition for lin in of_parts()]
    assert merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True).notes == ()
    made[place] = dataclasses.replace(made[place], least=1e9)
    assert "lost digits" in merged(made, WEIGHTS, dict.fromkeys(JACOBIAN, 1.0), True).notes[0]


def test_a_part_of_one_sample_or_two_tells_no_errors():
    """Leaving out one leaves no pair."""
    own = [part(lin).decomposition.contributions.errors for lin in of_parts()]
    assert [bool(np.isnan(errors).all()) for errors in own] == [size <= 2 for size in SIZES]
