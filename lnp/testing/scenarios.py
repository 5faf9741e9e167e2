"""Small networks with analytic Jacobians, written once for every array namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lnp.arguments import LossName

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scenario:
    """A model, a batch and a loss whose every number is known.

    Attributes
    ----------
    name:
        What a failing test calls it.
    parameters:
        {name: array}; dots in a name stand for nesting, as in "body.weight".
    inputs, targets:
        The batch, N samples along the first axis.
    loss:
        One of lnp's named losses.
    apply:
        (xp, parameters, inputs) -> outputs of shape (N, ...), by operators and functions of the namespace `xp`.
    jacobian:
        (parameters, inputs) -> {name: (N, K, *parameter's shape)}, by formula, in NumPy.
    interacts:
        Whether a sample's outputs depend on the other samples.
    """

    name: str
    parameters: Arrays
    inputs: np.ndarray
    targets: np.ndarray
    loss: LossName
    apply: Callable[[Any, Mapping[str, Any], Any], Any]
    jacobian: Callable[[Arrays, np.ndarray], Arrays]
    interacts: bool = False

    def cast(self, dtype: str) -> Scenario:
        """The same with every floating-point array in the given dtype."""
        return replace(
            self,
            parameters={name: _cast(array, dtype) for name, array in self.parameters.items()},
            inputs=_cast(self.inputs, dtype),
            targets=_cast(self.targets, dtype),
        )


def linear(samples: int = 3, outputs: int = 2, name: str = "linear", loss: LossName = "mse") -> Scenario:
    """f = x W + b."""
    rng = np.random.default_rng(samples + 10 * outputs)
    parameters = {"weight": rng.normal(size=(3, outputs)), "bias": rng.normal(size=outputs)}
    inputs, targets = rng.normal(size=(samples, 3)), rng.normal(size=(samples, outputs))

    def jacobian(p: Arrays, x: np.ndarray) -> Arrays:
        eye = np.eye(p["bias"].size)
        return {"weight": np.einsum("ni,kl->nkil", x, eye), "bias": np.broadcast_to(eye, (len(x), *eye.shape))}

    return Scenario(name, parameters, inputs, targets, loss, lambda xp, p, x: x @ p["weight"] + p["bias"], jacobian)


def prescribed(samples: int = 2, outputs: int = 3, name: str = "prescribed") -> Scenario:
    """f_n = A_n tanh(theta) with the inputs A_n: not linear, and its Jacobian at theta = 0 is A itself."""
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(samples, outputs, 4)), rng.normal(size=(samples, outputs))

    def jacobian(p: Arrays, a: np.ndarray) -> Arrays:
        return {"theta": a * (1 - np.tanh(p["theta"]) ** 2)}

    return Scenario(
        name,
        {"theta": np.zeros(4)},
        inputs,
        targets,
        "mse",
        lambda xp, p, a: xp.matmul(a, xp.tanh(p["theta"])),
        jacobian,
    )


def layers(name: str = "layers", soft: bool = False, samples: int = 3) -> Scenario:
    """f = tanh(x W1 + b1) W2 + b2 with class labels, one in three of them ignored, or with soft targets."""
    rng = np.random.default_rng(2)
    shapes = {"body.weight": (2, 4), "body.bias": (4,), "head.weight": (4, 3), "head.bias": (3,)}
    parameters = {key: rng.normal(size=shape) for key, shape in shapes.items()}
    targets = rng.dirichlet(np.ones(3), size=samples) if soft else np.resize([2, -100, 0], samples)
    return Scenario(name, parameters, rng.normal(size=(samples, 2)), targets, "cross_entropy", _mlp, _mlp_jacobian)


def _mlp(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
    return xp.tanh(x @ p["body.weight"] + p["body.bias"]) @ p["head.weight"] + p["head.bias"]


def _mlp_jacobian(p: Arrays, x: np.ndarray) -> Arrays:
    """The Jacobian of `_mlp`, {name: (N, K, *parameter's shape)}."""
    hidden = np.tanh(x @ p["body.weight"] + p["body.bias"])
    below = np.einsum("nj,jk->nkj", 1 - hidden**2, p["head.weight"])
    eye = np.eye(p["head.bias"].size)
    return {
        "body.weight": np.einsum("ni,nkj->nkij", x, below),
        "body.bias": below,
        "head.weight": np.einsum("nj,kl->nkjl", hidden, eye),
        "head.bias": np.broadcast_to(eye, (len(x), *eye.shape)),
    }


def tied() -> Scenario:
    """f = tanh(x W) W^T: both uses of W add before anything is squared."""
    rng = np.random.default_rng(3)
    inputs, targets = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))

    def jacobian(p: Arrays, x: np.ndarray) -> Arrays:
        hidden = np.tanh(x @ p["weight"])
        inner = np.einsum("ni,nj,kj->nkij", x, 1 - hidden**2, p["weight"])
        return {"weight": inner + np.einsum("ki,nj->nkij", np.eye(x.shape[1]), hidden)}

    weight = rng.normal(size=(3, 2))

    def apply(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        return xp.tanh(x @ p["weight"]) @ xp.matrix_transpose(p["weight"])

    return Scenario("tied", {"weight": weight}, inputs, targets, "mse", apply, jacobian)


def tokens(name: str = "tokens", labels: Any = ((1, -100, 0), (0, 1, 1))) -> Scenario:
    """f = table[tokens] W, shape (samples, positions, classes): an embedding, one row of it used twice."""
    rng = np.random.default_rng(4)
    parameters = {"embedding.table": rng.normal(size=(4, 3)), "head.weight": rng.normal(size=(3, 2))}

    def jacobian(p: Arrays, index: np.ndarray) -> Arrays:
        rows, eye = np.eye(4)[index], np.eye(2)
        table = np.einsum("ntv,dc->ntcvd", rows, p["head.weight"])
        head = np.einsum("ntd,ce->ntcde", p["embedding.table"][index], eye)
        return {"embedding.table": table.reshape(-1, 6, 4, 3), "head.weight": head.reshape(-1, 6, 3, 2)}

    def apply(xp: Any, p: Mapping[str, Any], index: Any) -> Any:
        rows = xp.take(p["embedding.table"], xp.reshape(index, (-1,)), axis=0)
        return xp.reshape(rows, (*index.shape, 3)) @ p["head.weight"]

    index = np.array([[1, 2, 1], [0, 3, 2], [3, 1, 0], [2, 2, 0]])[: len(labels)]
    return Scenario(name, parameters, index, np.array(labels), "cross_entropy", apply, jacobian)


def centred() -> Scenario:
    """f = h - mean of h over the batch, with h = tanh(x W): the samples interact, in outputs and gradients."""
    rng = np.random.default_rng(5)
    inputs, targets = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))

    def apply(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        hidden = xp.tanh(x @ p["weight"])
        return hidden - xp.mean(hidden, axis=0, keepdims=True)

    def jacobian(p: Arrays, x: np.ndarray) -> Arrays:
        slope = 1 - np.tanh(x @ p["weight"]) ** 2
        alone = np.einsum("ni,nk,kl->nkil", x, slope, np.eye(2))
        return {"weight": alone - alone.mean(axis=0)}

    return Scenario("centred", {"weight": rng.normal(size=(2, 2))}, inputs, targets, "mse", apply, jacobian, True)


def gated() -> Scenario:
    """f = h + a * mean of h over the batch, with h = x W and a = 0: the samples interact in one gradient only."""
    rng = np.random.default_rng(6)
    parameters = {"weight": rng.normal(size=(2, 2)), "gate": np.zeros(())}
    inputs, targets = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))

    def apply(xp: Any, p: Mapping[str, Any], x: Any) -> Any:
        hidden = x @ p["weight"]
        return hidden + p["gate"] * xp.mean(hidden, axis=0, keepdims=True)

    def jacobian(p: Arrays, x: np.ndarray) -> Arrays:
        mixed = x + p["gate"] * x.mean(axis=0)
        hidden = x @ p["weight"]
        gate = np.broadcast_to(hidden.mean(axis=0), hidden.shape)
        return {"weight": np.einsum("ni,kl->nkil", mixed, np.eye(2)), "gate": gate}

    return Scenario("gated", parameters, inputs, targets, "mse", apply, jacobian, True)


