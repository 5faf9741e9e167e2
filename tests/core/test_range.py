"""Numbers whose squares leave the range of float32: right, or with a note; and "zero" is said of zeros only."""

from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from core.dense import network, record
from lnp.contract.linearization import GradientPass
from lnp.contract.trees import map_leaves
from lnp.results.computations import changes, measured_change, predicted_change
from lnp.results.cross_response import cross_response_of, finished
from lnp.results.decomposition import decomposed
from lnp.results.finished import explained

JACOBIAN, GRADIENT = network(samples=6)
DRAWN = np.random.default_rng(0)
SCALES = [1e-35, 1e-30, 1e-23, 1e-20, 1.0, 1e18, 1e25, 1e35]


def measured(jacobian, gradient, dtype="float32", **changes):
    with np.errstate(all="ignore"):
        lin = record(jacobian, gradient, dtype=dtype, separable=True, **changes)
        found = decomposed(lin, estimator="exact", by_layer=True, population=True)[0]
        return explained(_floats(found))


def _floats(d):
    return map_leaves(lambda leaf: leaf.item() if hasattr(leaf, "item") else leaf, d)


@pytest.mark.parametrize("scale", SCALES)
def test_the_loss_gradient_may_have_any_size(scale):
    right, d = measured(JACOBIAN, GRADIENT, "float64"), measured(JACOBIAN, GRADIENT * scale)
    assert d.chi_pos == pytest.approx(right.chi_pos, rel=1e-5)
    assert d.chi_net == pytest.approx(right.chi_net, rel=1e-5)
    assert d.rate / scale / scale == pytest.approx(right.rate, rel=1e-5)
    assert d.chi_loss / scale / scale == pytest.approx(right.chi_loss, rel=1e-5)
    for layer, part in d.layers.items():
        assert part.chi_pos == pytest.approx(right.layers[layer].chi_pos, rel=1e-5)
        assert part.rate / scale / scale == pytest.approx(right.layers[layer].rate, rel=1e-5)
    for name in ("chi_pos", "noise_scale", "chi_pos_stderr"):
        assert getattr(d.population, name) == pytest.approx(getattr(right.population, name), rel=1e-3), name
    for name in ("rate", "rate_stderr", "gradient_noise"):
        assert getattr(d.population, name) / scale / scale == pytest.approx(getattr(right.population, name), rel=1e-3)
    assert d.notes == ()


BOUNDS = [
    ({}, ""),
    ({"magnitude": 1e154, "rate": 1.0, "chi_loss": 1e2}, "leave the range of numbers"),
    ({"magnitude": 1e154, "rate": 1e2, "chi_loss": 1.0}, "leave the range of numbers"),
    ({"chi_pos": 1.0009}, ""),
    ({"chi_pos": 1.0011}, "chi_pos is above 1"),
    ({"chi_pos": 1.2, "chi_pos_stderr": 0.3}, ""),
    ({"chi_pos": 1.2, "chi_pos_stderr": np.nan}, "chi_pos is above 1"),
]


@pytest.mark.parametrize("case", range(len(BOUNDS)))
def test_notes_at_their_bounds(case):
    changes, words = BOUNDS[case]
    d = _floats(decomposed(record(JACOBIAN, GRADIENT, separable=True), estimator="exact")[0])
    notes = explained(replace(d, **changes)).notes
    assert [words in note for note in notes] == [True] * bool(words)


def test_the_least_trace_that_has_its_digits():
    d = _floats(decomposed(record(JACOBIAN, GRADIENT), estimator="exact", by_layer=True)[0])
    name, smallest = min(d.layers.items(), key=lambda item: item[1].chi_net)
    for scale, of, said in ((6.1, d, "chi_net, chi_net of"), (6.1, smallest, f"float32: chi_net of {name} and")):
        assert said in explained(replace(d, least=scale * of.chi_net)).notes[0]
    assert explained(replace(d, least=5.9 * smallest.chi_net)).notes == ()


@pytest.mark.parametrize(("way", "used"), [(0, "joint"), (1, "exact")])
def test_the_estimator_that_was_used_is_named(way, used):
    d = _floats(decomposed(record(JACOBIAN, GRADIENT), estimator="joint")[0])
    assert explained(replace(d, way=way)).estimator == used


