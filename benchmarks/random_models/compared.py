"""What a comparison of one model says, in every framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TOLERANCE = 5e-3
"""Relative, of squares: sums of float32 in another order."""
SMALL = 1e-5
"""Of the largest squared norm: below, there is little but rounding, as in the bias of keys, whose gradient is zero."""
TINY = 1e-30


class NotBuilt(Exception):
    """The drawn settings make no model that runs and learns."""


def verdict(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], notes: Sequence[str]) -> tuple[str, str]:
    """(right, noted or wrong; what lnp says), from {what: (lnp's numbers, the reference's)}."""
    arrays = {what: tuple(np.asarray(numbers, float) for numbers in pair) for what, pair in pairs.items()}
    if not all(np.all(np.isfinite(expected)) for _, expected in arrays.values()):
        raise NotBuilt("the reference is not finite")
    norms = [np.max(np.abs(expected), initial=0.0) for what, (_, expected) in arrays.items() if what != "rate"]
    floor = SMALL * max(norms, default=0.0) or TINY
    wrong = []
    for what, (found, expected) in arrays.items():
        scale = max(np.max(np.abs(expected), initial=0.0), TINY if what == "rate" else floor)
        away = np.max(np.abs(found - expected), initial=0.0) / scale
        if not away <= TOLERANCE:
            wrong.append(f"{what} is off by {away:.2g}")
    said = "; ".join(note for note in notes if not note.startswith("no population values"))
    if wrong:
        explained = wrong[0].startswith("rate ") and len(wrong) == 1 and any(words in said for words in EXPLAINS)
        return (
            "noted" if explained else "wrong"
        ), f"{len(wrong)} of {len(pairs)}: {', '.join(wrong[:3])} [{said[:300]}]"
    return ("noted" if "not taken apart" in said else "right"), said[:300]


EXPLAINS = ("do not come from the outputs", "keeps this batch's statistics")
"""In notes that the rate is of another function than the plain step's: without terms of the loss that lie elsewhere, or
with the batch's statistics held fixed.
"""
