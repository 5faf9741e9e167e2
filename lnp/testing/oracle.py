"""What the numbers of a scenario must be, from dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lnp.testing.scenarios import Arrays, Scenario


@dataclass(frozen=True)
class Loss:
    """A loss given to `lnp` as a callable.

    Attributes
    ----------
    value:
        (xp, outputs, targets) -> scalar, for frameworks that differentiate.
    gradient:
        (outputs, targets) -> dL/df in NumPy, for those that do not.
    """

    value: Callable[[Any, Any, Any], Any]
    gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Truth:
    """Dense float64 values of a scenario. N samples, K outputs each."""

    scenario: Scenario

    @cached_property
    def _cast(self) -> Scenario:
        return self.scenario.cast("float64")

    @cached_property
    def _raw(self) -> np.ndarray:
        return self.apply(self._cast.parameters)

    def apply(self, parameters: Arrays) -> np.ndarray:
        """The outputs in their own shape at other parameters."""
        return self._cast.apply(np, parameters, self._cast.inputs)

    def loss_at(self, parameters: Arrays) -> float:
        """L at other parameters."""
        return _loss(self._cast.loss, self.apply(parameters), self._cast.targets)[0]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._raw.shape[0], int(np.prod(self._raw.shape[1:]))

    @cached_property
    def outputs(self) -> np.ndarray:
        """f, shape (N, K)."""
        return self._raw.reshape(self.shape)

    @cached_property
    def _evaluated(self) -> tuple[float, np.ndarray, int]:
        return _loss(self._cast.loss, self._raw, self._cast.targets)

    @property
    def loss(self) -> float:
        """L."""
        return self._evaluated[0]

    @property
    def gradient(self) -> np.ndarray:
        """g = dL/df, shape (N, K)."""
        return self._evaluated[1].reshape(self.shape)

    @property
    def terms(self) -> int:
        """n."""
        return self._evaluated[2]

    @cached_property
    def jacobians(self) -> dict[str, np.ndarray]:
        """{parameter: (N K, P_l)}."""
        rows = self.shape[0] * self.shape[1]
        dense = self._cast.jacobian(self._cast.parameters, self._cast.inputs)
        return {name: array.reshape(rows, -1) for name, array in dense.items()}

    def kernel(self, names: Iterable[str] | None = None) -> np.ndarray:
        """Theta of some parameters, shape (N K, N K)."""
        return sum(self.jacobians[name] @ self.jacobians[name].T for name in names or self.jacobians)

    def pulled(self, v: np.ndarray) -> dict[str, np.ndarray]:
        """{parameter: J_l^T v} in the parameters' shapes."""
        parameters = self._cast.parameters
        return {name: (v.reshape(-1) @ j).reshape(parameters[name].shape) for name, j in self.jacobians.items()}

    def moved(self, step: Arrays) -> dict[str, np.ndarray]:
        """theta + step."""
        return {name: p + step[name] for name, p in self._cast.parameters.items()}

    def block_square_norms(self, v: np.ndarray, starts: list[int], names: Iterable[str] | None = None) -> np.ndarray:
        """||J_b^T v_b||^2 of the blocks of samples that begin at `starts`. Shape (blocks,)."""
        parts = [np.zeros(self.shape) for _ in starts]
        for part, start, stop in zip(parts, starts, [*starts[1:], self.shape[0]], strict=True):
            part[start:stop] = v[start:stop]
        kernel = self.kernel(names)
        return np.array([part.reshape(-1) @ kernel @ part.reshape(-1) for part in parts])

    def variance(self, starts: list[int], names: Iterable[str] | None = None) -> float:
        """Of one probe: 2 sum_b offdiag ||Theta_bb||_F^2 over blocks of samples."""
        outputs, kernel, total = self.shape[1], self.kernel(names), 0.0
        for start, stop in zip(starts, [*starts[1:], self.shape[0]], strict=True):
            block = kernel[start * outputs : stop * outputs, start * outputs : stop * outputs]
            total += 2 * float(np.sum(block**2) - np.sum(np.diag(block) ** 2))
        return total

    def factors(self, names: Iterable[str] | None = None, terms: float | None = None) -> dict[str, float]:
        """rate, chi_loss, chi_net, chi_pos from the dense kernel of some parameters."""
        kernel, g = self.kernel(names), self.gradient.reshape(-1)
        n = self.terms if terms is None else terms
        rate, trace, g2 = float(g @ kernel @ g), float(np.trace(kernel)), float(g @ g)
        return {"rate": rate, "chi_loss": n * g2, "chi_net": trace / n, "chi_pos": rate / (g2 * trace)}


ELEMENTWISE = {
    "mse": lambda f, y: ((f - y) ** 2, 2 * (f - y)),
    "huber": lambda f, y: (np.where(abs(f - y) < 1, (f - y) ** 2 / 2, abs(f - y) - 0.5), np.clip(f - y, -1, 1)),
    "binary_cross_entropy": lambda f, y: (np.log(1 + np.exp(f)) - y * f, 1 / (1 + np.exp(-f)) - y),
}
"""(outputs, targets) -> (terms, their derivatives)."""


def _loss(name: str, outputs: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, int]:
    """(L, dL/df, n)."""
    if name in ELEMENTWISE:
        value, slope = ELEMENTWISE[name](outputs, targets)
        return float(np.mean(value)), slope / outputs.size, outputs.size
    weights = targets
    if np.issubdtype(targets.dtype, np.integer):
        weights = (targets[..., None] == np.arange(outputs.shape[-1])).astype(float)
    terms = int(np.sum(targets != -100)) if weights is not targets else weights[..., 0].size
    p = np.exp(outputs) / np.sum(np.exp(outputs), axis=-1, keepdims=True)
    mass = weights.sum(axis=-1, keepdims=True)
    return float(-np.sum(weights * np.log(p)) / terms), (p * mass - weights) / terms, terms
