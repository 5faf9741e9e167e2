"""The factors against the dense kernel and against numbers by hand."""

import inspect
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest

from core.dense import kernel, network, record
from lnp.contract.linearization import GradientPass, accumulation_dtype, coupling_tolerance, ratio, square_norm
from lnp.results.cross_response import cross_response_of, finished
from lnp.results.decomposition import Decomposition, asked, decompose, decomposed, layer_names

JACOBIAN, GRADIENT = network()


def test_by_hand():
    """J = diag(1, 2), g = (3, 4), n = 2: Theta = diag(1, 4), rate = 9 + 64, chi_loss = 2 * 25, chi_net = 5 / 2."""
    lin = record({"w": np.array([[[1.0, 0.0], [0.0, 2.0]]])}, np.array([[3.0, 4.0]]), terms=2)
    d = decompose(lin)
    assert (d.rate, d.chi_loss, d.chi_net) == (73, 50, 2.5)
    assert d.chi_pos == pytest.approx(73 / 125)
    assert (d.chi_net_stderr, d.chi_pos_stderr, d.loss_terms, d.probes) == (0, 0, 2, 2)
    assert (d.samples, d.outputs, d.estimator, d.layers, d.notes) == (1, 2, "exact", None, ())
    assert d.predicted_loss_change(0.5) == -36.5


def test_against_the_dense_kernel():
    theta, g = kernel(JACOBIAN), GRADIENT.reshape(-1)
    d = decompose(record(JACOBIAN, GRADIENT), by_layer=True)
    assert d.rate == pytest.approx(g @ theta @ g, rel=1e-13)
    assert d.chi_loss == pytest.approx(6 * g @ g, rel=1e-13)
    assert d.chi_net == pytest.approx(np.trace(theta) / 6, rel=1e-13)
    assert d.chi_pos == pytest.approx(g @ theta @ g / (g @ g * np.trace(theta)), rel=1e-13)
    assert d.preference == pytest.approx(g @ theta @ g / (g @ g) / np.mean(np.linalg.eigvalsh(theta)), rel=1e-12)
    for layer, part in d.layers.items():
        own = kernel(JACOBIAN, [f"{layer}.weight"])
        assert part.rate == pytest.approx(g @ own @ g, rel=1e-13)
        assert part.chi_net == pytest.approx(np.trace(own) / 6, rel=1e-13)
        assert part.chi_pos == pytest.approx(g @ own @ g / (g @ g * np.trace(own)), rel=1e-13)


@pytest.mark.parametrize("population", [None, True, False])
@pytest.mark.parametrize("estimator", ["auto", "exact", "joint"])
@pytest.mark.parametrize("cheap", [True, False])
def test_what_is_asked_of_the_backward_pass_can_be_told_beforehand(population, estimator, cheap):
    wishes, settings = [], {"estimator": estimator, "rtol": 0.01, "max_probes": 2, "population": population}

    def gradient_pass(per_sample, products, vector):
        wishes.append({"per_sample": per_sample, "products": products, "vector": vector})
        return GradientPass({name: np.ones(()) for name in JACOBIAN})

    lin = record(JACOBIAN, GRADIENT, separable=True, sample_cost=1.0 if cheap else 4.0, gradient_pass=gradient_pass)
    decompose(lin, **settings)
    assert wishes == [asked(lin, **settings)]
    assert wishes[0]["per_sample"] == (population or (population is None and cheap)) * (estimator != "joint")
    assert wishes[0]["products"] == (len(GRADIENT) if wishes[0]["per_sample"] else 0)
    assert wishes[0]["vector"] is False


def test_layers_of_an_estimate_add_up():
    d = decompose(record(JACOBIAN, GRADIENT), by_layer=True, estimator="joint", max_probes=3)
    assert sum(part.rate for part in d.layers.values()) == pytest.approx(d.rate, rel=1e-13)
    assert sum(part.chi_net for part in d.layers.values()) == pytest.approx(d.chi_net, rel=1e-13)
    weighted = sum(part.chi_net * part.chi_pos for part in d.layers.values()) / d.chi_net
    assert weighted == pytest.approx(d.chi_pos, rel=1e-13)


def test_errors_are_relative_to_the_trace():
    d = decompose(record(JACOBIAN, GRADIENT), estimator="joint", max_probes=3)
    assert d.chi_pos_stderr / d.chi_pos == pytest.approx(d.chi_net_stderr / d.chi_net, rel=1e-13)
    assert d.chi_net_stderr > 0


def test_no_overflow_where_the_numbers_fit():
    """In float32 the product ||g||^2 tr Theta overflows here; the rate, ||g||^2 and tr Theta do not."""
    expected = decompose(record(JACOBIAN, GRADIENT))
    scale = (1e39 / (np.sum(GRADIENT**2) * np.trace(kernel(JACOBIAN)))) ** 0.25
    large = {name: array * scale for name, array in JACOBIAN.items()}
    d = decompose(record(large, GRADIENT * scale, dtype="float32"))
    assert np.isfinite(d.rate)
    assert d.chi_pos == pytest.approx(expected.chi_pos, rel=1e-5)


def test_notes_are_kept():
    lin = record(JACOBIAN, GRADIENT, independent=False, notes=("from the backend",))
    notes = decompose(lin, estimator="per_sample").notes
    assert notes[0] == "from the backend"
    assert "joint" in notes[1]


def test_layer_names():
    names = ("body.0.weight", "body.0.bias", "body.1.weight", "scale")
    expected = {"body.0": names[:2], "body.1": names[2:3], "scale": names[3:]}
    assert layer_names(names, True) == expected
    assert layer_names(names, False) == {}
    assert layer_names(names, lambda name: name[0]) == {"b": names[:3], "s": names[3:]}


