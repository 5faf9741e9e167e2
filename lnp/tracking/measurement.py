"""One measurement of a tracker: its options, its batches, and the row that comes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lnp.results import step_taken
from lnp.results.decomposition import Decomposition
from lnp.tracking import batch_source
from lnp.tracking.rows import measured, moved
from lnp.tracking.turns import Turns, alone, refuse

OF_THE_FUNCTION = ("loss", "forward", "loss_terms", "batch_statistics")
"""Options of `lnp.decompose` that `lnp.step_taken` has as well."""


class Measuring:
    """Measures steps with a tracker's options.

    Attributes
    ----------
    options:
        Of `lnp.decompose`.
    source:
        Of the tracker's own batches, or None.
    """

    def __init__(self, options: Mapping[str, Any], batch: Any, turns: Turns) -> None:
        self.options, self._turns = dict(options), turns
        self.source = None if batch is None else batch_source.source(batch)

    def at(self, step: int) -> dict[str, Any]:
        """The options of a step."""
        return {**self.options, "seed": moved(self.options.get("seed", 0), step)}

    def measured(
        self, step: int, model: Any, batch: Any, own_options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Decomposition]:
        """The row of a step, and its decomposition. A model that is known to be refused is not touched."""
        started = time.perf_counter()
        refuse(model)
        own = None if self.source is None else self.source.next(model)
        with alone(model):
            d, found = measured(step, model, batch, own, {**self.at(step), **own_options})
        return self.row(step, found, time.perf_counter() - started), d

    def row(self, step: int, found: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
        """The row of what was found at a step, and, if it is known, of what that cost."""
        row: dict[str, Any] = {"step": step, "time": time.time(), **found}
        if (centre := self._turns.window(step)) is not None:
            row["window"] = centre
        if seconds is not None:
            row["seconds"] = seconds
            self._turns.spent(seconds)
        return row

    def change(self, before: Any, after: Any, batch: Any) -> dict[str, float]:
        """What an update did to the loss, for the row of its step."""
        own = batch if batch is not None else self.source.last if self.source is not None else None
        options = {name: self.options[name] for name in OF_THE_FUNCTION if name in self.options}
        with alone(after):
            taken = step_taken.step_taken(before, after, own, **options)
        return {"update/predicted": taken.predicted, "update/measured": taken.measured}
