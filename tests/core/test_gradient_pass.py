"""What the core makes of a backend's own backward pass, which may leave things out."""

from dataclasses import replace

import numpy as np
import pytest

from core.dense import network, record
from lnp.contract.gradient_pass import gradient, gradient_pass
from lnp.contract.linearization import GradientPass, Linearization
from lnp.results.computations import Respond
from lnp.results.merged import DecomposePart
from lnp.results.two_losses import DecomposeWithGradient

JACOBIAN, GRADIENT = network(4, 2)
PLAIN = record(JACOBIAN, GRADIENT)
WISHES = [{}, {"per_sample": True}, {"products": 3}, {"vector": True}]


def offering(of_loss_gradient, *fields):
    """A record with a backward pass that yields these fields alone, where asked: of g itself, or of g / m."""
    asked = []

    def own(per_sample, products, vector):
        asked.append((per_sample, products, vector))
        found = gradient_pass(PLAIN, per_sample=per_sample, products=products, vector=vector)
        m = float(found.magnitude) if of_loss_gradient else 1.0
        wanted = {"sample_square_norms": per_sample, "products": products, "vector": vector}
        kept = {name: getattr(found, name) for name, wish in wanted.items() if wish and name in fields}
        for name, power in (("sample_square_norms", 2), ("vector", 1)):
            if name in kept:
                kept[name] = {key: m**power * value for key, value in kept[name].items()}
        if "products" in kept:
            kept["products"] = m * m * kept["products"]
        norms = {name: m * m * value for name, value in found.square_norms.items()}
        return GradientPass(norms, **kept, magnitude=None if of_loss_gradient else found.magnitude)

    return replace(PLAIN, gradient_pass=own), asked


def same(found, expected):
    if expected is None:
        return found is None
    if isinstance(expected, dict):
        return all(np.allclose(found[name], expected[name], rtol=1e-12) for name in expected)
    return np.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("of_loss_gradient", [True, False])
@pytest.mark.parametrize("fields", [(), ("vector",), ("products",), ("sample_square_norms",)])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_what_is_left_out_is_made_up_for(wish, fields, of_loss_gradient):
    lin, asked = offering(of_loss_gradient, *fields)
    found, expected = gradient_pass(lin, **wish), gradient_pass(PLAIN, **wish)
    assert asked == [tuple({"per_sample": False, "products": 0, "vector": False, **wish}.values())]
    assert same(found.square_norms, expected.square_norms)
    assert same(found.magnitude, expected.magnitude)
    for name, wanted in (("sample_square_norms", "per_sample"), ("products", "products"), ("vector", "vector")):
        if wanted in wish:
            assert same(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("wish", [{}, {"per_sample": True}])
def test_what_was_not_asked_for_costs_nothing(wish):
    lin, _ = offering(False, "sample_square_norms")
    found = gradient_pass(lin, **wish)
    assert found.products is None
    assert found.vector is None


@pytest.mark.parametrize("of_loss_gradient", [True, False])
def test_the_gradient_is_asked_of_the_backend(of_loss_gradient):
    lin, asked = offering(of_loss_gradient, "vector")
    vector, magnitude = gradient(lin)
    assert asked == [(False, 0, True)]
    whole = PLAIN.vjp(GRADIENT)
    assert same({name: float(magnitude) * part for name, part in vector.items()}, whole)


SETTINGS = ("exact", 0.01, 64, False, False, False)


@pytest.mark.parametrize("computation", [DecomposeWithGradient(*SETTINGS), DecomposePart(*SETTINGS)], ids=repr)
def test_computations_that_need_the_gradient_ask_for_it(computation):
    lin, asked = offering(False, "vector")
    found = computation(lin)
    assert asked == [(False, 0, True)]
    assert same({name: float(found.magnitude) * part for name, part in found.vector.items()}, PLAIN.vjp(GRADIENT))


def test_a_cross_response_asks_for_both_gradients():
    trained, asked = offering(False, "vector")
    found = Respond(*SETTINGS)(trained, trained)
    assert {vector for _, _, vector in asked} == {True}
    assert float(found.rate) == pytest.approx(float(found.trained.rate))


def test_a_record_says_what_is_special_about_it():
    names = ("xp", "outputs", "loss", "loss_gradient", "loss_terms", "vjp", "inner_products", "signs")
    plain = Linearization(**dict.fromkeys(names))
    assert (plain.groups, plain.separable, plain.subset_pays, plain.cheap) == (1, False, True, False)
