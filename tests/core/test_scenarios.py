"""The networks of the conformance kit are what they say: their Jacobians, losses and labels, and which samples meet."""

from dataclasses import replace

import array_api_compat.numpy
import numpy as np
import pytest

from lnp.estimators.weighing import expected_probes
from lnp.testing import Truth, changing_networks, scenarios
from lnp.testing.scenarios import Scenario, layers, linear, prescribed, tokens

SCENARIOS = {scenario.name: scenario for scenario in vars(scenarios).values() if isinstance(scenario, Scenario)}
SCENARIOS |= {scenario.name: scenario for scenario in scenarios.REGULAR}
FINITE = [scenario for name, scenario in SCENARIOS.items() if name not in ("not finite", "all labels ignored")]
SAMPLES = 12


def derivative(function, at, step=1e-6):
    """d function / d at by central differences, shape (*function's, *at's)."""
    columns = []
    for index in np.ndindex(at.shape):
        moved = np.zeros(at.shape)
        moved[index] = step
        columns.append((function(at + moved) - function(at - moved)) / (2 * step))
    return np.stack(columns, axis=-1).reshape((*columns[0].shape, *at.shape))


def alone(scenario, n):
    return replace(scenario, inputs=scenario.inputs[n : n + 1], targets=scenario.targets[n : n + 1])


def met(scenario):
    """Of each sample: whether its outputs or their Jacobian differ from what they are without the others."""
    whole, found = Truth(scenario), []
    samples, outputs = whole.shape
    for n in range(samples):
        own = Truth(alone(scenario, n))
        parts = [own.outputs[0] - whole.outputs[n]]
        rows = slice(n * outputs, (n + 1) * outputs)
        parts += [(own.jacobians[name] - dense[rows]).ravel() for name, dense in whole.jacobians.items()]
        found.append(bool(np.abs(np.concatenate(parts)).max() > 1e-6))
    return found


@pytest.mark.parametrize("moved", [0.0, 0.3])
@pytest.mark.parametrize("scenario", FINITE, ids=lambda scenario: scenario.name)
def test_jacobians_and_loss_gradients_are_those_of_finite_differences(scenario, moved):
    parameters = {name: at + moved for name, at in scenario.parameters.items()}
    truth = Truth(replace(scenario, parameters=parameters))
    for name, at in parameters.items():
        numeric = derivative(lambda moved, name=name: truth.apply({**parameters, name: moved}), at)
        np.testing.assert_allclose(truth.jacobians[name], numeric.reshape(truth.jacobians[name].shape), atol=1e-7)
        along = derivative(lambda moved, name=name: np.float64(truth.loss_at({**parameters, name: moved})), at)
        np.testing.assert_allclose(truth.pulled(truth.gradient)[name], along, atol=1e-7)


@pytest.mark.parametrize("scenario", FINITE, ids=lambda scenario: scenario.name)
def test_samples_meet_where_it_says_so(scenario):
    assert any(met(scenario)) == scenario.interacts


@pytest.mark.parametrize("scenario", scenarios.REGULAR, ids=lambda scenario: scenario.name)
def test_no_quantity_is_zero_and_no_two_samples_or_parameters_are_alike(scenario):
    """Or a backend that mixes them up would be taken for a right one."""
    truth = Truth(scenario)
    assert all(np.abs(value) > 1e-3 for value in truth.factors().values())
    shares = truth.block_square_norms(truth.gradient, list(range(len(scenario.inputs))))
    labelled = shares[shares > 0]
    assert len(set(labelled.round(6))) == len(labelled)
    sizes = [np.trace(truth.kernel([name])) for name in truth.jacobians]
    assert len(set(np.round(sizes, 6))) == len(sizes)


