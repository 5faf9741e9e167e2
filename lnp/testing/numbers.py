"""Checks of the numbers that users get, against dense matrices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

import lnp
from lnp.testing import scenarios
from lnp.testing.kit import Kit
from lnp.testing.oracle import Loss, Truth


def exact_factors_are_those_of_the_dense_kernel(kit: Kit) -> None:
    """Loss, rate and the three factors, with chi_pos = g'Kg / (g'g tr K)."""
    for case in kit.cases(*scenarios.INDEPENDENT, scenarios.SINGLE):
        d, truth = kit.measure(case.scenario, estimator="exact"), case.truth
        case.equal("loss", d.loss, truth.loss)
        case.equal("loss_terms", d.loss_terms, truth.terms)
        case.true((d.samples, d.outputs) == truth.shape, f"samples and outputs are {d.samples}, {d.outputs}")
        case.true(d.estimator == "exact", f"estimator is {d.estimator!r}")
        case.equal("chi_net_stderr", d.chi_net_stderr, 0)
        case.equal("chi_pos_stderr", d.chi_pos_stderr, 0)
        case.factors("", d, truth.factors())
        case.equal("the product of the factors", float(d.chi_loss) * float(d.chi_net) * float(d.chi_pos), d.rate)
    for case in kit.cases(scenarios.SINGLE):
        case.equal("chi_pos of one sample with one output", kit.measure(case.scenario).chi_pos, 1.0)


def layers_add_up(kit: Kit) -> None:
    """Each layer against the dense kernel of its parameters; rates and network scales add up, positions recombine."""
    for case in kit.cases(scenarios.LAYERS, scenarios.LINEAR, dtypes=1):
        for owner in (True, lambda name: name[-1]):
            d, truth = kit.measure(case.scenario, by_layer=owner, estimator="exact"), case.truth
            members: dict[str, list[str]] = {}
            for name in truth.jacobians:
                layer = owner(name) if callable(owner) else name.rpartition(".")[0] or name
                members.setdefault(layer, []).append(name)
            case.true(set(d.layers) == set(members), f"layers are {list(d.layers)}, expected {list(members)}")
            for layer, names in members.items():
                case.factors(f"layer {layer}: ", d.layers[layer], truth.factors(names), ("rate", "chi_net", "chi_pos"))
            parts = d.layers.values()
            case.equal("the sum of rates", sum(float(part.rate) for part in parts), d.rate)
            case.equal("the sum of chi_net", sum(float(part.chi_net) for part in parts), d.chi_net)
            weighted = sum(float(part.chi_net) * float(part.chi_pos) for part in parts) / float(d.chi_net)
            case.equal("the weighted mean of chi_pos", weighted, d.chi_pos)
        case.true(kit.measure(case.scenario).layers is None, "layers are given without being asked for")


def population_is_the_mean_over_pairs(kit: Kit) -> None:
    """Rate, position and noise scale over pairs of different samples; None and a note without single samples."""
    for case in kit.cases(scenarios.SIX, scenarios.PADDED):
        truth = case.truth
        d, expected = kit.measure(case.scenario, population=True, estimator="exact"), truth.factors()
        n, g = truth.shape[0], truth.gradient
        own = truth.block_square_norms(g, list(range(n))).sum()
        labels = np.asarray(case.scenario.targets)
        weights = np.ones(n) if case.scenario.loss == "mse" else np.sum(labels >= 0, axis=1)
        spread = np.sum(weights**2) / np.sum(weights) ** 2
        rate = (expected["rate"] - own) / (1 - spread)
        case.equal("rate", d.population.rate, rate)
        case.equal("chi_pos", d.population.chi_pos, rate / expected["chi_loss"] / expected["chi_net"])
        scale = n * own / rate - n * spread
        case.equal("noise_scale", d.population.noise_scale, scale, case.tolerance)
        case.equal("gradient_noise", d.population.gradient_noise, n * own - n * spread * rate, case.tolerance)
        low, high = float(d.population.noise_scale_low), float(d.population.noise_scale_high)
        case.true(0 <= low <= scale <= high, f"the noise scale {scale} is not within {low} and {high}")
        errors = [getattr(d.population, f"{name}_stderr") for name in ("rate", "chi_pos")]
        case.true(all(float(error) > 0 for error in errors), f"standard errors are {errors}")
        d = kit.measure(case.scenario, population=True, estimator="joint")
        case.true(d.population is None, "the joint estimator gave population values")
        case.true(any("population" in note for note in d.notes), f"no note on it: {d.notes}")


def batches_of_a_stream_are_one(kit: Kit) -> None:
    """The same batch twice, one after the other, has the factors of one; each has signs of its own, by 64 bits."""
    for case in kit.cases(scenarios.LINEAR, scenarios.LAYERS):
        model, batch = kit.build(case.scenario)
        d = lnp.decompose(model, [batch, batch], case.scenario.loss, batches=2, estimator="exact")
        case.factors("batches=2: ", d, case.truth.factors())
    case = kit.cases(scenarios.MANY)[0]
    traces = [kit.measure(case.scenario, estimator="joint", max_probes=1, seed=seed).chi_net for seed in (3, 3 + 2**40)]
    case.true(float(traces[0]) != float(traces[1]), "seeds that differ in the upper 32 of 64 bits have the same signs")


def parameters_are_selected(kit: Kit) -> None:
    """A glob, a predicate and a list; the others are constants then."""
    for case in kit.cases(scenarios.LAYERS, dtypes=1):
        expected = case.truth.factors(["head.weight", "head.bias"])
        for chosen in ("head.*", lambda name: "head" in name, ["head.bias", "head.weight"]):
            case.factors(f"parameters={chosen}: ", kit.measure(case.scenario, parameters=chosen), expected)
        for wrong in ("tail.*", lambda name: False, ["head.bias", "no such parameter"]):
            case.raises(f"parameters={wrong}", ValueError, partial(kit.measure, case.scenario, parameters=wrong))


def losses_may_be_callables(kit: Kit) -> None:
    """A loss times c has chi_loss times c^2 and nothing else; loss_terms is seen, assumed or given, without a note."""
    for case in kit.cases(scenarios.LINEAR, dtypes=1):
        expected = case.truth.factors()
        scaled = {**expected, "rate": 9 * expected["rate"], "chi_loss": 9 * expected["chi_loss"]}
        d = kit.measure(case.scenario, loss=kit.loss(three_times_mse))
        case.factors("3 x mse: ", d, scaled)
        case.equal("3 x mse: loss", d.loss, 3 * case.truth.loss)
        case.equal("3 x mse: loss_terms", d.loss_terms, case.truth.terms)
        d = kit.measure(case.scenario, loss=kit.loss(three_times_mse), loss_terms=2)
        halved = case.truth.factors(terms=2)
        case.factors("loss_terms=2: ", d, {**halved, "rate": 9 * halved["rate"], "chi_loss": 9 * halved["chi_loss"]})
        case.true(not any("loss_terms" in note for note in d.notes), f"a note on loss_terms that was given: {d.notes}")


def squares_stay_in_range(kit: Kit) -> None:
    """In float32 too, a loss times 1e-25 or 1e25 has the same position, and no value is lost: its squares would be."""
    for scale in (1e-25, 1e25):
        case = kit.cases(scenarios.LINEAR)[-1]
        d = kit.measure(case.scenario, loss=kit.loss(scaled_mse(scale)), loss_terms=6, population=False)
        expected = case.truth.factors()
        case.equal(f"chi_pos, loss times {scale}", d.chi_pos, expected["chi_pos"])
        case.equal(f"chi_net, loss times {scale}", d.chi_net, expected["chi_net"])
        case.equal(f"loss, times {scale}", float(d.loss) / scale, case.truth.loss)
        if not kit.compiled:  # whose own numbers are of float32
            for name in ("rate", "chi_loss"):
                found = float(getattr(d, name)) / scale / scale
                case.equal(f"{name}, loss times {scale}", found, expected[name])
            said = [note for note in d.notes if "zero" in note or "finite" in note or "digits" in note]
            case.true(not said, f"notes of a loss times {scale} are {said}")


def named_losses_are_their_formulas(kit: Kit) -> None:
    """The Huber loss and the binary cross-entropy by name, and integer labels for the latter."""
    whole = replace(scenarios.BINARY, targets=np.array([[0, 1], [1, 1], [0, 0]]))
    for case in kit.cases(scenarios.HUBER, scenarios.BINARY, whole, dtypes=1):
        d = kit.measure(case.scenario, estimator="exact")
        case.equal("loss", d.loss, case.truth.loss)
        case.equal("loss_terms", d.loss_terms, case.truth.terms)
        case.factors("", d, case.truth.factors())


three_times_mse = Loss(lambda xp, f, y: 3 * xp.mean((f - y) ** 2), lambda f, y: 6 * (f - y) / f.size)
"""3 x the mean squared error."""


def scaled_mse(scale: float) -> Loss:
    """The mean squared error times a number."""
    return Loss(lambda xp, f, y: scale * xp.mean((f - y) ** 2), lambda f, y: scale * 2 * (f - y) / f.size)


def cross_response_is_the_dense_one(kit: Kit) -> None:
    """<grad L_m, grad L_t>, its factors and their errors; with the same batch twice, the decomposition."""
    for case in kit.cases(scenarios.LINEAR, scenarios.LAYERS, dtypes=1):
        model, batch = kit.build(case.scenario)
        other = replace(
            case.scenario, inputs=case.scenario.inputs[::-1] * 2, targets=case.scenario.targets[:1].repeat(3, 0)
        )
        truths = (case.truth, Truth(other))
        gradients = [np.concatenate([v.ravel() for v in t.pulled(t.gradient).values()]) for t in truths]
        rate = float(gradients[0] @ gradients[1])
        means = {
            name: (truths[0].factors()[name] * truths[1].factors()[name]) ** 0.5 for name in ("chi_loss", "chi_net")
        }
        loss = case.scenario.loss
        r = lnp.cross_response(model, batch, kit.build(other)[1], loss)
        case.factors("", r, {"rate": rate, **means, "chi_pos": rate / means["chi_loss"] / means["chi_net"]})
        case.equal("chi_net_stderr", r.chi_net_stderr, 0)
        case.factors("trained: ", r.trained, truths[0].factors())
        case.factors("measured: ", r.measured, truths[1].factors())
        case.factors("twice the same batch: ", lnp.cross_response(model, batch, batch, loss), truths[0].factors())
    for case in kit.cases(scenarios.MANY, dtypes=1):
        model, batch = kit.build(case.scenario)
        r = lnp.cross_response(
            model, batch, batch, case.scenario.loss, estimator="joint", rtol=0.0, max_probes=3, seed=5
        )
        relative = [float(d.chi_net_stderr) / float(d.chi_net) for d in (r.trained, r.measured)]
        expected = 0.5 * (relative[0] + relative[1])  # of the same signs on the same batch
        case.equal("relative error of chi_net", float(r.chi_net_stderr) / float(r.chi_net), expected)
        case.equal("relative error of chi_pos", float(r.chi_pos_stderr) / abs(float(r.chi_pos)), expected)


def loss_changes_are_those_of_the_step(kit: Kit) -> None:
    """Measured: L(theta + Delta) - L(theta). Predicted: <grad L, Delta>. For a learning rate and for an update."""
    for case in kit.cases(scenarios.LAYERS, scenarios.LINEAR, *scenarios.INTERACTING, dtypes=1):
        truth, loss = case.truth, case.scenario.loss
        gradient = truth.pulled(truth.gradient)
        rng = np.random.default_rng(8)
        given = {
            name: (rng.normal(size=p.shape) / 8).astype(case.dtype) for name, p in case.scenario.parameters.items()
        }
        step = {name: -0.25 * part for name, part in gradient.items()}
        for what, delta, options in (
            ("learning_rate", step, {"learning_rate": 0.25}),
            ("update", given, {"update": kit.update(given)}),
        ):
            model, batch = kit.build(case.scenario)
            # the difference of two losses: rounding is relative to the loss itself
            rounding = case.rounding * (1 + truth.loss)
            change = truth.loss_at(truth.moved(delta)) - truth.loss
            measured = lnp.measured_loss_change(model, batch, loss, **options)
            case.equal(f"measured change, {what}", measured, change, rounding / abs(change))
            slope = sum(float(np.sum(gradient[name] * part)) for name, part in delta.items())
            case.equal(f"predicted change, {what}", lnp.predicted_loss_change(model, batch, loss, **options), slope)
        d = kit.measure(case.scenario, estimator="joint", max_probes=1)
        case.equal("predicted_loss_change", d.predicted_loss_change(0.25), -0.25 * truth.factors()["rate"])


def spectrum_is_the_dense_measure(kit: Kit) -> None:
    """Mean, weights and moments of where g sits in the spectrum, also of J M J^T; a TypeError without products J u."""
    case = kit.cases(scenarios.LAYERS, dtypes=1)[0]
    (model, batch), truth = kit.build(case.scenario), case.truth
    measure = partial(lnp.spectrum, model, batch, case.scenario.loss, steps=truth.gradient.size, estimator="exact")
    if kit.record(case.scenario).jvp is None:
        case.raises("a spectrum without Jacobian-vector products", TypeError, measure)
        return
    rng = np.random.default_rng(9)
    scales = {name: rng.uniform(0.5, 2, size=p.shape) for name, p in case.scenario.parameters.items()}
    cast = {name: scale.astype(case.dtype) for name, scale in scales.items()}
    scaled = sum(j * cast[name].reshape(-1) @ j.T for name, j in truth.jacobians.items())
    g = truth.gradient.reshape(-1)
    for kernel, options in ((truth.kernel(), {}), (scaled, {"preconditioner": kit.update(cast)})):
        s, size = measure(**options), np.linalg.norm(kernel, 2)
        case.equal("chi_pos", s.chi_pos, g @ kernel @ g / (g @ g) / np.trace(kernel))
        case.equal("the sum of the weights", s.weights.sum(), 1.0)
        case.equal("lambda_max", s.lambda_max, size, case.tolerance)
        for order in range(1, 6):
            moment = g @ np.linalg.matrix_power(kernel / size, order) @ g / (g @ g)
            case.equal(f"moment {order}", s.weights @ (s.eigenvalues / size) ** order, moment, case.tolerance)


NUMBER_CHECKS = (
    exact_factors_are_those_of_the_dense_kernel,
    layers_add_up,
    population_is_the_mean_over_pairs,
    batches_of_a_stream_are_one,
    parameters_are_selected,
    losses_may_be_callables,
    squares_stay_in_range,
    named_losses_are_their_formulas,
    cross_response_is_the_dense_one,
    loss_changes_are_those_of_the_step,
    spectrum_is_the_dense_measure,
)
