r"""The density of all eigenvalues, from random starts: stochastic Lanczos quadrature.

For v of independent random signs, E v^T f(Theta) v = tr f(Theta), and Lanczos from v gives v^T f(Theta) v for smooth f:

    tr f(Theta) / (N K)  ~  1/p sum_{probes} sum_j tau_j f(theta_j)

The spread over the p probes is the error bar. What a probe misses is structure finer than m nodes can show.

Source: Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017), doi:10.1137/16M1104974; Lin, Saad, Yang, SIAM Review 58
(2016), doi:10.1137/130934283.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lnp.spectral.lanczos import Quadrature


@dataclass(frozen=True)
class Density:
    """Density of the kernel's eigenvalues, N K in number, zeros included.

    Attributes
    ----------
    nodes, weights:
        Quadrature of each probe, shape (p, m), the weights of sum 1 for each. A probe that was done early is filled up
        with nodes 0 of weight 0.
    dimension:
        N K.

    Examples
    --------
    >>> density = Density(np.array([[2.0, 0.0]]), np.array([[0.25, 0.75]]), 8)
    >>> density.number_above(1.0)[0], density.moment(1)[0]
    (2.0, 0.5)
    """

    nodes: np.ndarray
    weights: np.ndarray
    dimension: int

    @property
    def probes(self) -> int:
        """p."""
        return int(self.nodes.shape[0])

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """tr f(Theta) / (N K) and its standard error over probes, nan for one probe; f maps arrays to arrays."""
        values, errors = self._mean_over_probes(np.sum(self.weights * function(self.nodes), axis=1))
        return float(values), float(errors)

    def moment(self, order: int) -> tuple[float, float]:
        """tr Theta^order / (N K) and its standard error; unbiased up to order 2 m - 1."""
        return self.mean(lambda nodes: nodes**order)

    def number_above(self, eigenvalue: float) -> tuple[float, float]:
        """How many eigenvalues lie at or above a value, and the standard error over probes.

        A step is no smooth function: the number is good to the distance of the nodes around the value.
        """
        value, error = self.mean(lambda nodes: nodes >= eigenvalue)
        return self.dimension * value, self.dimension * error

    def per_decade(self, eigenvalues: np.ndarray, width: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
        """Share of the eigenvalues per decade at each of `eigenvalues` > 0, and its standard error.

        Each node becomes a Gaussian of standard deviation `width` in log10; nodes at zero or below, which a kernel of
        less than full rank has, are left out.

        Raises
        ------
        ValueError
            For a width or eigenvalues that are not positive.
        """
        points = np.asarray(eigenvalues, dtype=float)
        if not (width > 0 and np.all(points > 0)):
            raise ValueError(
                f"Received width {width} and eigenvalues down to {points.min(initial=math.inf)}. Expected both > 0, "
                "for a logarithmic axis. Use number_above for counts."
            )
        positive = self.nodes > 0
        logs = np.log10(np.where(positive, self.nodes, 1.0))
        distance = (np.log10(points)[:, None, None] - logs) / width
        bumps = np.exp(-0.5 * distance**2) / (width * math.sqrt(2 * math.pi))
        return self._mean_over_probes(np.sum(np.where(positive, self.weights, 0.0) * bumps, axis=2))

    def _mean_over_probes(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error over the last axis, the probes."""
        mean = np.mean(values, axis=-1)
        if self.probes == 1:
            return mean, mean * math.nan
        return mean, np.std(values, axis=-1, ddof=1) / math.sqrt(self.probes)


def density(quadratures: Sequence[Quadrature], dimension: int) -> Density | None:
    """The density from one quadrature for each probe, all with as many nodes; None for no probe."""
    if not quadratures:
        return None
    return Density(np.stack([q.nodes for q in quadratures]), np.stack([q.weights for q in quadratures]), dimension)
