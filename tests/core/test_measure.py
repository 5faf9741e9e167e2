"""The public functions: options that are refused, and what reaches the backend."""

import numpy as np
import pytest

import lnp
import lnp_numpy

RNG = np.random.default_rng(0)
MODEL = lnp_numpy.LinearModel(RNG.normal(size=(3, 2)), RNG.normal(size=2))
BATCH = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "best"}, "Unknown estimator 'best'. Expected one of 'auto'"),
        ({"rtol": -0.1}, "rtol is -0.1. Expected"),
        ({"rtol": float("nan")}, "rtol is nan"),
        ({"max_probes": 0}, "max_probes is 0. Expected an integer >= 1"),
        ({"max_probes": 2.5}, "max_probes is 2.5"),
        ({"loss_terms": 0}, "loss_terms is 0. Expected the number"),
        ({"loss_terms": -3}, "loss_terms is -3"),
        ({"seed": -1}, "seed is -1. Expected an integer"),
        ({"microbatch": 0}, "microbatch is 0. Expected a number of samples"),
        ({"microbatch": 1.5}, "microbatch is 1.5"),
        ({"batch_statistics": "thawed"}, "batch_statistics is 'thawed'. Expected one of 'frozen', 'coupled'"),
        ({"loss": "nll"}, "Unknown loss 'nll'"),
        ({"parameters": "tail"}, "picks no parameter"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        lnp.decompose(MODEL, BATCH, **options)
    with pytest.raises(ValueError, match=words):
        lnp.cross_response(MODEL, BATCH, BATCH, **options)


@pytest.mark.parametrize("change", [lnp.measured_loss_change, lnp.predicted_loss_change])
@pytest.mark.parametrize(("step", "given"), [({}, "neither"), ({"learning_rate": 1, "update": {}}, "both")])
def test_one_step_is_given(change, step, given):
    with pytest.raises(ValueError, match=f"{given} of learning_rate= and update="):
        change(MODEL, BATCH, **step)


def test_results_are_floats():
    d = lnp.decompose(MODEL, BATCH, by_layer=True)
    numbers = [d.loss, d.rate, d.chi_loss, d.chi_net, d.chi_pos, d.chi_net_stderr, d.chi_pos_stderr]
    numbers += [d.layers["weight"].rate, lnp.measured_loss_change(MODEL, BATCH, learning_rate=0.1)]
    assert {type(number) for number in numbers} == {float}
    assert type(d.predicted_loss_change(0.1)) is float


def test_signs_of_steps():
    """A small step along -gradient lowers the loss; against it, the loss rises. Both agree with first order."""
    for change in (lnp.measured_loss_change, lnp.predicted_loss_change):
        assert change(MODEL, BATCH, learning_rate=1e-4) < 0 < change(MODEL, BATCH, learning_rate=-1e-4)
    gradient = lnp.load("numpy").linearize(MODEL, BATCH, lnp.Options())
    update = {name: -1e-4 * part for name, part in gradient.vjp(gradient.loss_gradient).items()}
    for change in (lnp.measured_loss_change, lnp.predicted_loss_change):
        assert change(MODEL, BATCH, update=update) == pytest.approx(change(MODEL, BATCH, learning_rate=1e-4), rel=1e-9)


def test_an_update_of_another_shape():
    with pytest.raises(ValueError, match=r"does not match the model's parameters. Expected"):
        lnp.measured_loss_change(MODEL, BATCH, update={"weight": np.zeros(3)})


@pytest.mark.parametrize(
    ("estimator", "split"),
    [("auto", True), ("exact", True), ("per_sample", True), ("joint", False), ("grouped", False)],
)
def test_samples_are_taken_apart_only_where_it_helps(estimator, split, monkeypatch):
    seen = []
    original = lnp_numpy.evaluate
    spy = lambda computation, model, batches, options, **operands: (
        seen.append(options.split) or original(computation, model, batches, options, **operands)
    )
    monkeypatch.setattr(lnp_numpy, "evaluate", spy)
    lnp.decompose(MODEL, BATCH, estimator=estimator)
    assert seen == [split]


def test_computations_compare_by_their_settings():
    """Compiling backends look compiled code up by them."""
    from lnp.results.computations import Decompose, Respond

    settings = ("auto", 0.01, 64, True, None, False)
    assert Decompose(*settings) == Decompose(*settings)
    assert len({Decompose(*settings), Decompose(*settings), Respond(*settings)}) == 2


def test_nan_is_explained():
    zero = lnp_numpy.LinearModel(np.zeros((3, 2)), None)
    targets = BATCH[0] @ MODEL.weight + MODEL.bias
    for model, batch, words in (
        (MODEL, (BATCH[0], targets), "loss gradient is zero"),
        (zero, (np.zeros((4, 3)), BATCH[1]), "J = 0"),
        (MODEL, (np.full((4, 3), np.nan), BATCH[1]), "not finite"),
    ):
        assert any(words in note for note in lnp.decompose(model, batch).notes), words
    assert lnp.decompose(MODEL, BATCH).notes == ()
