"""Calls that new users get wrong: each error says what was received, what was expected and what to do."""

from __future__ import annotations

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.contract.foreign import why_foreign

X, Y = np.random.default_rng(0).standard_normal((6, 4)), np.array([0, 1, 1, 0, 1, 0])
MODEL, ONE = lnp_numpy.LinearModel(weight=np.full((4, 2), 0.1)), lnp_numpy.LinearModel(weight=np.full((4, 1), 0.1))
BATCH = (X, Y)


class Loader:
    def __iter__(self):
        yield BATCH


class Loss:
    def __call__(self, outputs, targets):
        return outputs.sum()


def apply(parameters, inputs):
    return inputs @ parameters


def watch(**options):
    return lnp.Tracker(on_error="raise", **options)


DECOMPOSE = {  # what is passed to lnp.decompose: {option: value}, the error's type, its text
    "a generator of arrays": ({"parameters": iter([X])}, TypeError, "of ndarray. Expected names, a glob .* Pass the"),
    "arrays": ({"parameters": [X]}, TypeError, "list of ndarray. Expected names"),
    "a number of parameters": ({"parameters": 3}, TypeError, "type int. Expected names"),
    "a class": ({"loss": Loss}, TypeError, "class Loss. Expected a function .* Make one .*=Loss\\(\\)"),
    "no function to forward": ({"forward": 3}, TypeError, "forward is 3. Expected a function"),
    "a large tolerance": ({"rtol": 5}, ValueError, "rtol is 5. Expected .* between 0 and 1"),
    "a tolerance in words": ({"rtol": "1%"}, ValueError, "rtol is '1%'. Expected"),
    "half a probe": ({"max_probes": 2.5}, ValueError, "max_probes is 2.5. Expected"),
    "half a seed": ({"seed": 1.5}, TypeError, "seed is 1.5. Expected an integer"),
    "no seed": ({"seed": None}, TypeError, "seed is None. Expected an integer"),
    "a microbatch that is true": ({"microbatch": True}, ValueError, "microbatch is True. Expected"),
    "terms in words": ({"loss_terms": "mean"}, TypeError, "loss_terms is 'mean'. Expected"),
    "terms in a list": ({"loss_terms": []}, TypeError, r"loss_terms is \[\]. Expected"),
    "terms for each sample": ({"loss_terms": np.ones(6)}, TypeError, "loss_terms is array.* Expected"),
    "endless terms": ({"loss_terms": float("inf")}, ValueError, "loss_terms is inf. Expected"),
    "layers in words": ({"by_layer": "head"}, TypeError, "by_layer is 'head'. Expected True .* or a function"),
    "a population in words": ({"population": "yes"}, TypeError, "population is 'yes'. Expected True, False or None"),
    "a preconditioner that is a number": ({"preconditioner": 3}, ValueError, "of type int does not match .* Expected"),
}
CALLS = {  # the call, the error's type, its text
    "the batch first": (lambda: lnp.decompose(BATCH, MODEL), TypeError, "items of types ndarray.*Are the two swapped"),
    "a model's class": (lambda: lnp.decompose(Loss, BATCH), TypeError, "not its class Loss. Make one: Loss"),
    "a method": (lambda: lnp.decompose([].append, BATCH), TypeError, "Expected the model itself. Pass"),
    "a function alone": (lambda: lnp.decompose(apply, BATCH), TypeError, "its parameters. Pass .apply, parameters"),
    "a pair the other way round": (lambda: lnp.decompose((X, apply), BATCH), TypeError, "function first. Swap the two"),
    "a list": (lambda: lnp.decompose([apply, X], BATCH), TypeError, "type builtins.list, .* Expected a tuple"),
    "a loader": (lambda: lnp.decompose(MODEL, Loader()), TypeError, "Loader, which gives batches.*next.iter.loader"),
    "an iterator": (lambda: lnp.decompose(MODEL, iter([BATCH])), TypeError, "list_iterator.*next.iter.loader"),
    "integers and one output": (
        lambda: lnp.decompose(ONE, BATCH), ValueError, "have 1 classes.*one output for each class.*'binary_cross"
    ),
    "a pair of no framework": (lambda: lnp.decompose((apply, X), BATCH), TypeError, "accepts. Expected a torch.nn.Mod"),
    "texts": (lambda: lnp.decompose(MODEL, (X, list("abcdef"))), TypeError, "targets are a list of 6 texts.* Convert"),
    "a learning rate in words": (
        lambda: lnp.measured_loss_change(MODEL, BATCH, learning_rate="1e-3"), TypeError, "'1e-3'. Expected the number"
    ),
    "a number for a weight": (lambda: lnp_numpy.LinearModel(0.5), ValueError, "weight is a float .* Expected an array"),
    "a list for a weight": (lambda: lnp_numpy.LinearModel([[0.5]]), ValueError, "weight is a list of shape .1, 1."),
    "a weight of texts": (lambda: lnp_numpy.LinearModel(np.array([["a"]])), ValueError, "dtype <U1"),
    "a wide bias": (lambda: lnp_numpy.LinearModel(X, X), ValueError, "bias is a ndarray .* .outputs,. of a bias"),
    "features without a weight": (lambda: lnp_numpy.RandomFeatureModel(0.5, None, X), ValueError, "weight is a float"),
    "inputs of texts": (lambda: lnp.decompose(MODEL, (X.astype(str), X)), ValueError, "dtype <U.*Check the inputs"),
    "a history": (lambda: lnp.reach(lnp.History()), TypeError, "a History. Expected the steps .* history.reach"),
    "no rows": (lambda: lnp.History([MODEL]), TypeError, "History received a list. Expected rows.* tracker.history"),
    "a path of rows": (lambda: lnp.History("run.jsonl"), TypeError, "a str. Expected rows.*lnp.History.read.path"),
    "a number of rows": (lambda: lnp.History(3), TypeError, "History received a int. Expected rows"),
    "a model for a path": (lambda: lnp.Tracker(MODEL), TypeError, "type LinearModel.* order is lnp.Tracker.path, sch"),
    "a schedule for a path": (lambda: lnp.Tracker(lnp.schedule.every(3), "a.jsonl"), TypeError, "type every.*order is"),
    "a path for a schedule": (lambda: lnp.Tracker(None, "run.jsonl"), TypeError, "schedule 'run.jsonl'.*order is"),
    "a schedule not called": (lambda: lnp.Tracker(schedule=lnp.schedule.log_windows), TypeError, "class log_.*call it"),
    "tags without names": (lambda: lnp.Tracker(tags=3), TypeError, "tags is 3. Expected a dictionary"),
    "a rank in words": (lambda: lnp.Tracker(rank="first"), TypeError, "rank is 'first'. Expected the number"),
    "options of the tracker": (lambda: lnp.Tracker(rtol=5), ValueError, "rtol is 5"),
    "layers of the tracker": (lambda: lnp.Tracker(by_layer="head"), TypeError, "by_layer is 'head'"),
    "the model before the step": (lambda: watch().observe(MODEL, 0, BATCH), TypeError, "type LinearModel.*order is o"),
    "no step": (lambda: watch().observe(MODEL, BATCH), TypeError, "type LinearModel.*order is o"),
    "the batch before the model": (lambda: watch().observe(0, BATCH, MODEL), TypeError, "Are the two swapped"),
    "half a step": (lambda: watch().observe(0.5, MODEL, BATCH), TypeError, "type float. Expected an integer"),
    "an option as a value": (
        lambda: watch().observe(0, MODEL, BATCH, rtol=0.1), TypeError, "rtol is an option .* options=.'rtol'"
    ),
    "a learning rate of a row in words": (
        lambda: watch().observe(0, MODEL, BATCH, learning_rate="x"), TypeError, "'x', a str. Expected a number"
    ),
    "the last learning rates": (
        lambda: watch().observe(0, MODEL, BATCH, learning_rate=[0.1]), TypeError, r"get_last_lr\(\)\[0\]"
    ),
    "a measured column": (lambda: watch().observe(0, MODEL, BATCH, chi_pos=1), ValueError, "'chi_pos'.* 'my_chi_pos'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECOMPOSE)
def test_option(case):
    options, error, text = DECOMPOSE[case]
    with pytest.raises(error, match=f"(?s){text}"):
        lnp.decompose(MODEL, BATCH, **options)


@pytest.mark.parametrize("case", CALLS)
def test_call(case):
    call, error, text = CALLS[case]
    with pytest.raises(error, match=f"(?s){text}"):
        call()


def test_arrays_are_not_foreign_wherever_they_are():
    error = TypeError("from the model")
    assert why_foreign((([[X]], [Y]), [[1.0]], (X, Y, None)), None, error) is None
    assert "inputs are a list of 3 numbers" in why_foreign((([1, 2, 3], Y, None),), None, error)


def test_what_numpy_makes_of_integers_is_taken():
    measured = lnp.decompose(MODEL, BATCH, seed=np.int64(3), max_probes=np.int64(8), microbatch=np.int64(2))
    assert measured == lnp.decompose(MODEL, BATCH, seed=3, max_probes=8, microbatch=2)
    assert [step for step in range(12) if lnp.Tracker(schedule=np.int64(5)).due(step)] == [0, 5, 10]
    assert [step for step in range(12) if lnp.Tracker(schedule=np.array([1, 9])).due(step)] == [1, 9]
    assert lnp.schedule.log_windows(width=np.int64(3))(2)


def test_limits_that_are_just_allowed():
    measured = lnp.decompose(MODEL, BATCH, microbatch=1, rtol=1, max_probes=1)
    assert measured.samples == 6
    with pytest.raises(ValueError, match=r"rtol is 1\.5"):
        lnp.decompose(MODEL, BATCH, rtol=1.5)


def test_names_that_can_be_gone_through_once_serve_every_measurement():
    options = lnp.Options(parameters=iter(["weight"]))
    assert list(options.parameters) == list(options.parameters) == ["weight"]


def test_an_error_of_the_users_own_says_what_the_model_was_called_with():
    def loss(outputs, targets):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as raised:
        lnp.decompose(MODEL, BATCH, loss)
    called = (
        "lnp had called the model with inputs ndarray (6, 4) of float64, for targets ndarray (6,) of int64. A batch is "
        "(inputs, targets), and a loss of your own is called as loss(outputs, targets)."
    )
    assert raised.value.__notes__ == [called]


def test_several_batches_in_the_place_of_one_are_told_of():
    model = lnp_numpy.JacobianModel(lambda p, x: x.T @ p["w"], lambda p, x: {}, {"w": np.ones((4, 2))})
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'T'") as raised:
        lnp.decompose(model, [BATCH, BATCH])
    assert raised.value.__notes__[0].endswith("If these are 2 batches, pass batches=2.")


def test_lnps_own_errors_stay_as_they_are_whatever_the_batch_holds():
    model = lnp_numpy.JacobianModel(
        lambda p, x: np.asarray(x) @ p["w"], lambda p, x: {"w": np.zeros((6, 2, 4, 2))}, {"w": np.ones((4, 2))}
    )
    with pytest.raises(ValueError, match="Unknown loss"):
        lnp.decompose(model, (X.tolist(), Y), "nll")


def test_lnps_own_errors_have_no_notes():
    with pytest.raises(ValueError, match="Unknown loss") as raised:
        lnp.decompose(MODEL, BATCH, "nll")
    assert not hasattr(raised.value, "__notes__")


def test_options_in_the_wrong_place_are_named_in_order():
    names = ("zeta", "eta", "theta", "iota", "kappa", "beta", "alpha")
    with pytest.raises(TypeError, match=r"the options alpha, beta, eta, iota, kappa, theta, zeta\. Expected"):
        lnp.Tracker(**dict.fromkeys(names, 1))
    values = dict.fromkeys(("rtol", "microbatch", "max_probes", "group", "by_layer"), 1)
    with pytest.raises(TypeError, match=r"^by_layer, group, max_probes, microbatch, rtol are options of"):
        lnp.Tracker(schedule=1).observe(0, MODEL, BATCH, **values)