def test_shapes_and_labels():
    assert {name: Truth(scenario).shape for name, scenario in SCENARIOS.items()} == {
        "linear": (3, 2),
        "prescribed": (2, 3),
        "layers": (3, 3),
        "soft targets": (3, 3),
        "tied": (2, 3),
        "tokens": (2, 6),
        "one output": (4, 1),
        "one sample": (1, 3),
        "centred": (3, 2),
        "gated": (3, 2),
        "huber": (5, 3),
        "binary labels": (3, 2),
        "wide": (2, 9),
        "thirteen samples": (13, 3),
        "one sample of one output": (1, 1),
        "six samples": (6, 2),
        "padded": (4, 6),
        "zero gradient": (3, 2),
        "zero Jacobian": (2, 3),
        "not finite": (3, 2),
        "all labels ignored": (2, 6),
    }
    assert Truth(scenarios.WIDE).shape[1] > expected_probes(2, 0.5, 64)
    assert [np.sum(scenario.targets >= 0) for scenario in (scenarios.LAYERS, scenarios.TOKENS)] == [2, 5]
    assert (scenarios.PADDED.targets >= 0).sum(axis=1).tolist() == [3, 1, 2, 3]
    np.testing.assert_allclose(SCENARIOS["soft targets"].targets.sum(axis=1), 1)
    assert scenarios.TOKENS.inputs[0, 0] == scenarios.TOKENS.inputs[0, 2]  # one row is used twice
    outputs = Truth(scenarios.HUBER).outputs
    beyond = zip(np.abs(outputs - scenarios.HUBER.targets).flat, np.abs(outputs).flat, strict=True)
    assert len({(difference > 1, output > 1) for difference, output in beyond}) == 4
    assert np.isnan(scenarios.NOT_FINITE.inputs).sum(axis=1).tolist() == [1, 1, 1]
    assert {0, 1} < set(scenarios.BINARY.targets.ravel()) <= set(np.linspace(0, 1, 17))  # a fraction among them


def test_zeros_are_exact():
    assert Truth(scenarios.ZERO_GRADIENT).loss == 0
    assert not Truth(scenarios.ZERO_GRADIENT).gradient.any()
    assert not Truth(scenarios.ZERO_JACOBIAN).kernel().any()
    assert Truth(scenarios.ZERO_JACOBIAN).gradient.all()
    assert scenarios.ALL_IGNORED.targets.tolist() == [[-100] * 3] * 2


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_cast_concerns_floats_alone(name):
    scenario = SCENARIOS[name]
    made = scenario.cast("float32")
    assert {array.dtype for array in made.parameters.values()} == {np.dtype("float32")}
    for before, after in ((scenario.inputs, made.inputs), (scenario.targets, made.targets)):
        assert after.dtype == (np.float32 if before.dtype == np.float64 else before.dtype)


def test_other_sizes_can_be_asked_for():
    assert Truth(linear(5, 4)).shape == (5, 4)
    assert Truth(prescribed(3, 5)).shape == (3, 5)
    assert Truth(layers(samples=7)).shape == (7, 3)
    assert Truth(tokens(labels=((1, 0, 1),))).shape == (1, 6)


def changing(seed=0, samples=SAMPLES, bend=lambda backward: lambda h: h):
    """{name: network}, with a bend that is left out of the forward pass."""
    return {network.early.name: network for network in changing_networks(seed, samples, bend)}


LATER = {
    "a large sample that all look at": 1.0,  # the large one too is another one alone
    "routing by value": 0.0,
    "a backward pass that clips": 0.0,
    "a target far away, and a backward pass that clips": 0.0,
}
"""The share of samples that meet at the second moment, where it isn't what the network says is concerned."""


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("samples", [4, SAMPLES])
@pytest.mark.parametrize("name", changing())
def test_samples_keep_apart_first_and_meet_later(name, samples, seed):
    network = changing(seed, samples)[name]
    assert not any(met(network.early))
    network.between()
    assert np.mean(met(network.late)) == LATER.get(name, network.concerned)


def test_a_counter_is_on_its_way_before_it_lets_samples_meet():
    network = changing()["a counter"]
    assert network.late is network.early


@pytest.mark.parametrize("name", changing())
def test_jacobians_by_differences(name):
    network = changing()[name]
    for scenario in (network.early, network.late):
        truth = Truth(scenario)
        for parameter, at in scenario.parameters.items():
            own = derivative(
                lambda moved, scenario=scenario, truth=truth, parameter=parameter: truth.apply(
                    {**scenario.parameters, parameter: moved}
                ),
                at,
                step=3e-6,
            )
            dense = truth.jacobians[parameter]
            np.testing.assert_allclose(dense, own.reshape(dense.shape), atol=1e-8 * max(1, np.abs(dense).max()))


