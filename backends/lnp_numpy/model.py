"""Models that bring their own Jacobian, since NumPy cannot differentiate.

Each answers `linearize(inputs)` with a `Local`: the outputs and the Jacobian's actions around the parameters.
Vectors in parameter space are dictionaries {parameter name: array of its shape}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Local:
    """A model around its parameters, for one set of inputs; outputs (N, ...), cotangents of the same shape.

    Attributes
    ----------
    outputs:
        f.
    vjp:
        v -> {name: J^T v}.
    jvp:
        {name: u} -> J u.
    moved:
        ({name: u}, step) -> outputs at theta + step * u.
    sample_square_norms:
        v -> {name: (N,) array of ||J_n^T v_n||^2}, or None.
    """

    outputs: np.ndarray
    vjp: Callable[[np.ndarray], Vector]
    jvp: Callable[[Vector], np.ndarray]
    moved: Callable[[Vector, float], np.ndarray]
    sample_square_norms: Callable[[np.ndarray], Vector] | None


@dataclass(frozen=True)
class JacobianModel:
    """A function with an explicit Jacobian.

    Attributes
    ----------
    function:
        (parameters, inputs) -> outputs of shape (N, ...).
    jacobian:
        (parameters, inputs) -> {name: outputs' shape + parameter's shape}.
    parameters:
        {name: array}.

    Examples
    --------
    >>> import numpy as np
    >>> sine, slope = lambda p, x: np.sin(x * p["w"]), lambda p, x: {"w": x * np.cos(x * p["w"])}
    >>> model = JacobianModel(sine, slope, {"w": np.array(0.0)})
    >>> model.linearize(np.ones((3, 1))).vjp(np.ones((3, 1)))
    {'w': array(3.)}
    """

    function: Callable[[Vector, Any], np.ndarray]
    jacobian: Callable[[Vector, Any], Vector]
    parameters: Vector

    def linearize(self, inputs: Any) -> Local:
        """Outputs and dense Jacobian at the parameters."""
        outputs = np.asarray(self.function(self.parameters, inputs))
        dense = {name: np.asarray(array) for name, array in self.jacobian(self.parameters, inputs).items()}
        for name, array in dense.items():
            expected = outputs.shape + np.shape(self.parameters[name])
            if array.shape != expected:
                raise ValueError(
                    f"The Jacobian with respect to {name!r} has shape {array.shape}. Expected {expected}, the "
                    "outputs' shape followed by the parameter's. Check jacobian(parameters, inputs)."
                )
        axes = outputs.ndim

        def vjp(v: np.ndarray) -> Vector:
            return {name: np.tensordot(v, array, axes=axes) for name, array in dense.items()}

        def jvp(u: Vector) -> np.ndarray:
            parts = [np.tensordot(array, u[name], axes=array.ndim - axes) for name, array in dense.items()]
            return np.sum(parts, axis=0)

        def moved(u: Vector, step: float) -> np.ndarray:
            return self.function(
                {name: p + step * u[name] if name in u else p for name, p in self.parameters.items()}, inputs
            )

        def sample_square_norms(v: np.ndarray) -> Vector:
            pulled = {name: np.einsum("nk,nkp->np", *_by_sample(v, array)) for name, array in dense.items()}
            return {name: np.sum(array**2, axis=1) for name, array in pulled.items()}

        return Local(outputs, vjp, jvp, moved, sample_square_norms)


@dataclass(frozen=True)
class LinearModel:
    """outputs = inputs @ weight + bias, with inputs (N, D), weight (D, K), bias (K,) or None."""

    weight: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        given: list[tuple[str, Any, int]] = [("weight", self.weight, 2)]
        for name, array, axes in given + ([] if self.bias is None else [("bias", self.bias, 1)]):
            if not hasattr(array, "shape") or np.ndim(array) != axes or np.asarray(array).dtype.kind not in "fiub":
                kind = f"{type(array).__name__} of shape {np.shape(array)} and dtype {np.asarray(array).dtype}"
                raise ValueError(
                    f"The {name} is a {kind}. Expected an array of real numbers, (inputs, outputs), or (outputs,) "
                    "of a bias."
                )

    def features(self, inputs: np.ndarray) -> np.ndarray:
        """What the weight multiplies, shape (N, D)."""
        return np.asarray(inputs)

    @property
    def parameters(self) -> Vector:
        """The trainable arrays by name."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def linearize(self, inputs: np.ndarray) -> Local:
        """The Jacobian is features (x) identity, and is never formed."""
        features = self.features(inputs)
        if features.ndim != 2 or features.shape[1] != self.weight.shape[0] or features.dtype.kind not in "fiub":
            raise ValueError(
                f"The features have shape {features.shape} and dtype {features.dtype}, the weight {self.weight.shape}. "
                f"Expected real numbers of shape (samples, {self.weight.shape[0]}). Check the inputs."
            )

        def apply(p: Vector) -> np.ndarray:
            return features @ p["weight"] + (p["bias"] if self.bias is not None else 0)

        def vjp(v: np.ndarray) -> Vector:
            return {"weight": features.T @ v} | ({} if self.bias is None else {"bias": v.sum(axis=0)})

        def moved(u: Vector, step: float) -> np.ndarray:
            return apply({name: p + step * u[name] if name in u else p for name, p in self.parameters.items()})

        def sample_square_norms(v: np.ndarray) -> Vector:
            square = np.sum(v**2, axis=1)
            weight = np.sum(features**2, axis=1) * square
            return {"weight": weight} | ({} if self.bias is None else {"bias": square})

        return Local(apply(self.parameters), vjp, apply, moved, sample_square_norms)


