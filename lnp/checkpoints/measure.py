"""Checkpoints x batches: one history for a run that is over."""

from __future__ import annotations

import contextlib
import gc
import operator
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from lnp import api
from lnp.arguments import Batch, Model
from lnp.checkpoints.asked import Asked, Sizes, asked
from lnp.checkpoints.fingerprints import digest, text_of
from lnp.checkpoints.means import ends_of, row_of
from lnp.checkpoints.results import Part, Results
from lnp.progress import Advance, bar
from lnp.results.decomposition import Decomposition
from lnp.tracking.batch_source import is_batch
from lnp.tracking.failures import ON_ERROR, OnError, describe
from lnp.tracking.history import History
from lnp.tracking.learning_rate import LearningRate, LearningRates
from lnp.tracking.measurement import seed_at
from lnp.tracking.names import NOTES, STEP
from lnp.tracking.net_rate import NO_ERROR, Ends, between, fall
from lnp.tracking.options import check_call
from lnp.tracking.process import refuse, single_process
from lnp.typed_options import LossOptions
from lnp.user_warnings import warn

BATCHES_APART = 1_000_003
"""How far apart the seeds of two batches are, so that the errors of their probes are independent."""


@dataclass(frozen=True)
class MeasuredCheckpoints:
    """What was measured, and what could not be.

    Attributes
    ----------
    history:
        A row for each checkpoint, as a tracker would have written it.
    skipped:
        {step: why this checkpoint could not be loaded or measured}.
    elsewhere:
        Steps that other processes were measuring when this one was done.
    """

    history: History
    skipped: Mapping[int, str] = field(default_factory=dict)
    elsewhere: Sequence[int] = ()


