r"""Power laws in the size of a model, with their uncertainty.

    value = prefactor * size^exponent

is a straight line in logarithms, fitted by weighted least squares. Loss and spectral reach follow such laws over the
sizes that a budget allows (Kaplan et al., arXiv 2001.08361; Nikolaou et al., arXiv 2605.31244).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """value = prefactor * size^exponent.

    Attributes
    ----------
    exponent, prefactor:
        The fit.
    exponent_stderr, prefactor_stderr:
        Standard errors; nan for two points without errors, which a line always meets.
    covariance:
        Covariance of (log prefactor, exponent), shape (2, 2).
    chi_square:
        Sum of squared residuals in units of the values' errors, nan without errors: about `degrees` for a good fit.
    degrees:
        Points less two.
    """

    exponent: float
    prefactor: float
    exponent_stderr: float
    prefactor_stderr: float
    covariance: np.ndarray
    chi_square: float
    degrees: int

    def predict(self, size: float) -> tuple[float, float]:
        """(value, standard error) of the fitted line at a size.

        Raises
        ------
        ValueError
            For a size that is not positive.
        """
        if not size > 0:
            raise ValueError(f"size is {size!r}. Expected a positive number, such as of parameters.")
        row = np.array([1.0, math.log(size)])
        value = self.prefactor * size**self.exponent
        return value, value * math.sqrt(row @ self.covariance @ row)

    def __str__(self) -> str:
        exponent = f"{self.exponent:.3g} ± {self.exponent_stderr:.1g}"
        return f"{self.prefactor:.3g} ± {self.prefactor_stderr:.1g} * size^({exponent})"


def power_law(sizes: Sequence[float], values: Sequence[float], stderrs: Sequence[float] | None = None) -> PowerLaw:
    r"""Fit value = a size^b by weighted least squares of log value on log size, each with error SE / value.

    The errors of a and b come from those of the values, and grow by sqrt(chi^2 / degrees) where the points scatter more
    than their errors say. Without errors all logarithms weigh the same, and the scatter alone gives the errors.

    Parameters
    ----------
    sizes, values:
        Positive; at least two different sizes.
    stderrs:
        Standard errors of the values, positive.

    Raises
    ------
    ValueError
        For lists of different lengths, values that have no logarithm, and fewer than two sizes.

    Examples
    --------
    >>> law = power_law([1e3, 1e4, 1e5], [0.1, 0.01, 0.001])
    >>> round(law.exponent, 9), round(law.prefactor, 6)
    (-1.0, 100.0)
    """
    x = np.asarray(sizes, dtype=float)
    y = np.asarray(values, dtype=float)
    e = np.ones_like(y) if stderrs is None else np.asarray(stderrs, dtype=float)
    if not (x.ndim == 1 and x.shape == y.shape == e.shape):
        raise ValueError(f"Received shapes {x.shape}, {y.shape}, {e.shape}. Expected one value for each size.")
    if not all(np.all(np.isfinite(part) & (part > 0)) for part in (x, y, e)):
        raise ValueError(
            f"Received sizes, values or errors that are not positive and finite: {x.tolist()}, {y.tolist()}"
            f"{'' if stderrs is None else f', {e.tolist()}'}. A power law has positive values: leave out points "
            "that are zero within their error."
        )
    if np.unique(x).size < 2:
        raise ValueError(f"Received the sizes {x.tolist()}. Expected at least two different ones.")
    weights = np.ones_like(y) if stderrs is None else y / e
    rows = weights[:, None] * np.stack([np.ones_like(x), np.log(x)], axis=1)
    covariance = np.linalg.inv(rows.T @ rows)
    solution = covariance @ rows.T @ (weights * np.log(y))
    square = float(np.sum((weights * np.log(y) - rows @ solution) ** 2))
    degrees = y.size - 2
    spread = square / degrees if degrees else math.nan
    covariance = covariance * (spread if stderrs is None else max(1.0, spread) if degrees else 1.0)
    prefactor = math.exp(solution[0])
    errors = np.sqrt(np.diag(covariance))
    return PowerLaw(
        exponent=float(solution[1]),
        prefactor=prefactor,
        exponent_stderr=float(errors[1]),
        prefactor_stderr=prefactor * float(errors[0]),
        covariance=covariance,
        chi_square=math.nan if stderrs is None else square,
        degrees=degrees,
    )


def bootstrap(
    sizes: Sequence[float], values: Sequence[Sequence[float]], *, draws: int = 1000, level: float = 0.68, seed: int = 0
) -> tuple[float, float]:
    """An interval for the exponent of `power_law`: (lowest, highest) of the central `level` of refits.

    Each refit is to the mean of runs that are drawn anew with replacement.
    Every size keeps as many runs as it has. It asks nothing of how the runs scatter, but needs several for each size.

    Parameters
    ----------
    values:
        For each size the values of its runs.
    draws:
        Refits.
    level:
        Share of the refits inside, in (0, 1).
    seed:
        Seed of the draws.

    Raises
    ------
    ValueError
        As `power_law`, for runs of other sizes, and for a level outside (0, 1).

    References
    ----------
    Efron, Ann. Statist. 7 (1979), doi:10.1214/aos/1176344552.

    Examples
    --------
    >>> low, high = bootstrap([1.0, 10.0], [[1.0, 1.1], [0.1, 0.11]])
    >>> bool(-1.05 < low < -1 < high < -0.95)
    True
    """
    if len(sizes) != len(values):
        raise ValueError(f"Received {len(sizes)} sizes and runs of {len(values)}. Expected runs for each size.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}. Expected a share of the refits in (0, 1), such as 0.68.")
    generator = np.random.default_rng(seed)
    exponents = [
        power_law(sizes, [float(np.mean(generator.choice(list(runs), size=len(runs)))) for runs in values]).exponent
        for _ in range(draws)
    ]
    low, high = np.quantile(exponents, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)
