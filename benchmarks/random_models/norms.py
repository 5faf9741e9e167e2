"""The computation that hands out what single samples say of one cotangent."""

from __future__ import annotations

from typing import Any

import lnp


class Norms:
    """A record's cotangent, and its squared norms of single samples if it has them."""

    def __call__(self, lin: lnp.Linearization) -> dict[str, Any]:
        v = lin.signs(0)
        norms = {} if lin.sample_square_norms is None else dict(lin.sample_square_norms(v))
        return {"v": v, "norms": norms}