def test_samples_of_very_different_sizes():
    """The largest decides; what vanishes beside it vanishes in the sums, too."""
    sizes = 10.0 ** -np.arange(0, 36, 6)[:, None]
    right, d = measured(JACOBIAN, GRADIENT * sizes, "float64"), measured(JACOBIAN, GRADIENT * sizes * 1e-8)
    assert d.chi_pos == pytest.approx(right.chi_pos, rel=1e-5)
    assert d.notes == ()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_loss_changes_and_cross_responses(scale):
    other, gradient = network(samples=6, seed=3)
    for dtype in ("float64", "float32"):
        factor = scale if dtype == "float32" else 1.0
        with np.errstate(all="ignore"):
            pair = record(JACOBIAN, GRADIENT * factor, dtype=dtype), record(other, gradient * factor, dtype=dtype)
            response = finished(
                _floats(cross_response_of(*pair, lambda lin: decomposed(lin, estimator="exact", vector=True)))
            )
        update = {name: np.ones((1, j.shape[2]), dtype) for name, j in JACOBIAN.items()}
        moved = record(
            JACOBIAN, GRADIENT * factor, dtype=dtype, loss_along=lambda u, step: step * u["layer0.weight"][0, 0]
        )
        found = (
            response.rate / factor / factor, response.chi_loss / factor / factor, response.chi_pos,
            float(predicted_change(moved, update=update)) / factor, float(measured_change(moved, 0.5)) / factor,
            float(changes(moved, update)[0]) / factor,
        )  # fmt: skip
        if dtype == "float64":
            right = found
    assert found == pytest.approx(right, rel=1e-5)


def test_spectrum_and_kernel():
    x = DRAWN.normal(size=(6, 4)).astype(np.float32)
    model = lnp_numpy.LinearModel(weight=np.zeros((4, 2), np.float32))
    y = DRAWN.normal(size=(6, 2)).astype(np.float32)
    for measure in (lnp.spectrum, lnp.kernel):
        right, small = measure(model, (x, y)), measure(model, (x, (y * 1e-30).astype(np.float32)))
        assert small.chi_pos == pytest.approx(right.chi_pos, rel=1e-4)
    assert lnp.spectrum(model, (x, y * np.float32(1e-30))).notes == ()


@pytest.mark.parametrize("size", [1e-19, 1e-21, 1e-22, 1e-30])
def test_a_jacobian_whose_squares_lose_digits_is_noted(size):
    small = {name: array * size for name, array in JACOBIAN.items()}
    d = measured(small, GRADIENT)
    right = measured(small, GRADIENT, "float64")
    assert right.notes == ()
    assert any("digits" in note or "below all numbers" in note for note in d.notes)


def test_one_layer_whose_squares_lose_digits_is_named():
    first = next(iter(JACOBIAN))
    d = measured(JACOBIAN | {first: JACOBIAN[first] * 1e-20}, GRADIENT)
    assert [note for note in d.notes if "digits" in note and "layer0" in note]


@pytest.mark.parametrize("size", [1e19, 1e21, 1e30])
def test_what_overflows_is_noted(size):
    d = measured({name: array * size for name, array in JACOBIAN.items()}, GRADIENT)
    assert not np.isfinite(d.chi_net) or d.notes == ()
    assert bool(d.notes) == (not np.isfinite(d.chi_net))
    assert measured(JACOBIAN, GRADIENT * 1e200, "float64").notes == ("rate or loss scale leave the range of numbers",)


def test_zero_is_said_of_zeros():
    zero = measured(JACOBIAN, GRADIENT * 0)
    assert any("loss gradient is zero" in note for note in zero.notes)
    assert (zero.rate, zero.chi_loss) == (0, 0)
    assert np.isnan(zero.chi_pos)
    for scale in (1e-30, 1e-37, 1e-40):
        assert not any("zero" in note for note in measured(JACOBIAN, GRADIENT * scale).notes)
    tiny = measured(JACOBIAN, GRADIENT * 1e-200, "float64")
    assert tiny.chi_pos == pytest.approx(measured(JACOBIAN, GRADIENT, "float64").chi_pos)
    assert tiny.notes == ("rate or loss scale leave the range of numbers",)


@pytest.mark.parametrize(("scale", "noted"), [(1.0, False), (1e-8, False), (1e-19, True), (1e-24, True), (1e22, True)])
def test_a_step_whose_own_gradient_leaves_the_range_is_noted(scale, noted):
    """Its backward pass is the user's, and pulls back the loss gradient as it is."""
    lin = record(JACOBIAN, GRADIENT * scale, dtype="float32")

    def of_the_step(per_sample, products, vector):
        with np.errstate(all="ignore"):
            u = lin.vjp(lin.loss_gradient)
            return GradientPass(lin.inner_products(u, u))

    with np.errstate(all="ignore"):
        shared = record(JACOBIAN, GRADIENT * scale, dtype="float32", gradient_pass=of_the_step)
        d = explained(_floats(decomposed(shared, estimator="exact")[0]), unscaled=True)
    assert bool(d.notes) == noted, d.notes
    if not noted:
        assert d.chi_pos == pytest.approx(measured(JACOBIAN, GRADIENT, "float64").chi_pos, rel=1e-5)


def test_a_position_above_one_is_noted():
    d = measured(JACOBIAN, GRADIENT, "float64")
    for chi_pos, error, noted in (
        (1.0005, 0.0, False),
        (1.1, 0.2, False),
        (1.1, 0.05, True),
        (65.0, float("nan"), True),
    ):
        found = explained(replace(d, chi_pos=chi_pos, chi_pos_stderr=error))
        assert bool(found.notes) == noted, (chi_pos, error)
