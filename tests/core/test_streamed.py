"""Many batches measured as one: against the batch that holds all of their samples."""

import contextlib
import itertools
import math
import re

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.results import streamed
from lnp.results.streamed import projected

RNG = np.random.default_rng(0)
MODEL = lnp_numpy.LinearModel(weight=RNG.normal(size=(5, 3)))
X, Y = RNG.normal(size=(61, 5)), RNG.integers(0, 3, 61)
ENDS = (0, 7, 8, *range(13, 62, 4))
NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "loss_terms", "samples", "outputs")


def pieces(x=X, y=Y, ends=ENDS):
    return [(x[start:stop], y[start:stop]) for start, stop in itertools.pairwise(ends)]


def agree(found, expected, names=NUMBERS, rtol=1e-12):
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rtol), name


@pytest.mark.parametrize("given", [pieces, lambda: iter(pieces()), lambda: (batch for batch in pieces())])
def test_batches_are_measured_as_the_batch_of_all_samples(given):
    found = lnp.decompose(MODEL, given(), batches=math.inf, estimator="exact", by_layer=True)
    whole = lnp.decompose(MODEL, (X, Y), estimator="exact", by_layer=True)
    agree(found, whole)
    agree(found.population, whole.population, ("rate", "chi_pos", "noise_scale", "gradient_noise"))
    for name in ("rate_stderr", "chi_pos_stderr"):  # of parts left out, not of samples
        assert 0.5 < getattr(found.population, name) / getattr(whole.population, name) < 2
    agree(found.layers["weight"], whole.layers["weight"], ("rate", "chi_net", "chi_pos"))
    assert "15 batches, measured one after the other" in found.notes


def test_labels_that_are_ignored_count_as_they_do_in_one_mean():
    y = np.where(RNG.random(61) < 0.6, -100, Y)
    y[7], y[8:13] = -100, -100  # batches without any label
    whole = lnp.decompose(MODEL, (X, y), estimator="exact")
    found = lnp.decompose(MODEL, pieces(y=y), batches=math.inf, estimator="exact")
    agree(found, whole, ("loss", "rate", "chi_loss", "loss_terms"))
    assert "2 of 15 batches have no terms that count and add nothing" in found.notes
    with pytest.raises(ValueError, match="None of 2 batches has terms"):
        lnp.decompose(MODEL, [(X, np.full(61, -100))] * 2, batches=2)


def test_a_loss_that_is_a_sum_is_averaged_over_batches_and_says_so():
    def total(outputs, targets):
        return np.sum((outputs - np.eye(3)[targets]) ** 2), 2 * (outputs - np.eye(3)[targets])

    batches = pieces(X[:60], Y[:60], range(0, 61, 15))
    found = lnp.decompose(MODEL, batches, total, batches=4, loss_terms=1, estimator="exact")
    whole = lnp.decompose(MODEL, (X[:60], Y[:60]), total, loss_terms=1, estimator="exact")
    assert [note for note in found.notes if "as a sum does" in note and "over 4 batches" in note]
    assert found.rate == pytest.approx(whole.rate / 4**2)
    for name in ("loss", "chi_loss", "chi_net"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name) / 4), name
    assert found.chi_pos == pytest.approx(whole.chi_pos)
    singles = pieces(X[:4], Y[:4], range(5))
    assert not any("as a sum does" in note for note in lnp.decompose(MODEL, singles, batches=4).notes)


def test_as_many_batches_are_drawn_as_are_asked_for():
    drawn = iter(pieces())
    found = lnp.decompose(MODEL, drawn, batches=3, estimator="exact")
    agree(found, lnp.decompose(MODEL, (X[:13], Y[:13]), estimator="exact"))
    assert len(list(drawn)) == len(ENDS) - 4
    assert lnp.decompose(MODEL, pieces(), batches=500).samples == 61


def test_errors_are_those_of_batches_that_are_left_out():
    sizes = np.linspace(1, 10, 60)[:, None]  # so that batches have gradients of other magnitudes
    model, y = lnp_numpy.LinearModel(weight=np.zeros((5, 2))), sizes * (1 + RNG.normal(size=(60, 2)))
    batches = pieces(1 + X[:60], y, range(0, 61, 4))
    found = lnp.decompose(model, batches, batches=math.inf, estimator="exact").population
    rest = [batches[:place] + batches[place + 1 :] for place in range(len(batches))]
    without = [lnp.decompose(model, some, batches=math.inf, estimator="exact").population for some in rest]
    for name in ("rate", "chi_pos"):
        values = np.array([getattr(one, name) for one in without])
        expected = np.sqrt((len(values) - 1) * np.var(values))
        assert getattr(found, f"{name}_stderr") == pytest.approx(expected, rel=0.03), name


def test_errors_of_population_values_hold():
    truth = np.random.default_rng(5).normal(size=(4, 1))
    model, rates, errors = lnp_numpy.LinearModel(weight=np.zeros((4, 1))), [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(96, 4))
        y = 0.2 * x @ truth + rng.normal(size=(96, 1))
        d = lnp.decompose(model, pieces(x, y, range(0, 97, 4)), batches=math.inf, estimator="exact")
        rates.append(d.population.rate)
        errors.append(d.population.rate_stderr)
    expected = float(np.sum((2 * 0.2 * truth) ** 2))
    deviations = (np.array(rates) - expected) / errors
    assert 0.6 < np.mean(np.abs(deviations) < 1) < 0.8
    assert 0.88 < np.mean(np.abs(deviations) < 2) < 0.99
    assert 0.8 < np.mean(errors) / np.std(rates) < 1.25
    assert abs(np.mean(rates) - expected) < 3 * np.std(rates) / 150**0.5


