"""Checks of the record that a backend builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lnp.contract.gradient_pass import gradient_pass
from lnp.contract.linearization import Linearization, device_of
from lnp.losses.sample_losses import sample_losses_of
from lnp.testing import scenarios
from lnp.testing.kit import Case, Kit

DRAWS = 200


def record_holds_values(kit: Kit) -> None:
    """Outputs, loss, loss gradient and loss terms, in the dtype and shapes of the record."""
    for case in kit.cases(*scenarios.REGULAR):
        lin, truth = kit.record(case.scenario), case.truth
        case.equal("outputs", lin.outputs, truth.outputs)
        case.equal("loss", lin.loss, truth.loss)
        case.equal("loss_gradient", lin.loss_gradient, truth.gradient)
        case.equal("loss_terms", lin.loss_terms, truth.terms)
        for what in ("outputs", "loss_gradient"):
            dtype = kit.to_numpy(getattr(lin, what)).dtype
            case.true(dtype == case.dtype, f"{what} has dtype {dtype}")
        parts = None if case.scenario.interacts else sample_losses_of(lin)  # nan where the record finds that
        if parts is not None:  # nan where they do not add up
            case.equal("parts of the loss", kit.to_numpy(parts.parts).sum(), truth.loss)
            case.equal("shares in the loss", kit.to_numpy(parts.shares).sum(), 1.0)


def loss_is_inferred(kit: Kit) -> None:
    """Cross-entropy for labels, mean squared error for floats."""
    for case in kit.cases(scenarios.LINEAR, scenarios.LAYERS, scenarios.TOKENS, dtypes=1):
        case.equal("loss", kit.record(case.scenario, loss=None).loss, case.truth.loss)


def vjp_is_the_jacobian(kit: Kit) -> None:
    """<J_l^T e_i, J_l^T e_j> is each parameter's kernel, and J^T v is linear in v."""
    for case in kit.cases(*scenarios.REGULAR):
        lin, truth = kit.record(case.scenario), case.truth
        units = np.eye(truth.outputs.size).reshape(-1, *truth.shape)
        pulled = [lin.vjp(_array(lin, unit)) for unit in units]
        v = _cotangent(truth.shape)
        along = lin.vjp(_array(lin, v))
        names = list(lin.inner_products(along, along))
        case.true(set(names) == set(truth.jacobians), f"parameters are {names}, expected {list(truth.jacobians)}")
        for name in names:
            kernel = truth.kernel([name])
            rows = [[_value(kit, lin.inner_products(a, b)[name]) for b in pulled] for a in pulled]
            case.equal(f"kernel of {name}", rows, kernel)
            products = [_value(kit, lin.inner_products(a, along)[name]) for a in pulled]
            case.equal(f"J J^T v of {name}", products, kernel @ v.reshape(-1))
        if lin.group_square_norms is not None and lin.groups == 1:
            for name, norm in lin.group_square_norms(_array(lin, v)).items():
                case.equal(f"square norm of {name}", norm, [v.reshape(-1) @ truth.kernel([name]) @ v.reshape(-1)])


def jvp_is_the_jacobian(kit: Kit) -> None:
    """J (J^T v) is the kernel times v."""
    for case in kit.cases(*scenarios.REGULAR, dtypes=1):
        lin, truth = kit.record(case.scenario), case.truth
        if lin.jvp is None:
            continue
        v = _cotangent(truth.shape)
        expected = (truth.kernel() @ v.reshape(-1)).reshape(truth.shape)
        case.equal("jvp(vjp(v))", lin.jvp(lin.vjp(_array(lin, v))), expected)


def gradient_pass_yields_what_is_asked_for(kit: Kit) -> None:
    """Squared norms of J^T g, those of single samples, their products with it and J^T g itself, in any combination."""
    everything = {"per_sample": True, "products": 2, "vector": True}
    wishes: list[dict[str, Any]] = [{}, {"vector": True}, {"per_sample": True}, {"products": 2}, everything]
    for case in kit.cases(*scenarios.INDEPENDENT, dtypes=1):
        lin = kit.record(case.scenario)
        for wish in wishes:
            _check_gradient_pass(kit, case, lin, wish)
    for case in kit.cases(*scenarios.INTERACTING, dtypes=1):
        lin = kit.record(case.scenario)
        _check_gradient_pass(kit, case, lin, {})
        _check_gradient_pass(kit, case, lin, {"vector": True})