@dataclass(frozen=True)
class RandomFeatureModel(LinearModel):
    """outputs = activation(inputs @ projection) @ weight + bias; only weight and bias are trained."""

    projection: np.ndarray = None  # type: ignore[assignment]
    activation: Callable[[np.ndarray], np.ndarray] = np.tanh

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection is None:
            raise ValueError(
                "RandomFeatureModel received no projection. Expected an array of shape (inputs, features)."
            )

    def features(self, inputs: np.ndarray) -> np.ndarray:
        """activation(inputs @ projection), shape (N, D)."""
        return self.activation(np.asarray(inputs) @ self.projection)


@dataclass(frozen=True)
class OperatorModel:
    """A function that is linear around its parameters, by its Jacobian as an operator: a SciPy `LinearOperator` or a
    matrix.

    Attributes
    ----------
    outputs:
        f at the parameters, shape (N, K).
    jacobian:
        Operator of shape (N * K, P), with `matvec` and `rmatvec`. The batch's inputs are not used.
    """

    outputs: np.ndarray
    jacobian: Any

    def __post_init__(self) -> None:
        if self.jacobian.shape[0] != np.size(self.outputs):
            raise ValueError(
                f"The Jacobian has {self.jacobian.shape[0]} rows, the outputs have {np.size(self.outputs)} entries. "
                "Expected one row for each output of each sample, samples outermost."
            )

    @property
    def parameters(self) -> Vector:
        """The offset from the point of linearisation, all zero."""
        return {"theta": np.zeros(self.jacobian.shape[1], dtype=np.asarray(self.outputs).dtype)}

    def linearize(self, inputs: Any) -> Local:
        """J v and J^T v through the operator."""
        del inputs
        outputs = np.asarray(self.outputs)

        def vjp(v: np.ndarray) -> Vector:
            return {"theta": self.jacobian.T @ v.reshape(-1)}

        def jvp(u: Vector) -> np.ndarray:
            return (self.jacobian @ u["theta"]).reshape(outputs.shape)

        return Local(outputs, vjp, jvp, lambda u, step: outputs + step * jvp(u), None)


def _by_sample(v: np.ndarray, jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) and (N, K, P) views of a cotangent and a Jacobian."""
    samples, outputs = v.shape[0], v[0].size
    return v.reshape(samples, outputs), jacobian.reshape(samples, outputs, -1)
