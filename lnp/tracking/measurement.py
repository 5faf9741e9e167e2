"""One measurement of a tracker: its options, its batches, and the row that comes of it."""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lnp import api
from lnp.arguments import Batch, Model, Seed
from lnp.results.cross_response import CrossResponse
from lnp.results.decomposition import Decomposition
from lnp.results.step_taken import step_taken
from lnp.tracking.batch_source import CyclingBatches, FixedBatch, batch_source
from lnp.tracking.history import Row
from lnp.tracking.learning_rate import LearningRate, LearningRates
from lnp.tracking.net_rate import NetRates
from lnp.tracking.process import refuse, single_process
from lnp.tracking.step_selection import StepSelection

STEP_OPTIONS = ("loss", "forward", "loss_terms", "batch_statistics")
"""Options of `lnp.decompose` that `lnp.step_taken` has as well."""
CROSS_VALUES = ("rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr")


UNTOLD = (
    "The model is the same after the block of tracker.step as before it. Expected an update. In JAX, where one makes "
    "new parameters, tell them: `with tracker.step(...) as watched: ...; watched.after(new_model)`."
)


class ObservedStep:
    """A step during its update; what `Tracker.step` hands to its block.

    Attributes
    ----------
    decomposition:
        The decomposition before the update; None where nothing is measured.
    model:
        The model after the update.
    is_told:
        Whether `after` was called.
    """

    def __init__(self, decomposition: Decomposition | None, model: Model) -> None:
        self.decomposition = decomposition
        self.model = model
        self.is_told = False

    def after(self, model: Model) -> None:
        """Say what the update has made of the model, where it is a new one."""
        self.model = model
        self.is_told = True


class StepMeasurer:
    """Measures steps with a tracker's options.

    Attributes
    ----------
    options:
        Options of `lnp.decompose`.
    source:
        The tracker's own batches, or None.
    net:
        Net rates of these batches, or None without them.

    Raises
    ------
    ValueError
        For a learning rate without batches of the tracker's own.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        batch: Batch | Iterable[Batch],
        learning_rate: LearningRate,
        selection: StepSelection,
    ) -> None:
        if batch is None and learning_rate is not None:
            raise ValueError(
                "Tracker received learning_rate= without batch=. Expected both: a net rate is that of a batch which is "
                "the same at every measurement. Pass batch=, a batch that the run does not train on."
            )
        self.options = dict(options)
        self.source: FixedBatch | CyclingBatches | None = None if batch is None else batch_source(batch)
        self.net = None if batch is None else NetRates(LearningRates(learning_rate))
        self._selection = selection
        selection.together = options.get("group") is not None
        if self.net is not None:
            selection.going_back.append(self.net.go_back)

    def options_at(self, step: int) -> dict[str, Any]:
        """The options of a step, with a seed of its own."""
        return {**self.options, "seed": seed_at(self.options.get("seed", 0), step)}

    def measure(
        self, step: int, model: Model, batch: Batch, own_options: Mapping[str, Any]
    ) -> tuple[Row, Decomposition]:
        """The row of a step, and its decomposition. A model that is known to be refused is not touched."""
        started, all_of_them = time.perf_counter(), self._selection.takes_all(model)
        if not all_of_them:
            refuse(model)
        own = None if self.source is None else self.source.next(model)
        options = {"group": "auto" if all_of_them else None, **self.options_at(step), **own_options}
        if own is not None:
            options["sample_losses"] = True
            as_inputs = getattr(options.get("forward"), "as_inputs", None)  # a host's own step takes batches in a form
            own = own if as_inputs is None else as_inputs(own)
        with contextlib.nullcontext() if all_of_them else single_process(model):
            decomposition, measured, values = decompose_batches(step, model, batch, own, options)
        if self.net is not None and self.source is not None:
            with self._selection.attempt(None, f"the net rate in the row of step {step}", False):
                rescaled = options.get("preconditioner") is not None
                found = self.net.values(self._selection.window(step), step, self.source.key, measured, rescaled)
                values, notes = values | found[0], (*decomposition.notes, *found[1])
                decomposition = replace(decomposition, notes=notes)
        return self.row(step, values, time.perf_counter() - started), decomposition

    def row(self, step: int, values: Mapping[str, Any], seconds: float | None) -> Row:
        """The row of a step from its values and, where it is known, what measuring them has cost."""
        row: Row = {"step": step, "time": time.time(), **values}
        if (centre := self._selection.window(step)) is not None:
            row["window"] = centre
        if seconds is not None:
            row["seconds"] = seconds
            self._selection.record_cost(seconds)
        return row

    def loss_change(self, step: int, before: Any, observed: ObservedStep, batch: Batch) -> dict[str, float]:
        """The loss change of an update, predicted and measured, and how much of what updates promise for the tracker's
        own batch arrives, for the row of its step.

        Raises
        ------
        ValueError
            Where nothing has changed in a model of immutable parts, whose update makes a new one.
        """
        after = observed.model
        own = None if self.source is None else self.source.last
        options = {name: self.options[name] for name in STEP_OPTIONS if name in self.options}
        with single_process(after):
            taken = step_taken(before, after, own if batch is None else batch, **options)
            of_own = taken if batch is None or own is None else step_taken(before, after, own, **options)
        if taken.predicted == 0 == taken.measured and not observed.is_told and _is_immutable(after):
            raise ValueError(UNTOLD)
        values = {"update/predicted": taken.predicted, "update/measured": taken.measured}
        if self.net is None or self.source is None:
            return values
        return values | self.net.arrived(step, self.source.key, -of_own.predicted)


def _is_immutable(model: Model) -> bool:
    """Whether a model is a function with its parameters, or a frozen dataclass, as JAX's libraries have them."""
    return isinstance(model, tuple) or getattr(getattr(model, "__dataclass_params__", None), "frozen", False)


