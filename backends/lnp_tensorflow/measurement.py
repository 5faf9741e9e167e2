"""A measurement: samples are compared once for each model and shapes, and it is made again where they meet later."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import tensorflow as tf

from lnp.contract import validation
from lnp.contract.options import Options
from lnp.per_sample.verdict import BENT, Verdict, failing, found_interacting
from lnp_tensorflow.compile_cache import Answer, Given, Plan, forget, key_of, remember, run_traced, separately
from lnp_tensorflow.fallback import FATAL
from lnp_tensorflow.record import record
from lnp_tensorflow.replay import Forward, compiled_inside, forward
from lnp_tensorflow.self_check import Checked, Comparison, compared

CONVERTED: OrderedDict[Any, None] = OrderedDict()
"""Structures that need AutoGraph."""
_CHECKED: OrderedDict[Any, Checked] = OrderedDict()


class InParts(Exception):
    """The user's code has raised an error after it ran on the whole batch: on a part of it, as far as can be known."""


def measure(plan: Plan, given: Given, turn: tf.Tensor | None) -> tuple[Answer, list[Forward]]:
    """Linearise the model on each batch and compute. Each pass puts back what the model and the loss write to."""
    pairs = [validation.unpack(pair) for pair in given.pairs]
    runs = [forward(plan.structure, given.tree, given.arrays, inputs) for inputs, _ in pairs]
    records = [
        record(run, *pair, given.seed, plan.options, plan.notes, checked, turn)
        for run, pair, checked in zip(runs, pairs, plan.checked or [None] * len(runs), strict=True)
    ]
    try:
        result = plan.computation(*records, **given.operands)
    except FATAL:
        raise
    except Exception as error:
        raise (InParts(error) if plan.options.split and plan.options.microbatch is None else error) from error
    checks = [check for lin in records for check in lin.violations]
    coupled = tuple(lin.coupled() for lin in records if lin.coupled is not None)
    return Answer(result, tuple(flag for flag, _ in checks), coupled, tuple(message for _, message in checks)), runs


def run(plan: Plan, given: Given) -> Answer:
    """The answer with numbers, in one transfer from the device.

    What has once been compared with single samples is remembered. Samples that interact are not taken apart; where they
    are found to do so in this measurement, it is made again.
    """
    if not plan.options.split:
        return run_traced(measure, plan, given)
    models = [_Model(plan, replace(given, pairs=validation.unpack(pair)[0])) for pair in given.pairs]
    checked = tuple(model.checked() for model in models)
    if any(found.verdict.bent for found in checked):
        raise ValueError(BENT)
    reason = next((found.verdict.reason for found in checked if found.verdict.reason), "")
    apart, refused = replace(plan, checked=checked), Answer(None, (), (True,))
    if reason:
        return refused if plan.options.microbatch is not None else _jointly(plan, reason, given)
    try:
        answer = run_traced(measure, apart, given)
    except (InParts, tf.errors.OpError) as error:
        inputs = validation.unpack(given.pairs[0])[0]
        if plan.options.microbatch is not None or isinstance(error, FATAL) or needs_xla(error, plan, given, inputs):
            raise
        return _jointly(plan, failing(error.args[0] if isinstance(error, InParts) else error), given)
    for model, interacting in zip(models, answer.coupled, strict=True):
        if interacting:
            model.remember(Checked(Verdict(reason=found_interacting())))
    if any(answer.coupled):
        return refused if plan.options.microbatch is not None else _jointly(plan, found_interacting(), given)
    return answer


def _jointly(plan: Plan, reason: str, given: Given) -> Answer:
    """The answer with no samples taken apart. Where it is the batch itself that fails, its error is raised again."""
    return run_traced(measure, plan.jointly(reason), given)


def needs_xla(error: Exception, plan: Plan, given: Given, inputs: Any) -> bool:
    """Whether an error may come of an operation that the model has compiled by XLA, and that was traced without."""
    if plan.structure.autograph or not isinstance(error, tf.errors.InvalidArgumentError | tf.errors.UnimplementedError):
        return False
    return compiled_inside(plan.structure, given.tree, given.arrays, inputs)


def run_inside(plan: Plan, given: Given) -> Any:
    """The result in the graph around it, as tensors. Whenever that runs, the batch is compared with single samples."""
    try:
        return separately(lambda: measure(plan, given, None)[0].result)
    except InParts as error:
        joint = plan.jointly(failing(error.args[0]))
        return separately(lambda: measure(joint, given, None)[0].result)


class _Model:
    """A model on inputs of some shapes, whatever is measured, and how its samples can be taken apart."""

    def __init__(self, plan: Plan, given: Given) -> None:
        self._plan = Plan(_judge, plan.structure, Options(microbatch=plan.options.microbatch), plan.jit_compile)
        self._given = replace(given, seed=0, operands={})
        self._key = key_of(self._plan, self._given)

    def checked(self) -> Checked:
        """What comparing the batch with single samples shows: at its parameters, and at others."""
        if self._key in _CHECKED:
            return _CHECKED[self._key]
        try:
            return self._found()
        finally:
            forget(self._key)

    def _found(self) -> Checked:
        """The same, where it is not known yet; it is remembered."""
        try:
            seen: Comparison = self._compared(moving=False)
        except FATAL:
            raise
        except tf.errors.OpError as error:  # from single samples, or from the batch, which will be run again
            if needs_xla(error, self._plan, self._given, self._given.pairs):
                raise
            return Checked(Verdict(failing(error), sure=False))
        found, verdict = Checked(seen.verdict(), seen.expanded), seen.verdict()
        if verdict.sure and not verdict.reason and not verdict.bent:
            found = replace(found, verdict=self._at_other_parameters(verdict))
        if verdict.sure:
            self.remember(found)
        return found

    def remember(self, found: Checked) -> None:
        """For measurements to come."""
        remember(_CHECKED, self._key, found, self._plan.structure.static)

    def _at_other_parameters(self, verdict: Verdict) -> Verdict:
        """The verdict, with what shows where no gate is closed by chance. Numbers that are not finite show nothing."""
        try:
            other = self._compared(moving=True).verdict()
        except FATAL:
            raise
        except tf.errors.OpError:  # such as of an assertion about values
            return verdict
        return verdict.joined(other) if other.sure else verdict

    def _compared(self, moving: bool) -> Comparison:
        return run_traced(_judge, self._plan, self._given, moving).result


def _judge(plan: Plan, given: Given, turn: tf.Tensor | None) -> tuple[Answer, list[Forward]]:
    """Compare a batch with single samples."""
    run = forward(plan.structure, given.tree, given.arrays, given.pairs)
    return Answer(compared(run, given.pairs, plan.options.microbatch), (), ()), [run]
