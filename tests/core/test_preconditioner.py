"""J M J^T against the dense kernel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from core.dense import network, record
from lnp.contract.linearization import GradientPass
from lnp.contract.options import Options
from lnp.contract.vectors import update_by_name
from lnp.results.decomposition import decompose
from lnp.results.preconditioner import joint_options, precondition

JACOBIAN, GRADIENT = network()
GENERATOR = np.random.default_rng(1)
DIAGONAL = {name: GENERATOR.uniform(0.1, 3, size=(1, array.shape[-1])) for name, array in JACOBIAN.items()}


def kernel(names=None):
    flat = {n: a.reshape(-1, a.shape[-1]) for n, a in JACOBIAN.items() if names is None or n in names}
    return sum(a @ np.diag(DIAGONAL[n][0]) @ a.T for n, a in flat.items())


def test_against_the_dense_kernel():
    d = decompose(precondition(record(JACOBIAN, GRADIENT), DIAGONAL), estimator="exact", by_layer=True)
    g, theta = GRADIENT.reshape(-1), kernel()
    assert d.rate == pytest.approx(g @ theta @ g, rel=1e-12)
    assert d.chi_net == pytest.approx(np.trace(theta) / 6, rel=1e-12)
    assert d.chi_pos == pytest.approx(g @ theta @ g / (g @ g) / np.trace(theta), rel=1e-12)
    for name, layer in d.layers.items():
        own = kernel([f"{name}.weight"])
        assert layer.chi_pos == pytest.approx(g @ own @ g / (g @ g) / np.trace(own), rel=1e-12)


def test_norms_of_the_gradient_are_not_taken_from_the_record():
    lin = replace(
        record(JACOBIAN, GRADIENT), gradient_pass=lambda *_: GradientPass(dict.fromkeys(JACOBIAN, np.asarray(1.0)))
    )
    known = decompose(precondition(record(JACOBIAN, GRADIENT), DIAGONAL), estimator="exact")
    assert decompose(precondition(lin, DIAGONAL), estimator="exact").rate == known.rate


def test_a_backend_need_not_take_samples_apart():
    asked = joint_options(Options())
    assert (asked.split, asked.population) == (False, False)


def test_the_probes_have_the_trace_as_their_mean():
    lin = precondition(record(JACOBIAN, GRADIENT), DIAGONAL)
    d = decompose(lin, estimator="joint", rtol=0, max_probes=4000)
    assert d.chi_net == pytest.approx(np.trace(kernel()) / 6, abs=4 * d.chi_net_stderr)
    assert decompose(lin, estimator="auto").estimator in ("exact", "joint")


def test_products_are_each_others_transpose():
    lin = precondition(record(JACOBIAN, GRADIENT), DIAGONAL)
    u = {name: GENERATOR.standard_normal(d.shape) for name, d in DIAGONAL.items()}
    assert np.sum(lin.jvp(u) * GRADIENT) == pytest.approx(sum(lin.inner_products(lin.vjp(GRADIENT), u).values()))


MODEL = lnp_numpy.LinearModel(weight=np.zeros((2, 1)))
BATCH = (np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.ones((3, 1)))


def test_a_model():
    same = lnp.decompose(MODEL, BATCH, preconditioner={"weight": np.ones((2, 1))})
    plain = lnp.decompose(MODEL, BATCH)
    assert (same.rate, same.chi_net, same.chi_pos) == pytest.approx((plain.rate, plain.chi_net, plain.chi_pos))
    assert "J M J^T" in " ".join(same.notes)
    half = lnp.decompose(MODEL, BATCH, preconditioner={"weight": np.array([[1.0], [0.0]])})
    gradient = -2 * BATCH[0].T @ BATCH[1] / 3
    assert half.rate == pytest.approx(gradient[0, 0] ** 2)
    negative = lnp.decompose(MODEL, BATCH, preconditioner={"weight": -np.ones((2, 1))})
    assert math.isnan(negative.rate)
    asked = lnp.decompose(MODEL, BATCH, population=True, preconditioner={"weight": np.ones((2, 1))})
    assert asked.population is None
    assert any("no population values" in note for note in asked.notes)
    for measure in (lnp.decompose, lnp.spectrum):
        with pytest.raises(ValueError, match="microbatch=2 beside preconditioner"):
            measure(MODEL, BATCH, microbatch=2, preconditioner={"weight": np.ones((2, 1))})
    with pytest.raises(ValueError, match="max_probes"):
        lnp.decompose(MODEL, BATCH, max_probes=0, preconditioner={"weight": np.ones((2, 1))})


def test_the_predicted_change_of_such_a_step_is_the_rate():
    m, eta = {"weight": np.array([[0.5], [2.0]])}, 1e-3
    d = lnp.decompose(MODEL, BATCH, preconditioner=m)
    gradient = -2 * BATCH[0].T @ BATCH[1] / 3
    update = {"weight": -eta * m["weight"] * gradient}
    assert lnp.predicted_loss_change(MODEL, BATCH, update=update) == pytest.approx(d.predicted_loss_change(eta))


SHAPES = {"a": (2,), "b": (1,)}


class TestVectorsByName:
    """What users pass for an update or a preconditioner, by name or in order."""

    def test_some_names_or_all_in_order(self):
        assert update_by_name({"b": [1.0]}, SHAPES, list, "it") == {"b": [1.0]}
        every = {"a": np.ones(2), "b": np.zeros(1)}
        assert update_by_name(every, SHAPES, list, "it") == every
        whole = update_by_name([np.ones(2), np.zeros(1)], SHAPES, list, "it")
        assert {name: part.shape for name, part in whole.items()} == SHAPES

    @pytest.mark.parametrize("update", [3, [np.ones(2)], {}, {"c": np.ones(2)}])
    def test_other_numbers_and_names(self, update):
        with pytest.raises(ValueError, match=r"does not match the model's parameters. Expected it."):
            update_by_name(update, SHAPES, list, "it")

    def test_the_first_four_of_other_shapes_are_named(self):
        shapes = dict.fromkeys("abcde", (1,))
        with pytest.raises(ValueError, match=r"at \['a', 'b', 'c', 'd'\]. Expected it."):
            update_by_name([np.ones(2)] * 5, shapes, list, "it")

    def test_other_shapes_are_named(self):
        with pytest.raises(ValueError, match=r"parameters at \['a'\]. Expected it."):
            update_by_name([np.ones(3), np.zeros(1)], SHAPES, list, "it")
