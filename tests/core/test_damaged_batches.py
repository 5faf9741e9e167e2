"""The conformance kit notices wrong numbers of several batches: nested ones, Gram matrices and cross responses."""

from dataclasses import replace

import pytest

import lnp
from contract.test_numpy import kit
from lnp.testing.batches import (
    cross_response_takes_two_losses,
    gradient_gram_is_the_dense_one,
    nested_batches_are_their_own_decompositions,
)
from lnp.testing.numbers import (
    cross_response_is_the_dense_one,
    loss_changes_are_those_of_the_step,
    spectrum_is_the_dense_measure,
)


@pytest.fixture
def falsified(monkeypatch):
    """(check, what it calls, what a falsified result is made of, message): the check fails with this message."""

    def run(check, name, falsify, message):
        function = getattr(lnp, name)

        def call(*args, **options):
            return falsify(function(*args, **options), **options)

        with monkeypatch.context() as patched:
            patched.setattr(lnp, name, call)
            with pytest.raises(AssertionError, match=message):
                check(kit)

    return run


def with_one(nested, place, **changes):
    found = list(nested.decompositions)
    found[place] = replace(found[place], **{name: change(found[place]) for name, change in changes.items()})
    return replace(nested, decompositions=tuple(found))


class OtherPosition(lnp.NestedBatches):
    def expected_chi_pos(self, batch_size):
        return 1.01 * super().expected_chi_pos(batch_size)


NESTED = {
    "padded, float64: the sizes are": lambda nested: replace(nested, decompositions=nested.decompositions[:1]),
    "padded, float64: loss of 3 samples": lambda nested: with_one(nested, 0, loss=lambda d: 1.01 * d.loss),
    "padded, float64: 4 samples: chi_net": lambda nested: with_one(nested, 1, chi_net=lambda d: 1.01 * d.chi_net),
    "padded, float64: 3 samples tell no population": lambda nested: with_one(nested, 0, population=lambda d: None),
    "padded, float64: the position expected": lambda nested: OtherPosition(nested.decompositions),
    "centred, float64: 2 samples: chi_net": lambda nested: with_one(
        nested, 0, chi_net=lambda d: d.chi_net * (1.01 if nested.batch_sizes == (2, 3) else 1)
    ),
}


@pytest.mark.parametrize("message", NESTED)
def test_nested_batches(message, falsified):
    check = nested_batches_are_their_own_decompositions
    falsified(check, "decompose_nested", lambda nested, **_: NESTED[message](nested), message)


@pytest.mark.parametrize("name", ["matrix", "losses"])
def test_gram_matrices(name, falsified):
    def other(gram, **options):
        return replace(gram, **{name: 1.01 * getattr(gram, name)})

    falsified(gradient_gram_is_the_dense_one, "gradient_gram", other, f"layers, float64: {name} is")


@pytest.mark.parametrize("name", ["rates", "cosines", "population_rate"])
def test_what_is_made_of_a_gram_matrix(name, monkeypatch):
    value = getattr(lnp.GradientGram, name).fget
    monkeypatch.setattr(lnp.GradientGram, name, property(lambda gram: 1.01 * value(gram)))
    with pytest.raises(AssertionError, match=f"layers, float64: {name} is"):
        gradient_gram_is_the_dense_one(kit)


def test_a_gram_matrix_of_single_samples(falsified):
    def other(gram, groups=None, **options):
        return replace(gram, matrix=1.01 * gram.matrix) if groups == 3 else gram

    falsified(gradient_gram_is_the_dense_one, "gradient_gram", other, "linear, float64: matrix of single samples")


RESPONSES = {
    "linear, float64: the rate, by a finite difference": lambda r: {"rate": 1.01 * r.rate},
    "linear, float64: chi_pos": lambda r: {"chi_pos": 1.01 * r.chi_pos},
    "linear, float64: trained: rate": lambda r: {"trained": replace(r.trained, rate=1.01 * r.trained.rate)},
    "linear, float64: the measured rate": lambda r: {"measured": replace(r.measured, rate=1.01 * r.measured.rate)},
}


@pytest.mark.parametrize("message", RESPONSES)
def test_cross_responses_of_two_losses(message, falsified):
    def other(r, **options):
        return replace(r, **RESPONSES[message](r))

    falsified(cross_response_takes_two_losses, "cross_response", other, message)


@pytest.mark.parametrize(
    ("loss", "message"), [("mse", "soft targets, float64: the rate"), (None, "the rate of three times the loss")]
)
def test_cross_responses_of_other_losses(loss, message, falsified):
    def other(r, measured_loss, **options):
        concerned = measured_loss == loss if loss else callable(measured_loss)
        return replace(r, rate=1.01 * r.rate) if concerned else r

    falsified(cross_response_takes_two_losses, "cross_response", other, message)


DENSE = {
    "linear, float64: rate": lambda r: {"rate": 1.01 * r.rate},
    "linear, float64: chi_net_stderr": lambda r: {"chi_net_stderr": 1e-6},
    "linear, float64: trained: chi_net": lambda r: {"trained": replace(r.trained, chi_net=1.01 * r.trained.chi_net)},
    "linear, float64: measured: rate": lambda r: {"measured": replace(r.measured, rate=1.01 * r.measured.rate)},
    "thirteen samples, float64: relative error of chi_net": lambda r: (
        {"chi_net_stderr": 1.01 * r.chi_net_stderr} if r.chi_net_stderr else {}
    ),
    "thirteen samples, float64: relative error of chi_pos": lambda r: (
        {"chi_pos_stderr": 1.01 * r.chi_pos_stderr} if r.chi_pos_stderr else {}
    ),
}


@pytest.mark.parametrize("message", DENSE)
def test_cross_responses(message, falsified):
    falsified(
        cross_response_is_the_dense_one, "cross_response", lambda r, **_: replace(r, **DENSE[message](r)), message
    )


@pytest.mark.parametrize("what", ["learning_rate", "update"])
@pytest.mark.parametrize("kind", ["measured", "predicted"])
def test_changes_of_the_loss(kind, what, falsified):
    def other(change, **options):
        return 1.01 * change if what in options else change

    falsified(
        loss_changes_are_those_of_the_step, f"{kind}_loss_change", other, f"layers, float64: {kind} change, {what}"
    )


SPECTRA = {
    "the sum of the weights": lambda s: {"weights": 1.01 * s.weights},
    "lambda_max": lambda s: {"eigenvalues": 1.01 * s.eigenvalues},
    "moment 1": lambda s: {"weights": s.weights[::-1]},
}


@pytest.mark.parametrize("message", SPECTRA)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_spectra(message, preconditioned, falsified):
    def other(s, preconditioner=None, **options):
        return replace(s, **SPECTRA[message](s)) if (preconditioner is not None) == preconditioned else s

    falsified(spectrum_is_the_dense_measure, "spectrum", other, f"layers, float64: {message}")
