r"""How far an average of probes is from the trace: squared standard errors, and their effective degrees of freedom.

A squared standard error is a sum of squares e_i, each of f degrees of freedom. Its own are effectively (Satterthwaite,
Biometrics Bulletin 2 (1946), doi:10.2307/3002019), with the bias of the squares' squares taken out,

    nu = (f + 2) (sum_i e_i)^2 / sum_i e_i^2 - 2

which is f times their number where all are alike, and f where one outweighs the others. Derivations: docs/theory.md,
"Balanced signs".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lnp.contract.linearization import Array, Namespace

LARGE = 1e6
"""Degrees of freedom where there is no noise."""


@dataclass(frozen=True)
class Error:
    """The error of a sum over samples.

    Attributes
    ----------
    variance:
        (R,) squared standard errors, one for each row of parameters.
    freedom:
        Their degrees of freedom, those of the first row. Shape ().
    """

    variance: Array
    freedom: Array


def across_groups(xp: Namespace, values: Array) -> Error:
    """Of one probe of G groups, x (R, G), by their spread: SE^2 = G/(G - 1) sum_g (x_g - mean)^2; nan for a single one.

    An upper bound: the groups' traces differ, too.
    """
    groups = values.shape[1]
    if groups == 1:
        return Error(values[:, 0] * float("nan"), xp.zeros_like(values[0, 0]))
    spread = values - xp.mean(values, axis=1, keepdims=True)
    found = Error(groups / (groups - 1) * xp.sum(spread * spread, axis=1), freedom(xp, spread * spread, 1))
    return no_freer_than(xp, found, values, (groups - 1) / groups)


def within_groups(xp: Namespace, squares: Array, probes: Any) -> Error:
    """Of k >= 2 probes, by the sums S_g (R, G) of squared deviations from each group's mean.

    SE^2 = sum_g S_g / (k (k - 1))
    """
    pairs = probes * (probes - 1)
    pairs = max(pairs, 1) if isinstance(pairs, int) else _or_one(xp, pairs)
    return Error(xp.sum(squares, axis=1) / pairs, freedom(xp, squares, probes - 1))


def of_differences(xp: Namespace, values: Array, some: Array, others: Array) -> Error:
    """Of one probe of all N samples, x (R, N), by the differences of M of them, `some`, from another one, `others`.

    SE^2 = sum_m (x_m - x'_m)^2 / 2 * sum_n x_n^2 / sum_m x_m^2
    """
    terms = 0.5 * (some - others) ** 2
    found = Error(xp.sum(terms, axis=1) * scaled_up(xp, values, some), freedom(xp, terms, 1))
    return no_freer_than(xp, found, values, 1)


def of_swaps(
    xp: Namespace, squares: Array, own: Array, *, pairs: Any, samples: int, block: int, probes: Any, shared: Any
) -> Error:
    """Of k probes of N samples that are balanced over blocks and swap vectors in pairs (n, n').

    Let d_n = x_n - x'_n be the difference of a sample's squared norms by its own vector and by its partner's.

        v_R = (m - 1)/m * sum over pairs of (d_n + d_n')^2 / 4, per pair      a sample's noise beyond the common one
        v_I = (m - 1)/m * sum over samples of d_n^2 / 2, per sample           a sample's noise
        SE^2 = N v_R / k * (1 if k = 1, else (m - 2)/(m - 1)) + c max(v_I - v_R, 0)

    The factors are those of different rows of H, whose products over k have the mean -1/(m - 1).

    Parameters
    ----------
    squares, own:
        (R, M) sums over probes of (d_n + d_n')^2, at both samples of a pair, and of d_n^2.
    pairs:
        How many swaps went in.
    probes:
        k, 1 or an even number.
    shared:
        c, the part of the common noise that does not cancel, for the last block is not whole.
    """
    distinct = (block - 1) / block
    residual = distinct * xp.sum(squares, axis=1) / (8 * pairs)
    whole = distinct * xp.sum(own, axis=1) / (4 * pairs)
    excess = xp.maximum(whole - residual, xp.zeros_like(whole))
    swapped = 1.0 if isinstance(probes, int) and probes == 1 else (block - 2) / (block - 1)
    rounds = pairs * 2 / squares.shape[1]
    found = freedom(xp, squares, rounds, counted=2), freedom(xp, own, rounds)
    return Error(samples / probes * swapped * residual + shared * excess, _smaller(xp, *found))


def common_noise(block: int, used: Any) -> Any:
    """c = r (m - r) / (m - 1): how much of the common noise is left in a block of m of which r are used.

    >>> common_noise(16, 0), common_noise(16, 1), common_noise(16, 8)
    (0.0, 1.0, 4.266666666666667)
    """
    return used * (block - used) / (block - 1)


def scaled_up(xp: Namespace, values: Array, some: Array) -> Array:
    """sum_n x_n^2 / sum_m x_m^2 of all samples (R, N) and some of them (R, M), (R,); 0 where all are zero.

    The noise of a sample grows with its trace: one that is much larger than those with two probes is not forgotten.
    """
    largest = _or_one(xp, xp.max(values))
    every, few = (xp.sum((x / largest) ** 2, axis=1) for x in (values, some))
    return every / _or_one(xp, few)


def no_freer_than(xp: Namespace, error: Error, values: Array, f: Any) -> Error:
    """The error, with no more degrees of freedom than noise in proportion to the values x (R, G) would have: where one
    sample is much larger than all others, its noise is what counts, even if it happens to be small so far.
    """
    sizes = values[0, :] / _or_one(xp, xp.max(values[0, :]))
    squares = sizes * sizes
    fourths = xp.sum(squares * squares)
    limit = f * xp.sum(squares) ** 2 / _or_one(xp, fourths)
    limit = xp.where(fourths > 0, limit, xp.full_like(limit, LARGE))
    return replace(error, freedom=_smaller(xp, error.freedom, limit))


def freedom(xp: Namespace, terms: Array, f: Any, counted: int = 1) -> Array:
    """nu of the first row's sum of squares (R, G), of f degrees of freedom each, each `counted` times. Shape ()."""
    terms = terms[0, :]
    terms = terms / _or_one(xp, xp.max(terms))
    squares, total = xp.sum(terms * terms), xp.sum(terms)
    found = (f + 2) * total * total / (counted * _or_one(xp, squares)) - 2
    return xp.where(squares > 0, found, xp.full_like(found, LARGE))


def _or_one(xp: Namespace, size: Array) -> Array:
    """What is divided by: 1 in the place of 0."""
    return xp.where(size > 0, size, xp.ones_like(size))


def _smaller(xp: Namespace, a: Array, b: Array) -> Array:
    return -xp.maximum(-a, -b)