def decompose_batches(
    step: int, model: Model, batch: Batch, own: Batch, options: Mapping[str, Any]
) -> tuple[Decomposition, Decomposition, dict[str, Any]]:
    """The decomposition, that of the tracker's own batch, and the values for the row: of the batch that is trained on,
    with the response of the tracker's own batch to it where both are given, of the one that is given otherwise.

    Raises
    ------
    ValueError
        Without any batch.
    """
    if batch is None and own is None:
        raise ValueError(
            f"observe({step}, ...) received no batch, and the tracker has none. Expected one of the two: pass the "
            "batch that the step trains on, or make the tracker with batch=."
        )
    options = dict(options)
    group = options.pop("group", None)
    if batch is None or own is None:
        decomposition = api.decompose(model, own if batch is None else batch, **options, group=group)
        return decomposition, decomposition, decomposition.to_dict()
    if group not in (None, "auto"):
        raise ValueError(
            "observe received a training batch, and the tracker has a batch of its own and group=. Expected one of the "
            "two batches: a cross response is measured by one process. Leave one out, or group=."
        )
    cross = api.cross_response(model, batch, own, **{"population": None, **options})
    return cross.trained, cross.measured, cross.trained.to_dict() | _cross_values(cross)


def _cross_values(cross: CrossResponse) -> dict[str, Any]:
    """The cross response under "cross/...", and the decomposition of its measured batch under "measured/..."."""
    values = {f"cross/{name}": getattr(cross, name) for name in CROSS_VALUES}
    return values | {f"measured/{name}": value for name, value in cross.measured.to_dict().items()}


def python_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of shape (), as compiled functions return them, as Python's numbers."""

    def number(value: Any) -> Any:
        if isinstance(value, int | float | str | None):
            return value
        return value.item() if hasattr(value, "item") else float(value)

    return {name: number(value) for name, value in values.items()}


def seed_at(seed: Seed, step: int) -> Seed:
    """Another seed at each step, so that errors average out over a window; keys of other kinds stay as they are.

    >>> seed_at(3, 10), seed_at("key", 10)
    (13, 'key')
    """
    try:
        return operator.index(seed) + step
    except TypeError:
        return seed