def measure_checkpoints(
    load: Callable[[int], Model],
    steps: Iterable[int] | None = None,
    batches: Batch | Iterable[Batch] = None,
    path: str | os.PathLike | None = None,
    *,
    learning_rate: LearningRate = None,
    tags: Mapping[str, Any] | None = None,
    responses: bool = False,
    nested: Sizes = False,
    on_error: OnError = "warn",
    **options: Unpack[LossOptions],
) -> MeasuredCheckpoints:
    r"""Measure the saved checkpoints of a run; one model is in memory at a time.

    The file is one that `lnp plot`, `lnp compare` and `History.read` take. It is brought up to date after every
    checkpoint. Called again with the same arguments, it goes on: what is measured is not measured again, unless the
    checkpoint's files have changed. Several processes that are called with the same arguments share the work.

    From one checkpoint to the next, on the same samples, rows have how fast the loss has really fallen,

        net/loss_fall = L(a) - L(b),   net/rate_per_step = (L(a) - L(b)) / (b - a),

    with standard errors of the paired differences; with a tag `tokens_per_step` also `net/rate_per_token`, and with a
    learning rate the net rate and the net position of a tracker.

    Parameters
    ----------
    load:
        load(step) -> model, in the mode in which it is to be measured; or what `lnp.open_checkpoints` returns.
    steps:
        Steps of the checkpoints. Default: those that `lnp.open_checkpoints` has found.
    batches:
        (inputs, targets), or several of them: columns are then means over the batches, with standard errors over them.
    path:
        The history's file. Beside it is a folder `<path>.parts`, with what going on needs. None keeps nothing.
    learning_rate:
        A number, or a function step -> number, for plain gradient descent: see `lnp.Tracker`.
    tags:
        Values that are the same for the whole run, such as its parameters or `tokens_per_step`.
    responses:
        Also the cross responses between the batches, <grad L_a, grad L_b>: `cross/rate` and `cross/chi_pos` are their
        means over pairs, with errors from three batches on, `cross/0-1/rate` that of a pair. Their mean has no floor.
        The gradients of all batches are held in NumPy at a time.
    nested:
        Also the first 8, 16, 32, ... samples of each batch, or as many as a list says: `nested/8/chi_pos` and so on,
        which show the floor that a batch's size puts under its position.
    on_error:
        "warn": a checkpoint that cannot be loaded or measured is named in a warning, skipped, and tried again when this
        is called again. "raise": the error is raised.
    options:
        Options of `lnp.decompose`. The seed of a step's signs is `seed` plus the step, as a tracker has it.

    Raises
    ------
    TypeError, ValueError
        For options that `lnp.decompose` does not have, without steps or batches, for tags named as measured columns,
        for responses of one batch, sizes that batches do not have, and where the path holds checkpoints that were
        measured with other settings.
    FileExistsError
        If there is something else at the path.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> def load(step):
    ...     return lnp_numpy.LinearModel(weight=numpy.full((2, 1), 0.1 * step))
    >>> measured = lnp.measure_checkpoints(load, [0, 1, 4], (numpy.eye(2), numpy.ones((2, 1))))
    >>> measured.history["loss"].round(2)
    array([1.  , 0.81, 0.36])
    >>> measured.history["net/rate_per_step"].round(2)  # (1 - 0.81) / 1, (0.81 - 0.36) / 3
    array([ nan, 0.19, 0.15])
    """
    tags = {**getattr(load, "tags", {}), **(tags or {})}
    check_call(options, tags)
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}. Expected one of {', '.join(map(repr, ON_ERROR))}.")
    listed = _listed(load, batches)
    more = asked(responses, nested, listed, options)
    numbers = _steps(getattr(load, "steps", None) if steps is None else steps)
    rates = None if learning_rate is None else LearningRates(learning_rate)
    settings = {name: text_of(value) for name, value in options.items()}
    settings |= {"batches": digest(listed), "checkpoints": text_of(getattr(load, "source", load))}
    if responses or nested is not False:
        settings |= {"responses": text_of(more.responses), "nested": text_of(more.sizes)}
    work = _Work(load, getattr(load, "in_turn", lambda: load)(), listed, options, more, on_error)
    with contextlib.ExitStack() as stack:
        kept = path if path is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run.jsonl"
        results = Results(kept, settings)
        advance = stack.enter_context(bar("measuring checkpoints", len(numbers)))
        history, skipped, elsewhere = _measure_all(work, results, numbers, lambda p: _rows(p, rates, tags), advance)
    return MeasuredCheckpoints(history, skipped, elsewhere)


@dataclass(frozen=True)
class _Work:
    """How a checkpoint is measured."""

    load: Callable[[int], Model]
    next_model: Callable[[int], Model]
    batches: list[Batch]
    options: Mapping[str, Any]
    more: Asked
    on_error: OnError

    def stamp(self, step: int) -> str:
        """What tells whether a checkpoint has changed."""
        return str(getattr(self.load, "stamp", lambda step: "")(step))

    def is_missing(self, step: int, results: Results) -> bool:
        """Whether a checkpoint has not been measured as it is now."""
        try:
            return results.part(step, self.stamp(step)) is None
        except OSError:  # measuring it says what is wrong with it
            return True

    def measure(self, step: int) -> Part:
        """What a file keeps of a checkpoint. The model is gone when this returns, unless it is filled again."""
        stamp, started = self.stamp(step), time.perf_counter()
        model = self.next_model(step)
        refuse(model)
        size = getattr(self.load, "size", None)
        with single_process(model):
            seeds = [self._seed(step, index) for index in range(len(self.batches))]
            found = [self._decompose(model, batch, seed) for batch, seed in zip(self.batches, seeds, strict=True)]
            values, notes = row_of(found)
            beside, more = self.more.values(model, self.batches, found, seeds, self.options)
        row = {STEP: step, "time": time.time(), **values, "seconds": time.perf_counter() - started}
        if size is not None:
            row["parameters"] = size(model)
        notes = (*notes, *(note for note in more if note not in notes))
        return {"row": row | beside, "notes": notes, "ends": ends_of(step, found, values), "stamp": stamp}

    def _seed(self, step: int, index: int) -> int:
        """The seed for one of the batches; of the first it is that of a tracker."""
        return seed_at(self.options.get("seed", 0), step + index * BATCHES_APART)

    def _decompose(self, model: Model, batch: Batch, seed: int) -> Decomposition:
        """The decomposition of one of the batches."""
        return api.decompose(model, batch, **{**self.options, "seed": seed, "sample_losses": True})