@pytest.mark.parametrize("shape", [(64, 30), (1, 80)])  # which reach the tolerance, and do not
def test_what_is_not_set_is_an_error_of_one_percent_with_64_probes_at_most(shape):
    lin = record(*network(*shape), sample_losses=lambda: np.zeros(shape[0]))
    settings = {"estimator": "auto", "rtol": 0.01, "max_probes": 64, "by_layer": False, "population": False}
    assert decompose(lin) == decompose(lin, **settings)
    assert decompose(lin).sample_losses is None
    given = inspect.signature(decomposed).parameters
    assert {name: given[name].default for name in settings} == settings


def test_what_belongs_to_the_computation_is_not_shown():
    shown = repr(decompose(record(JACOBIAN, GRADIENT)))
    inner = ("sample_losses", "magnitude", "least", "rtol", "way", "evidence", "contributions")
    assert "chi_pos=" in shown
    assert not [name for name in inner if f"{name}=" in shown]


def test_results_are_compared_by_their_values():
    """And not by arrays, whose comparison has no truth."""
    d = decompose(record(JACOBIAN, GRADIENT))
    other = replace(d, evidence={"labels": (np.ones(2),)}, contributions=np.ones(2), sample_losses=np.ones(2))
    assert d == other != replace(d, rate=1.0)


def test_a_result_made_by_hand_is_one_that_was_returned():
    d = decompose(record(JACOBIAN, GRADIENT))
    shown = {part.name: getattr(d, part.name) for part in fields(d) if part.repr}
    assert Decomposition(**shown) == d


def test_decomposition_is_frozen():
    d = decompose(record(JACOBIAN, GRADIENT))
    assert isinstance(d, Decomposition)
    with pytest.raises(AttributeError):
        d.rate = 1


def test_ratio():
    """0/0 and x/0 are nan, without a warning."""
    assert ratio(np, np.asarray(6.0), np.asarray(4.0)) == 1.5
    for numerator in (0.0, 1.0):
        assert np.isnan(ratio(np, np.asarray(numerator), np.asarray(0.0)))


@pytest.mark.parametrize(("dtype", "wide"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_sums_are_accumulated_wide(dtype, wide):
    assert np.dtype(accumulation_dtype(np, np.dtype(dtype))) == wide
    total = square_norm(np, np.full(3000, 10, dtype))  # 3e5 is beyond float16
    assert total.dtype == wide
    assert total == 3e5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.05), ("float32", 1.38e-3), ("float64", 5.96e-8)])
def test_coupling_tolerance(dtype, tolerance):
    assert coupling_tolerance(np, np.dtype(dtype)) == pytest.approx(tolerance, rel=0.01)


class TestCrossResponse:
    """Two batches, one model: their Jacobians share the parameters."""

    other, target = network(seed=7)

    def response(self, estimator="exact", **options):
        lins = record(JACOBIAN, GRADIENT, terms=6), record(self.other, self.target, terms=24)
        return cross_response_of(*lins, lambda lin: decomposed(lin, estimator=estimator, vector=True, **options))

    def test_against_dense_gradients(self):
        gradients = [
            np.concatenate([np.tensordot(g, array, axes=2) for array in jacobian.values()])
            for jacobian, g in ((JACOBIAN, GRADIENT), (self.other, self.target))
        ]
        r = finished(self.response())
        rate = gradients[0] @ gradients[1]
        chi_loss = (6 * np.sum(GRADIENT**2) * 24 * np.sum(self.target**2)) ** 0.5
        chi_net = (np.trace(kernel(JACOBIAN)) / 6 * np.trace(kernel(self.other)) / 24) ** 0.5
        found = (r.rate, r.chi_loss, r.chi_net, r.chi_pos, r.chi_net_stderr)
        assert found == pytest.approx((rate, chi_loss, chi_net, rate / chi_loss / chi_net, 0), rel=1e-12)

    def test_errors(self):
        """Relative errors a and b of the two traces, of the same signs: half their sum for the geometric mean."""
        r = self.response("joint", max_probes=3)
        a, b = (d.chi_net_stderr / d.chi_net for d in (r.trained, r.measured))
        assert r.chi_net_stderr / r.chi_net == pytest.approx((a + b) / 2, rel=1e-12)
        assert r.chi_pos_stderr / abs(r.chi_pos) == pytest.approx((a + b) / 2, rel=1e-12)

    def test_errors_of_one_batch_are_its_own(self):
        """Two losses on one batch have one trace, with one error."""
        lins = record(JACOBIAN, GRADIENT), record(JACOBIAN, self.target)
        r = cross_response_of(*lins, partial(decomposed, estimator="joint", max_probes=3, vector=True))
        assert r.chi_net_stderr == pytest.approx(r.trained.chi_net_stderr, rel=1e-12)

    def test_opposite_gradients(self):
        lins = record(JACOBIAN, GRADIENT), record(JACOBIAN, -GRADIENT)
        r = cross_response_of(*lins, partial(decomposed, vector=True))
        assert r.chi_pos == pytest.approx(-r.trained.chi_pos, rel=1e-12)
        assert r.rate == pytest.approx(-r.trained.rate, rel=1e-12)
        assert r.chi_pos_stderr == 0

    def test_a_failed_check_of_either_batch_gives_nan(self):
        good, bad = record(JACOBIAN, GRADIENT), record(JACOBIAN, GRADIENT, coupled=lambda: np.asarray(True))
        for pair in ((good, bad), (bad, good)):
            assert np.isnan(cross_response_of(*pair, partial(decomposed, vector=True)).rate)