def test_one_open_gate_of_two_lets_no_samples_meet():
    network = changing()["a threshold behind a threshold"]
    for opened in "a", "b":
        parameters = {**network.early.parameters, opened: network.late.parameters[opened]}
        assert not any(met(replace(network.early, parameters=parameters)))


@pytest.mark.parametrize("name", changing())
def test_batches_and_parameters_keep_their_shapes(name):
    early, late = changing()[name].early, changing()[name].late
    assert early.inputs.shape == late.inputs.shape == (SAMPLES, 3)
    assert early.targets.shape == late.targets.shape == (SAMPLES, 2)
    assert {key: value.shape for key, value in early.parameters.items()} == {
        key: value.shape for key, value in late.parameters.items()
    }


def test_hardly_open_is_seen_in_a_gradient_alone():
    network = changing()["a gate that is open by hardly anything"]
    apart, open_ = Truth(network.early), Truth(network.late)
    assert 0 < np.abs(apart.outputs - open_.outputs).max() < 1e-3
    assert network.dtype == "float32"
    assert np.abs(open_.jacobians["a"]).max() > 0.1


def test_how_many_samples_are_concerned():
    shares = {name: network.concerned for name, network in changing().items() if network.concerned != 1}
    assert shares == {
        "neighbours that meet": 0.5,
        "a large sample that all look at": 11 / 12,  # all but itself
        "experts of a capacity": 0.5,
    }


def test_a_route_by_value_goes_both_ways_later():
    network = changing()["routing by value"]
    used = [[name for name in ("u", "v") if Truth(s).jacobians[name].any()] for s in (network.early, network.late)]
    assert used == [["v"], ["u", "v"]]


@pytest.mark.parametrize("name", ["a backward pass that clips", "a target far away, and a backward pass that clips"])
def test_a_backward_pass_is_cut_off_beyond_two(name):
    passes = []

    def bend(backward):
        passes.append(backward)
        return lambda h: h + 1

    network = changing(bend=bend)[name]
    p, x = network.early.parameters, network.early.inputs
    plain, bent = (network.early.apply(xp, p, x) for xp in (np, array_api_compat.numpy))
    np.testing.assert_allclose(bent, plain + p["v"].sum(axis=0))
    (backward,) = passes  # NumPy, of which the truth is made, has none
    cut = backward(np.array([-7.0, -2.25, -2.0, -1.5, 0.0, 1.0, 2.0, 2.25, 30.0]))
    np.testing.assert_array_equal(cut, [-2.0, -2.0, -2.0, -1.5, 0.0, 1.0, 2.0, 2.0, 2.0])


def reached(scenario, cotangent):
    """Of each sample: whether what is pulled back of a cotangent goes beyond the limit of the clipping."""
    return (np.abs(cotangent @ scenario.parameters["v"].T) > 2).any(axis=1)


def test_clipping_reaches_nothing_first_and_all_or_one_later():
    by_weights = changing()["a backward pass that clips"]
    by_target = changing()["a target far away, and a backward pass that clips"]
    for network in (by_weights, by_target):
        truth = Truth(network.early)
        assert not reached(network.early, truth.gradient).any()
        assert np.abs(network.early.parameters["v"]).sum(axis=1).max() < 2  # nor any signs
    assert reached(by_weights.late, Truth(by_weights.late).gradient).all()
    far = Truth(by_target.late).gradient
    assert np.flatnonzero(reached(by_target.late, far)).tolist() == [SAMPLES // 2]
    assert not reached(by_target.late, far / np.abs(far).max()).any()
    assert np.abs(by_target.late.parameters["v"]).sum(axis=1).max() < 2


def test_the_seed_draws_other_networks():
    first, again, other = (changing_networks(*seed)[0].early.inputs for seed in ((), (0,), (1,)))
    assert first.shape == (SAMPLES, 3)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_a_bend_there_is_no_bent_network():
    assert list(changing())[:-2] == [network.early.name for network in changing_networks()]
