"""Networks that change their mind: at first their samples keep apart, and later they meet, or a backward pass bends.

A check that is made once and remembered is right at first, and wrong later. Each network here looks innocent at the
first measurement; then the parameters, the inputs or a Python object that it looks at become other ones. What is
measured then has to be right, or refused. The networks are drawn from a seed, so that there is no end of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lnp.testing.kit import Case, Kit
from lnp.testing.oracle import Truth
from lnp.testing.scenarios import Arrays, Scenario

ATTEMPTS = 40
"""Measurements within which a change that concerns half of the samples is to be noticed: one sample is looked at each
time, so that chance leaves out one run in 10^12."""
STEP = 1e-6
"""Of the finite differences that give the Jacobian."""
NUMBERS = ("rate", "chi_loss", "chi_net", "chi_pos")


@dataclass(frozen=True)
class Changing:
    """A network at two moments.

    Attributes
    ----------
    early, late:
        The scenario as it is at first, and later: other parameters, other inputs, or neither.
    between:
        What else happens in between.
    concerned:
        The share of the samples whose outputs the change concerns. Less than all may be noticed some measurements
        later.
    dtype:
        In which it is measured.
    tolerance:
        Relative, of the numbers of the later moment.
    """

    early: Scenario
    late: Scenario
    between: Callable[[], None] = lambda: None
    concerned: float = 1.0
    dtype: str = "float64"
    tolerance: float = 1e-5


def check_change(kit: Kit, network: Changing) -> None:
    """Raise AssertionError unless both moments of one model are measured right, or refused with a ValueError."""
    if kit.moved is None:
        raise TypeError(f"The kit {kit.name} cannot move a model to other parameters. Expected Kit(moved=...).")
    model, batch = kit.build(network.early.cast(network.dtype))
    _check(kit, network, network.early, model, batch)
    network.between()
    late = network.late.cast(network.dtype)
    model, (_, batch) = kit.moved(model, late.parameters), kit.build(late)
    for attempt in range(ATTEMPTS):
        try:
            return _check(kit, network, network.late, model, batch)
        except AssertionError:
            if network.concerned == 1 or attempt == ATTEMPTS - 1:
                raise


def _check(kit: Kit, network: Changing, scenario: Scenario, model: Any, batch: Any) -> None:
    """Raise AssertionError unless the numbers are those of the dense Jacobian, nan inside compiled code, or refused."""
    truth = Truth(scenario.cast(network.dtype))
    case = Case(kit, scenario, truth, network.dtype)
    try:
        d = kit.decompose(model, batch, scenario.loss, estimator="exact")
    except ValueError:
        return
    refused = kit.compiled and all(math.isnan(float(kit.to_numpy(getattr(d, name)))) for name in NUMBERS)
    for name, expected in truth.factors().items():
        if not refused:
            case.equal(f"{name}, with the notes {d.notes},", getattr(d, name), expected, network.tolerance)


def changing_networks(
    seed: int = 0, samples: int = 12, bend: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None
) -> tuple[Changing, ...]:
    """Networks drawn from a seed.

    Parameters
    ----------
    samples:
        N, an even number.
    bend:
        (cotangent -> cotangent) -> the identity with this backward pass; without it there are no bent ones.
    """
    made = [*_gates(seed, samples), *_neighbours(seed, samples), _experts(seed, samples), _counter(seed, samples)]
    return (*made, _routed(seed, samples), *([] if bend is None else _clipped(seed, samples, bend)))


def _scenario(
    name: str, seed: int, samples: int, apply: Callable[[Any, Mapping[str, Any], Any], Any], **parameters: Any
) -> Scenario:
    """f = apply of tanh(x W) V with more parameters, whose Jacobian is taken by central differences."""
    rng = np.random.default_rng(seed)
    drawn = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 2))}
    given = {key: np.asarray(value, dtype="float64") for key, value in parameters.items()}
    inputs, targets = rng.normal(size=(samples, 3)), rng.normal(size=(samples, 2))
    return Scenario(name, {**drawn, **given}, inputs, targets, "mse", apply, partial(_differences, apply))


def _differences(apply: Callable[[Any, Mapping[str, Any], Any], Any], p: Arrays, x: np.ndarray) -> Arrays:
    """{name: (N, K, *parameter's shape)} by central differences."""
    found = {}
    for name, value in p.items():
        columns = []
        for at in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[at] = STEP
            up, down = (np.asarray(apply(np, {**p, name: value + sign * step}, x)) for sign in (1, -1))
            columns.append((up - down) / (2 * STEP))
        stacked = np.stack(columns, axis=-1)
        found[name] = stacked.reshape(*stacked.shape[:-1], *value.shape)
    return found


def _at(scenario: Scenario, **parameters: Any) -> Scenario:
    """The scenario with other values of some parameters."""
    given = {key: np.asarray(value, dtype="float64") for key, value in parameters.items()}
    return replace(scenario, parameters={**scenario.parameters, **given})


def _hidden(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
    return xp.tanh(x @ p["w"])


def _mean(xp: Any, h: Any) -> Any:
    """The mean over the batch, (1, ...)."""
    return xp.sum(h, axis=0)[None] / h.shape[0]


def _open(xp: Any, gate: Any) -> Any:
    """How far a gate is open: what it is above 1."""
    return xp.where(gate > 1, gate - 1, 0 * gate)


def _gates(seed: int, samples: int) -> list[Changing]:
    """Gates that open at a threshold, one behind another, by hardly anything, by the size of the outputs."""

    def threshold(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        h = _hidden(xp, p, x)
        return (h + _open(xp, p["a"]) * _mean(xp, h)) @ p["v"]

    def both(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        h = _hidden(xp, p, x)
        return (h + p["a"] * p["b"] * _mean(xp, h)) @ p["v"]

    def both_thresholds(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        h = _hidden(xp, p, x)
        return (h + _open(xp, p["a"]) * _open(xp, p["b"]) * _mean(xp, h)) @ p["v"]

    def by_size(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        f = _hidden(xp, p, x) @ p["v"]
        mean = _mean(xp, f * f)
        return f + xp.where(mean > 100, mean, 0 * mean)

    one = _scenario("a gate at a threshold", seed, samples, threshold, a=0.5)
    hardly = _scenario("a gate that is open by hardly anything", seed, samples, threshold, a=0.5)
    two = _scenario("a gate behind a gate", seed, samples, both, a=0.0, b=0.0)
    thresholds = _scenario("a threshold behind a threshold", seed, samples, both_thresholds, a=0.5, b=0.5)
    size = _scenario("a gate that the outputs open", seed, samples, by_size)
    return [
        Changing(one, _at(one, a=1.75)),
        Changing(hardly, _at(hardly, a=1 + 2.0**-13), dtype="float32", tolerance=3e-3),
        Changing(two, _at(two, a=3.0, b=3.0)),
        Changing(thresholds, _at(thresholds, a=2.0, b=2.0)),
        Changing(size, _at(size, v=40 * size.parameters["v"])),
    ]


def _neighbours(seed: int, samples: int) -> list[Changing]:
    """Samples that meet in some batches only: where two are alike, or where one is by far the largest."""

    def alike(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        """Each sample adds what is like it and came before it: unlike a sum over all, no two mirror each other."""
        h = _hidden(xp, p, x)
        distance = xp.sum((x[:, None, :] - x[None, :, :]) ** 2, axis=2)
        number = xp.arange(x.shape[0])
        near = xp.where((distance < 1e-4) & (number[:, None] > number[None, :]), 1 + 0 * distance, 0 * distance)
        return (h + near @ h) @ p["v"]

    def outlier(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        f = _hidden(xp, p, x) @ p["v"]
        size = xp.sum(xp.abs(x), axis=1)[:, None]
        mean = _mean(xp, size)
        return f + xp.where(size > 4 * mean, 0 * f, xp.where(mean > 20, _mean(xp, f) + 0 * f, 0 * f))

    near = _scenario("neighbours that meet", seed, samples, alike)
    pairs = np.repeat(near.inputs[: samples // 2], 2, axis=0)
    far = _scenario("a large sample that all look at", seed, samples, outlier)
    large = far.inputs.copy()
    large[0] = 400.0
    return [
        Changing(near, replace(near, inputs=pairs), concerned=0.5),
        Changing(far, replace(far, inputs=large), concerned=1 - 1 / samples),
    ]


def _experts(seed: int, samples: int) -> Changing:
    """Two experts of a capacity: samples that come when one is full are left out. At first half go to each."""

    def experts(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        score = x[:, :1] @ p["route"] + p["bias"]
        here = xp.where(score > 0, 1 + 0 * score, 0 * score)  # (N, 1): which of the two experts
        there = 1 - here
        same = here @ xp.matrix_transpose(here) + there @ xp.matrix_transpose(there)
        number = xp.arange(x.shape[0])
        before = xp.where(number[:, None] > number[None, :], same, 0 * same)
        place = xp.sum(before, axis=1)[:, None]
        h = _hidden(xp, p, x)
        chosen = here * (h @ p["first"]) + there * (h @ p["second"])
        return h @ p["v"] + xp.where(place < samples // 2, chosen, 0 * chosen)

    rng = np.random.default_rng(seed + 1)
    own = {"first": rng.normal(size=(4, 2)), "second": rng.normal(size=(4, 2)), "route": [[1.0]], "bias": 0.0}
    made = _scenario("experts of a capacity", seed, samples, experts, **own)
    inputs = made.inputs.copy()
    inputs[:, 0] = np.where(np.arange(samples) % 2 == 0, 1.0, -1.0) * (0.5 + np.abs(inputs[:, 0]))
    made = replace(made, inputs=inputs)
    return Changing(made, _at(made, bias=10.0), concerned=0.5)


def _counter(seed: int, samples: int) -> Changing:
    """A network that counts steps in a Python object, and lets its samples meet from some step on."""
    state = {"step": 0}

    def counting(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        h = _hidden(xp, p, x)
        return (h + _mean(xp, h) if state["step"] > 100 else h) @ p["v"]

    made = _scenario("a counter", seed, samples, counting)
    return Changing(made, made, between=lambda: state.update(step=1000))


def _routed(seed: int, samples: int) -> Changing:
    """Each sample chooses its weights by its own value: nothing meets, whichever way they go."""

    def routed(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        h = _hidden(xp, p, x)
        return xp.where(x[:, :1] > p["t"], h @ p["v"], h @ p["u"])

    rng = np.random.default_rng(seed + 2)
    made = _scenario("routing by value", seed, samples, routed, u=rng.normal(size=(4, 2)), t=-100.0)
    return Changing(made, _at(made, t=0.0123))


def _limited(xp: Any, d: Any) -> Any:
    """A cotangent, cut off beyond 2."""
    return xp.where(d > 2, 2 + 0 * d, xp.where(d < -2, -2 + 0 * d, d))


def _clipped(
    seed: int, samples: int, bend: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
) -> tuple[Changing, Changing]:
    """A backward pass that clips, which nothing reaches at first, and later all samples, or one."""

    def clipped(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        h = _hidden(xp, p, x)
        return (h if xp is np else bend(partial(_limited, xp))(h)) @ p["v"]

    made = _scenario("a backward pass that clips", seed, samples, clipped)
    far = replace(made, name="a target far away, and a backward pass that clips", targets=np.copy(made.targets))
    far = _at(far, v=0.3 * made.parameters["v"])
    far.targets[samples // 2, 0] += 1e5  # what is pulled back of g / m, and all signs, stay below the limit
    early = _at(made, v=0.01 * made.parameters["v"])
    return Changing(early, _at(made, v=30 * made.parameters["v"])), Changing(replace(early, name=far.name), far)
