r"""Power laws in the size of a model or in compute, with their uncertainty.

    value = offset + prefactor * size^exponent

Without an offset it is a straight line in logarithms, fitted by weighted least squares. Loss and spectral reach follow
such laws over the sizes that a budget allows; a loss has an offset, what no model predicts (Kaplan et al., arXiv
2001.08361; Hoffmann et al., arXiv 2203.15556; Nikolaou et al., arXiv 2605.31244).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lnp.optional import import_optional
from lnp.results.rounding import with_error
from lnp.runs.spectral_reach import RESOLVED, Reach

STARTS = (0.0, 0.5, 0.9, 0.99)
"""Offsets at which the search begins, as shares of the lowest value: from a single one some fits end where another fits
better.
"""


@dataclass(frozen=True)
class PowerLaw:
    """value = offset + prefactor * size^exponent.

    Attributes
    ----------
    exponent, prefactor, offset:
        The fit; the offset is zero unless it was asked for.
    exponent_stderr, prefactor_stderr, offset_stderr:
        Standard errors; nan for as many points without errors as parameters, which the law always meets.
    covariance:
        Covariance of (log prefactor, exponent), shape (2, 2), with an offset of (log prefactor, exponent, offset).
    chi_square:
        Sum of squared residuals in units of the values' errors, nan without errors: about `degrees` for a good fit.
    degrees:
        Values less parameters; upper limits do not count.
    r_squared:
        Share of the (weighted) variance of the values' logarithms that the law explains. A high one is no good fit:
        chi^2 per degree says whether the points lie on the law.
    """

    exponent: float
    prefactor: float
    exponent_stderr: float
    prefactor_stderr: float
    covariance: np.ndarray
    chi_square: float
    degrees: int
    r_squared: float = math.nan
    offset: float = 0.0
    offset_stderr: float = 0.0

    @property
    def chi_square_per_degree(self) -> float:
        """About 1 where the errors account for the points' distance from the law; nan without errors or degrees."""
        return self.chi_square / self.degrees if self.degrees else math.nan

    def predict(self, size: float) -> tuple[float, float]:
        """(value, standard error) of the fitted law at a size.

        Raises
        ------
        ValueError
            For a size that is not positive.
        """
        if not size > 0:
            raise ValueError(f"size is {size!r}. Expected a positive number, such as of parameters.")
        part = self.prefactor * size**self.exponent
        row = np.array([part, part * math.log(size), 1.0][: len(self.covariance)])
        return self.offset + part, math.sqrt(row @ self.covariance @ row)

    def __str__(self) -> str:
        exponent = with_error(self.exponent, self.exponent_stderr)
        law = f"({with_error(self.prefactor, self.prefactor_stderr)}) * size^({exponent})"
        return f"({with_error(self.offset, self.offset_stderr)}) + {law}" if len(self.covariance) == 3 else law


def power_law(
    sizes: Sequence[float],
    values: Sequence[float | Reach],
    stderrs: Sequence[float] | None = None,
    *,
    offset: bool = False,
    limits: Sequence[bool] | None = None,
) -> PowerLaw:
    r"""Fit value = c + a size^b by weighted least squares of log value, each with error SE / value.

    The errors come from those of the values, and grow by sqrt(chi^2 / degrees) where the points scatter more than their
    errors say. Without errors all logarithms weigh the same, and the scatter alone gives the errors.

    An upper limit X at two standard errors enters as a censored value: by the probability Phi((X - law) / SE - 2) that
    a measurement would have come out no higher than it did.

    Parameters
    ----------
    sizes:
        Parameters, or compute (6 N D); positive, as many different ones as the law has parameters.
    values:
        Positive numbers, or `lnp.Reach` objects, which have their errors and are limits where they are not resolved.
    stderrs:
        Standard errors of the values, positive. Limits need them.
    offset:
        Whether there is a c >= 0, such as the loss that no size gets below. Needs SciPy, as do limits.
    limits:
        Which of the values are upper limits.

    Raises
    ------
    ValueError
        For lists of different lengths, values that have no logarithm, and fewer values than parameters of the law.
    ImportError
        If SciPy is needed and not installed.

    Examples
    --------
    >>> law = power_law([1e3, 1e4, 1e5], [0.1, 0.01, 0.001])
    >>> round(law.exponent, 9), round(law.prefactor, 6), round(law.r_squared, 9)
    (-1.0, 100.0, 1.0)
    """
    points = _points(sizes, values, stderrs, limits)
    needed = 3 if offset else 2
    if np.unique(points.size[~points.limit]).size < needed:
        raise ValueError(
            f"Received values at the sizes {points.size[~points.limit].tolist()}. Expected at least {needed} different "
            f"ones{', besides upper limits' if points.limit.any() else ''}."
        )
    fitted = _bent(points, offset) if offset or points.limit.any() else _line(points, 0.0)
    return _law(points, *fitted)


@dataclass(frozen=True)
class _Points:
    """Sizes, values, standard errors, and which values are limits: (points,) each. `known`: whether errors are."""

    size: np.ndarray
    value: np.ndarray
    stderr: np.ndarray
    limit: np.ndarray
    known: bool

    @property
    def weight(self) -> np.ndarray:
        """1 / the error of log value, or 1."""
        return self.value / self.stderr if self.known else np.ones_like(self.value)