def _check_gradient_pass(kit: Kit, case: Case, lin: Linearization, wish: Mapping[str, Any]) -> None:
    """Compare what one wish yields with the dense Jacobian."""
    truth = case.truth
    found = gradient_pass(lin, **wish)
    g = truth.gradient / kit.to_numpy(found.magnitude)
    whole = truth.pulled(g)
    case.true(set(found.square_norms) == set(whole), f"gradient_pass({wish}) names {sorted(found.square_norms)}")
    for name, part in whole.items():
        case.equal(f"gradient_pass({wish}) of {name}", found.square_norms[name], np.sum(part**2))
    if "per_sample" in wish:
        assert found.sample_square_norms is not None
        for name in whole:
            expected = truth.block_square_norms(g, list(range(len(g))), [name])
            case.equal(f"gradient_pass({wish}), samples of {name}", found.sample_square_norms[name], expected)
    if "products" in wish:
        index = np.arange(len(g)) if found.index is None else kit.to_numpy(found.index)
        expected = np.sum((truth.kernel() @ g.reshape(-1)).reshape(g.shape) * g, axis=1)[index]
        case.equal(f"gradient_pass({wish}), products", found.products, expected)
    if "vector" in wish:
        assert found.vector is not None
        own = lin.inner_products(found.vector, lin.vjp(_array(lin, g)))
        for name, part in whole.items():
            case.equal(f"gradient_pass({wish}), J^T g of {name}", own[name], np.sum(part**2))


def sample_square_norms_are_those_of_single_samples(kit: Kit) -> None:
    """||J_n^T v_n||^2 for each parameter, by the dense Jacobian and by cotangents zero on other samples."""
    for case in kit.cases(*scenarios.INDEPENDENT):
        lin, truth = kit.record(case.scenario), case.truth
        case.true(lin.sample_square_norms is not None, "the record has no sample_square_norms")
        case.true(not _is_true(kit, lin.coupled), "the samples were found to interact")
        v = _cotangent(truth.shape)
        norms = lin.sample_square_norms(_array(lin, v))  # type: ignore[misc]
        singles = [np.where(np.arange(len(v))[:, None] == n, v, 0) for n in range(len(v))]
        pulled = [lin.vjp(_array(lin, single)) for single in singles]
        for name in truth.jacobians:
            expected = truth.block_square_norms(v, list(range(len(v))), [name])
            case.equal(f"sample_square_norms of {name}", norms[name], expected)
            alone = [_value(kit, lin.inner_products(u, u)[name]) for u in pulled]
            case.equal(f"square norms of {name} one sample at a time", alone, expected)


def group_square_norms_are_those_of_groups(kit: Kit) -> None:
    """||J_g^T v_g||^2 for micro-batches of two samples, where the backend has them."""
    for case in kit.cases(scenarios.LAYERS, scenarios.ONE_OUTPUT, dtypes=1):
        lin, truth = kit.record(case.scenario, microbatch=2), case.truth
        v = _cotangent(truth.shape)
        case.equal("J^T v", _total(kit, lin, v), float(np.sum(truth.block_square_norms(v, [0]))))
        if lin.group_square_norms is None:
            continue
        norms, starts = lin.group_square_norms(_array(lin, v)), list(range(0, len(v), 2))
        case.true(lin.groups == len(starts), f"groups is {lin.groups}, expected {len(starts)}")
        for name in truth.jacobians:
            expected = truth.block_square_norms(v, starts, [name])
            case.equal(f"group_square_norms of {name}", norms[name], expected)