@pytest.mark.parametrize(("given", "asked"), [(16, 0.04), (10_000, 0.5), (math.inf, 0.01)])
def test_each_batch_is_as_precise_as_all_of_them_need(given, asked, monkeypatch):
    """r sqrt(B), up to a half; r itself where it is not known how many there will be; B at most as a list has."""
    seen, evaluate = [], streamed.evaluate_gradient
    monkeypatch.setattr(streamed, "evaluate_gradient", lambda one, *rest: seen.append(one.rtol) or evaluate(one, *rest))
    lnp.decompose(MODEL, (batch for batch in pieces()), batches=given, rtol=0.01)
    assert seen == pytest.approx([asked] * 15)
    seen.clear()
    lnp.decompose(MODEL, pieces(), batches=given, rtol=0.01)
    assert seen == pytest.approx([0.01 * math.sqrt(15)] * 15)


def test_batches_that_count_alike():
    """L = sum_b L_b / `of`, whatever the batches hold and however many there are."""
    batches = pieces()[:3]
    found = lnp.decompose(MODEL, streamed.Alike(batches, 4), batches=3, estimator="exact")
    assert found.loss == pytest.approx(sum(lnp.decompose(MODEL, batch).loss for batch in batches) / 4, rel=1e-12)
    assert found.rate == pytest.approx(lnp.gradient_gram(MODEL, batches).matrix.sum() / 4**2, rel=1e-12)


def test_sample_losses_of_all():
    found = lnp.decompose(MODEL, pieces(), batches=math.inf, sample_losses=True).sample_losses
    assert np.sum(found.parts) == pytest.approx(lnp.decompose(MODEL, (X, Y)).loss)
    assert found.shares == pytest.approx(np.full(61, 1 / 61))


def test_tiny_gradients_keep_their_digits():
    x = X.astype(np.float32)
    model = lnp_numpy.LinearModel(weight=np.zeros((5, 1), dtype=np.float32))
    y = (1e-25 * RNG.normal(size=(61, 1))).astype(np.float32)
    found = lnp.decompose(model, pieces(x, y), batches=math.inf, estimator="exact")
    agree(found, lnp.decompose(model, (x, y), estimator="exact"), rtol=1e-4)
    assert found.rate > 0


def test_projections_keep_inner_products():
    u = {"a": RNG.normal(size=(70, 90)), "b": RNG.normal(size=3)}
    w = {name: part + RNG.normal(size=part.shape) for name, part in u.items()}
    product = sum(np.sum(u[name] * w[name]) for name in u)
    size = math.sqrt(math.prod(sum(np.sum(part**2) for part in v.values()) for v in (u, w)))
    assert projected(u).shape == (64**2,)
    assert abs(projected(u) @ projected(w) - product) < 4 * size / 64
    assert abs(projected({"a": np.ones(10**6)}) @ projected({"a": np.ones(10**6)}) / 1e6 - 1) < 0.1


WRONG = {
    "a mapping": (lambda: ({"x": X}, {"batches": 2}), TypeError, "batches= was given with a dict.*Leave batches="),
    "nothing to iterate": (lambda: (3, {"batches": 2}), TypeError, "batches= was given with a int"),
    "no batch": (lambda: (pieces(), {"batches": 0}), ValueError, "batches is 0. Expected how many"),
    "half a batch": (lambda: (pieces(), {"batches": 1.5}), ValueError, "batches is 1.5"),
    "a truth": (lambda: (pieces(), {"batches": True}), ValueError, "batches is True"),
    "none there": (lambda: ([], {"batches": 2}), ValueError, "gave no batch"),
    "a preconditioner": (lambda: (pieces(), {"batches": 2, "preconditioner": []}), ValueError, "Received both"),
    "a key": (lambda: (pieces(), {"batches": 2, "seed": "a"}), TypeError, "seed is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_streamed_is_refused(name):
    make, error, message = WRONG[name]
    batch, options = make()
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        lnp.decompose(MODEL, batch, **options)


@pytest.mark.parametrize(("given", "length"), [(1, 1), (4, 4), (math.inf, 15)])
def test_each_batch_is_one_step_of_the_progress(given, length, monkeypatch):
    steps = []

    @contextlib.contextmanager
    def bar(what, total):
        steps.append(total)
        yield steps.append

    monkeypatch.setattr("lnp.results.streamed.bar", bar)
    lnp.decompose(MODEL, list(pieces()), batches=given)
    assert steps == [length, *[1] * length]


def test_entries_of_a_large_parameter_are_all_projected():
    """Its signs are drawn by pieces."""
    last = np.zeros(2**20 + 20_000)
    last[2**20 :] = 1.0
    assert projected({"a": last}) @ projected({"a": last}) == pytest.approx(20_000, rel=0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_of_one_term_in_each_batch_is_told_of_where_there_are_several(count):
    found = lnp.decompose(MODEL, pieces()[2:4], batches=count, loss_terms=1)
    assert any(note == streamed.SUMS.format(count) for note in found.notes) == (count == 2)