def _points(sizes: Sequence, values: Sequence, stderrs: Sequence | None, limits: Sequence | None) -> _Points:
    """What was given, checked."""
    if reaches := [value for value in values if isinstance(value, Reach)]:
        if len(reaches) < len(values) or stderrs is not None or limits is not None:
            raise ValueError(
                "Received lnp.Reach objects beside numbers, stderrs= or limits=. Expected them alone: they have their "
                "errors, and are limits where they are not resolved. Give numbers for all values instead."
            )
        limits = [not found.resolved for found in reaches]
        stderrs = [found.stderr for found in reaches]
        values = [found.chi_pos if found.resolved else found.limit for found in reaches]
        stderrs = None if np.all(np.isnan(stderrs) | (np.array(stderrs) == 0)) else stderrs
    x, y = np.asarray(sizes, dtype=float), np.asarray(values, dtype=float)
    e = np.ones_like(y) if stderrs is None else np.asarray(stderrs, dtype=float)
    limit = np.zeros(y.shape, bool) if limits is None else np.asarray(limits, dtype=bool)
    if not (x.ndim == 1 and x.shape == y.shape == e.shape == limit.shape):
        raise ValueError(f"Received shapes {x.shape}, {y.shape}, {e.shape}. Expected one value for each size.")
    if not all(np.all(np.isfinite(part) & (part > 0)) for part in (x, y, e)):
        raise ValueError(
            f"Received sizes, values or errors that are not positive and finite: {x.tolist()}, {y.tolist()}"
            f"{'' if stderrs is None else f', {e.tolist()}'}. A power law has positive values: give points that are "
            "zero within their error as upper limits, by limits= or as Reach objects."
        )
    if limit.any() and stderrs is None:
        raise ValueError("Received upper limits without errors. Expected stderrs=, of which a limit is two.")
    return _Points(x, y, e, limit, stderrs is not None)


def _line(points: _Points, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """(log prefactor, exponent) of the values less an offset, and the inverse of what they weigh, both exact."""
    kept = ~points.limit
    above = points.value[kept] - offset
    weight = points.weight[kept] * (above / points.value[kept] if points.known else 1.0)
    fitted, covariance = np.polyfit(np.log(points.size[kept]), np.log(above), 1, w=weight, cov="unscaled")
    return fitted[::-1], covariance[::-1, ::-1]  # of which the slope is the first


def _bent(points: _Points, offset: bool) -> tuple[np.ndarray, np.ndarray]:
    """The fit with an offset, with limits, or with both, by SciPy: the best of those that some offsets lead to."""
    optimize = import_optional("scipy.optimize", "A power law with an offset or limits", install="'lnp[spectrum]'")
    special = import_optional("scipy.special", "A power law with an offset or limits", install="'lnp[spectrum]'")
    lowest = float(points.value[~points.limit].min())
    logs = np.log(points.size)
    middle, half = (logs.max() + logs.min()) / 2, (logs.max() - logs.min()) / 2
    # the search is for the law in the middle of the sizes, its rise over half of them and the share of the lowest value
    # that is offset: numbers of order one, which hardly depend on each other
    back = np.array([[1.0, -middle / half, 0.0], [0.0, 1 / half, 0.0], [0.0, 0.0, lowest]])
    back = back if offset else back[:2, :2]

    def residuals(sought: np.ndarray) -> np.ndarray:
        law = _value(points.size, back @ sought)
        z = (points.value - law) / points.stderr - RESOLVED
        return np.where(
            points.limit, np.sqrt(-2 * special.log_ndtr(z)), (np.log(points.value) - np.log(law)) * points.weight
        )

    found = []
    for share in STARTS if offset else STARTS[:1]:
        start = np.append(_line(points, share * lowest)[0], share * lowest)[: len(back)]
        bounds = [-np.inf, -np.inf, 0.0][: len(back)], np.inf
        sought = np.linalg.solve(back, start)
        found.append(optimize.least_squares(residuals, sought, bounds=bounds, xtol=1e-12, ftol=1e-12, gtol=1e-12))
    best = min(found, key=lambda fit: float(fit.cost))
    # no small singular value is cut off: what the points hardly tell has a large error
    error = back @ np.linalg.pinv(best.jac, rcond=0.0)
    return back @ best.x, error @ error.T


def _value(size: np.ndarray, solution: np.ndarray) -> np.ndarray:
    """The law at some sizes."""
    return np.exp(solution[0] + solution[1] * np.log(size)) + (solution[2] if solution.size == 3 else 0.0)


def _law(points: _Points, solution: np.ndarray, covariance: np.ndarray) -> PowerLaw:
    """What was fitted, with errors that grow where the values scatter more than theirs say."""
    kept, weight = ~points.limit, points.weight[~points.limit]
    logs = np.log(points.value[kept])
    square = float(np.sum((weight * (logs - np.log(_value(points.size[kept], solution)))) ** 2))
    total = float(np.sum((weight * (logs - np.average(logs, weights=weight**2))) ** 2))
    degrees = int(np.count_nonzero(kept)) - solution.size
    spread = square / degrees if degrees else math.nan
    covariance = covariance * ((max(1.0, spread) if degrees else 1.0) if points.known else spread)
    errors, prefactor = np.sqrt(np.diag(covariance)), math.exp(solution[0])
    return PowerLaw(
        exponent=float(solution[1]),
        prefactor=prefactor,
        exponent_stderr=float(errors[1]),
        prefactor_stderr=prefactor * float(errors[0]),
        covariance=covariance,
        chi_square=square if points.known else math.nan,
        degrees=degrees,
        r_squared=1 - square / total if total > 0 else math.nan,
        offset=float(solution[2]) if solution.size == 3 else 0.0,
        offset_stderr=float(errors[2]) if solution.size == 3 else 0.0,
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
        For fewer sizes than a fit needs or sizes that are not positive, values that do not fit them, and a level
        outside (0, 1).

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
