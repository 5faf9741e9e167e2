r"""What one checkpoint has to say of several batches: means over them, with standard errors over them.

Every column of the row is the mean of the batches' values, with the error s / sqrt(B) of B values that spread by s. So
`chi_pos` is the mean of the positions, and the factors' means do not multiply to the mean of the rate. The noise scale
is a ratio of means. For the net rate the batches count as one: of B losses L_b with parts d_bn and shares s_bn,

    L = (1/B) sum_b L_b = sum_bn d_bn / B,    shares s_bn / B

which is a mean over the samples of all batches, as `lnp.tracking.net_rate` takes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lnp.results.decomposition import Decomposition
from lnp.runs.curves import GRADIENT_NOISE, NOISE_SCALE
from lnp.tracking.learning_rate import Mark
from lnp.tracking.measurement import python_numbers
from lnp.tracking.net_rate import Ends, end_of

ERROR = "_stderr"
INTERVAL = ("population/noise_scale_low", "population/noise_scale_high")
"""Of a single batch; figures make that of several from rate and gradient noise."""


def row_of(decompositions: Sequence[Decomposition]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(Values, notes) of the row of a checkpoint."""
    rows = [python_numbers(d.to_dict()) for d in decompositions]
    notes = tuple(dict.fromkeys(note for d in decompositions for note in d.notes))
    if len(rows) == 1:
        return rows[0], notes
    names = [name for name in rows[0] if all(name in row for row in rows)]
    columns = {name: [row[name] for row in rows] for name in names if name not in INTERVAL}
    values: dict[str, Any] = {}
    for name, column in columns.items():
        if isinstance(column[0], str):
            values[name] = " / ".join(dict.fromkeys(column))
        elif not name.endswith(ERROR):
            values |= _mean(name, column)
    if NOISE_SCALE in values:
        del values[NOISE_SCALE + ERROR]
        rate, noise = values["population/rate"], values[GRADIENT_NOISE]
        values[NOISE_SCALE] = noise / rate if rate > 0 else math.inf
    counts = [d.samples for d in decompositions]
    sizes = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
    return values, (*notes, f"means over {len(rows)} batches of {sizes} samples, and errors over these batches")


def ends_of(step: int, decompositions: Sequence[Decomposition], values: Mapping[str, Any]) -> Ends:
    """What a net rate needs of a checkpoint, of all its batches as one; `values` are those of its row."""
    ends = [end_of(Mark(step, step, 0.0), d) for d in decompositions]
    if len(ends) == 1:
        return ends[0]
    count = len(ends)
    known = all(end.parts is not None for end in ends)  # and so are their shares
    rate = "population/rate" if "population/rate" in values else "rate"
    return replace(
        ends[0],
        loss=values["loss"],
        rate=values[rate],
        rate_stderr=values[rate + ERROR],
        scales=max(values["chi_loss"] * values["chi_net"], 0.0),
        relative=values["chi_net_stderr"] / values["chi_net"] if values["chi_net"] else 0.0,
        parts=[part / count for end in ends for part in end.parts or ()] if known else None,
        shares=[share / count for end in ends for share in end.shares or ()] if known else None,
    )


def _mean(name: str, column: Sequence[float]) -> dict[str, float]:
    """The mean of a column, and its standard error where it is a quantity and no count."""
    mean = float(np.mean(column))
    if name.rpartition("/")[2] in ("loss_terms", "probes", "degrees_of_freedom", "samples", "outputs"):
        return {name: int(mean) if mean.is_integer() else mean}
    spread = float(np.std(column, ddof=1)) if all(map(math.isfinite, column)) else math.nan
    return {name: mean, name + ERROR: spread / math.sqrt(len(column))}