LINEAR, LAYERS, TOKENS = linear(), layers(), tokens()
HUBER = linear(5, 3, "huber", "huber")
"""Outputs and differences from the targets on both sides of the bend, in all combinations."""
BINARY = replace(
    linear(3, 2, "binary labels", "binary_cross_entropy"), targets=np.array([[0.0, 1.0], [1.0, 1.0], [0.25, 0.0]])
)
WIDE = prescribed(2, 9, "wide")
"""More outputs than `auto` takes one by one."""
MANY, MANY_GROUPS = layers("thirteen samples", samples=13), (0, 1, 3, 4, 6, 8, 9, 11)
"""More samples than the grouped estimator forms groups, one of them without a partner, and where its groups begin."""
ONE_OUTPUT, ONE_SAMPLE = linear(4, 1, "one output"), linear(1, 3, "one sample")
SINGLE = linear(1, 1, "one sample of one output")
SIX = linear(6, 2, "six samples")
"""Enough samples for values of the population."""
PADDED = tokens("padded", ((1, 0, 0), (0, -100, -100), (-100, 1, 1), (1, 1, 0)))
"""Samples that hold different numbers of labels."""
INDEPENDENT = (LINEAR, prescribed(), LAYERS, layers("soft targets", soft=True), tied(), TOKENS, ONE_OUTPUT, ONE_SAMPLE)
"""Samples do not interact."""
INTERACTING = (centred(), gated())
REGULAR = (*INDEPENDENT, *INTERACTING)
"""Every quantity is finite and not zero."""

ZERO_GRADIENT = replace(LINEAR, name="zero gradient", targets=LINEAR.apply(np, LINEAR.parameters, LINEAR.inputs))
ZERO_JACOBIAN = replace(prescribed(), name="zero Jacobian", inputs=np.zeros((2, 3, 4)))
NOT_FINITE = replace(LINEAR, name="not finite", inputs=np.where(np.eye(3) > 0, np.nan, LINEAR.inputs))
ALL_IGNORED = tokens("all labels ignored", ((-100,) * 3,) * 2)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array