def _measure_all(
    work: _Work, results: Results, steps: Sequence[int], rows: Callable[..., list], advance: Advance
) -> tuple[History, dict[int, str], list[int]]:
    """(The history, what was skipped and why, what other processes are at)."""
    skipped: dict[int, str] = {}
    elsewhere = []
    results.write_history(rows)
    for step in steps:
        with results.claim(step) as own:
            if not own:
                elsewhere.append(step)
            elif work.is_missing(step, results):
                try:
                    results.forget(step)
                    results.keep(step, work.measure(step))
                except Exception as error:  # whatever a file, a framework or a model raises
                    if work.on_error == "raise":
                        raise
                    skipped[step] = describe(error)
                    warn(f"lnp: the checkpoint of step {step} was skipped: {skipped[step]}")
                gc.collect()  # models in cycles of references, before the next one is loaded
                results.write_history(rows, in_time=True)
        advance(1)
    elsewhere = [step for step in elsewhere if work.is_missing(step, results)]
    history = results.write_history(rows)
    assert history is not None, "it was not left for later"
    return history, skipped, elsewhere


def _rows(
    parts: Sequence[tuple[int, Part]], rates: LearningRates | None, tags: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of a history, in order of the steps: with net rates and tags, and with notes where they change."""
    rows: list[dict[str, Any]] = []
    said: tuple[str, ...] = ()
    before: Ends | None = None
    for _, part in parts:
        row, notes, after = {**part["row"], **tags}, tuple(part["notes"]), part["ends"]
        if before is not None:
            found, more = _net(before, after, rates, tags.get("tokens_per_step"))
            row, notes = row | found, (*notes, *more)
        if notes != said:
            row[NOTES] = "; ".join(notes)
        rows.append(row)
        said, before = notes, after
    return rows


def _net(
    before: Ends, after: Ends, rates: LearningRates | None, tokens: float | None
) -> tuple[dict[str, float], list[str]]:
    """(Columns, notes) of how fast the loss has fallen between two checkpoints."""
    steps = after.mark.step - before.mark.step
    if rates is not None:
        found, notes = between(before, after, rates, rescaled=False)
    else:
        lost, stderr = fall(before, after)
        found = {"net/steps": steps, "net/loss_fall": lost, "net/loss_fall_stderr": stderr}
        notes = [NO_ERROR] if stderr != stderr else []
    for unit, count in (("step", 1), ("token", tokens)):
        if isinstance(count, int | float) and count > 0:
            found[f"net/rate_per_{unit}"] = found["net/loss_fall"] / (steps * count)
            found[f"net/rate_per_{unit}_stderr"] = found["net/loss_fall_stderr"] / (steps * count)
    return found, notes


def _listed(load: Callable[[int], Model], batches: Batch | Iterable[Batch]) -> list[Batch]:
    """The batches as a list, in the arrays of the model's framework."""
    listed = [] if batches is None else [batches] if batches != [] and is_batch(batches) else list(batches)
    if not listed:
        raise ValueError("measure_checkpoints received no batches. Expected one batch, or a list of them.")
    prepare = getattr(load, "prepare", None)
    return listed if prepare is None else [prepare(batch) for batch in listed]


def _steps(steps: Iterable[int] | None) -> list[int]:
    """The steps in order, each once."""
    if steps is None:
        raise ValueError("measure_checkpoints received no steps. Expected those of the checkpoints, as integers.")
    numbers = sorted({operator.index(step) for step in steps})
    if not numbers or numbers[0] < 0:
        raise ValueError(f"steps is {numbers[:3]}. Expected one integer or more, none below 0.")
    return numbers