def interacting_samples_are_noticed(kit: Kit) -> None:
    """No `sample_square_norms`, or `coupled`, or right numbers all the same."""
    for case in kit.cases(*scenarios.INTERACTING):
        lin, truth = kit.record(case.scenario), case.truth
        if lin.sample_square_norms is None or _is_true(kit, lin.coupled):
            continue
        v = _cotangent(truth.shape)
        expected = truth.block_square_norms(v, list(range(len(v))))
        case.equal(
            "sample_square_norms", sum(map(kit.to_numpy, lin.sample_square_norms(_array(lin, v)).values())), expected
        )


def signs_are_independent(kit: Kit) -> None:
    """+-1 in the outputs' dtype, the same for one index and seed, uncorrelated across samples, outputs and indices."""
    for case in kit.cases(scenarios.LINEAR):
        lin = kit.record(case.scenario, seed=0)
        drawn = np.stack([kit.to_numpy(lin.signs(index)) for index in range(DRAWS)])
        case.true(drawn.shape[1:] == case.truth.shape, f"signs have shape {drawn.shape[1:]}")
        case.true(drawn.dtype == case.dtype, f"signs have dtype {drawn.dtype}")
        case.true(bool(np.all(np.abs(drawn) == 1)), "signs are not all +1 or -1")
        case.equal("signs(7) again", lin.signs(7), drawn[7], 0)
        case.equal("signs(7) of another record", kit.record(case.scenario, seed=0).signs(7), drawn[7], 0)
        seeded = kit.record(case.scenario, seed=1)
        other = np.stack([kit.to_numpy(seeded.signs(index)) for index in range(20)])
        case.true(not np.array_equal(other, drawn[:20]), "another seed gives the same signs")
        flat = drawn.reshape(DRAWS, -1).astype("float64")
        pairs = np.triu(flat.T @ flat, k=1)
        worst = max(
            np.abs(pairs).max(), np.abs(flat.sum(axis=0)).max(), np.abs(np.sum(flat[1:] * flat[:-1], axis=0)).max()
        )
        # 33 sums of 200 independent signs, standard deviation 14.1 each: beyond 5 of it once in 50000 backends
        case.true(worst < 5 * DRAWS**0.5, f"signs are correlated: a sum of {DRAWS} products is {worst}")


def loss_along_moves_the_parameters(kit: Kit) -> None:
    """L(theta + step J^T v), and L itself for a step of zero."""
    for case in kit.cases(*scenarios.REGULAR, dtypes=1):
        lin, truth = kit.record(case.scenario), case.truth
        if lin.loss_along is None:
            continue
        v = _cotangent(truth.shape)
        u = lin.vjp(_array(lin, v))
        case.equal("loss_along(u, 0)", lin.loss_along(u, 0.0), truth.loss)
        step = {name: 0.25 * part for name, part in truth.pulled(v).items()}
        case.equal("loss_along(u, 0.25)", lin.loss_along(u, 0.25), truth.loss_at(truth.moved(step)))


RECORD_CHECKS = (
    record_holds_values,
    loss_is_inferred,
    vjp_is_the_jacobian,
    jvp_is_the_jacobian,
    gradient_pass_yields_what_is_asked_for,
    sample_square_norms_are_those_of_single_samples,
    group_square_norms_are_those_of_groups,
    interacting_samples_are_noticed,
    signs_are_independent,
    loss_along_moves_the_parameters,
)


def _cotangent(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(9).normal(size=shape)


def _array(lin: Linearization, array: np.ndarray) -> Any:
    return lin.xp.asarray(array, dtype=lin.outputs.dtype, device=device_of(lin.outputs))


def _total(kit: Kit, lin: Linearization, v: np.ndarray) -> float:
    pulled = lin.vjp(_array(lin, v))
    products: Mapping[str, Any] = lin.inner_products(pulled, pulled)
    return sum(_value(kit, product) for product in products.values())


def _value(kit: Kit, array: Any) -> float:
    return float(kit.to_numpy(array))


def _is_true(kit: Kit, flag: Callable[[], Any] | None) -> bool:
    return flag is not None and bool(kit.to_numpy(flag()))
