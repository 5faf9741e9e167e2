r"""What each sample adds to a batch's loss: for the standard error of a change of the loss, which comes from samples.

A mean over samples of weights w_n, with W = sum_n w_n, is a sum of parts,

    L = sum_n p_n,   p_n = s_n l_n,   s_n = w_n / W

with l_n the loss of sample n by itself. A sum over samples has p_n = l_n. Which of the two a loss is, or neither, is
seen from whether the parts add up to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lnp.contract.linearization import Array, Linearization, ratio, valid
from lnp.losses.mean_test import TOLERANCE


class SampleLosses(NamedTuple):
    """The parts p_n of a loss, shape (N,), which add up to it, and the samples' shares s_n, shape (N,), of sum 1.

    nan where the loss is no sum over samples.
    """

    parts: Any
    shares: Any


def sample_losses_of(lin: Linearization) -> SampleLosses | None:
    """The parts of a record's loss. Pure, safe to trace and compile; None where the backend cannot tell."""
    if lin.sample_losses is None:
        return None
    xp, alone = lin.xp, lin.sample_losses()
    even = xp.full_like(alone, 1 / alone.shape[0])
    shares = even
    if lin.sample_terms is not None:
        weights = xp.astype(lin.sample_terms, alone.dtype)
        shares = ratio(xp, weights, xp.sum(weights))
    # a sample whose labels are all ignored has the loss 0/0, and no share
    parts = xp.where(shares == 0, xp.zeros_like(alone), shares * alone)
    mean, total = _adds_up(lin, parts), _adds_up(lin, alone)
    nan = xp.full_like(alone, float("nan"))
    found = xp.where(mean, parts, xp.where(total, alone, nan))
    return SampleLosses(valid(lin, found), xp.where(mean, shares, even))


def _adds_up(lin: Linearization, parts: Array) -> Array:
    """Whether parts add up to the loss. Shape ()."""
    xp = lin.xp
    difference = xp.sum(parts) - xp.astype(lin.loss, parts.dtype)
    return xp.abs(difference) <= TOLERANCE * xp.sum(xp.abs(parts))
