"""Traced once per model structure, computation and shapes."""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from lnp.contract import validation
from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp_tensorflow.effects import calls_python, written
from lnp_tensorflow.model import Arrays, Structure
from lnp_tensorflow.record import record
from lnp_tensorflow.replay import Forward, forward
from lnp_tensorflow.self_check import BENT, Comparison, Verdict, alone_note, compare
from lnp_tensorflow.state_guard import undisturbed

REMEMBERED = 64
"""Measurements whose traced code is kept."""


@dataclass(frozen=True)
class Plan:
    """All that is fixed when a measurement is traced; equal plans share the traced code."""

    computation: Callable
    structure: Structure
    options: Options
    jit_compile: bool = False
    notes: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    loss_state: tuple = ()

    def whole(self, error: Exception) -> Plan:
        """The same with no samples taken apart, since that has raised an error."""
        note = alone_note(error.args[0] if isinstance(error, InParts) else error)
        return replace(self, options=replace(self.options, split=False), notes=(note,), verdicts=())


class InParts(Exception):
    """The user's code has raised an error after it ran on the whole batch: on a part of it, as far as can be known."""


@dataclass(frozen=True)
class Answer:
    """What a measurement returns: the computation's result, and the checks on values."""

    result: Any
    violated: tuple
    coupled: tuple
    messages: tuple[str, ...] = ()


class Place(int):
    """Where a tensor that is no number is found among those of an answer."""


@dataclass(frozen=True)
class Traced:
    """A measurement as a graph.

    Attributes
    ----------
    function:
        (arrays, batches' tensors, seed, operands) -> every number of the answer in one float64 vector, and its arrays.
    answer:
        The answer with specifications in the places of both.
    written:
        Variables that the model or the loss writes to.
    calls:
        Whether it calls Python while it runs.
    """

    function: Any
    answer: Answer
    written: tuple[tf.Variable, ...]
    calls: bool


_TRACED: OrderedDict[Any, Traced] = OrderedDict()
_VERDICTS: OrderedDict[Any, tuple[Verdict, ...]] = OrderedDict()
CONVERTED: OrderedDict[Any, None] = OrderedDict()
"""Structures that need AutoGraph."""


def measure(
    plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]
) -> tuple[Answer, list[Forward]]:
    """Linearise the model on each batch and compute. Each pass puts back what the model and the loss write to."""
    given = [validation.unpack(pair) for pair in pairs]
    runs = [forward(plan.structure, tree, arrays, inputs) for inputs, _ in given]
    verdicts = plan.verdicts or [None] * len(runs)
    records = [
        record(run, *pair, seed, plan.options, plan.notes, verdict)
        for run, pair, verdict in zip(runs, given, verdicts, strict=True)
    ]
    try:
        result = plan.computation(*records, **operands)
    except tf.errors.OperatorNotAllowedInGraphError:  # the network needs AutoGraph
        raise
    except Exception as error:
        raise (InParts(error) if plan.options.split and plan.options.microbatch is None else error) from error
    checks = [check for lin in records for check in lin.violations]
    coupled = tuple(lin.coupled for lin in records if lin.coupled is not None)
    return Answer(result, tuple(flag for flag, _ in checks), coupled, tuple(message for _, message in checks)), runs


def run(plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]) -> Answer:
    """The answer with numbers, in one transfer from the device.

    What has once been compared with single samples is remembered. Samples that interact are not taken apart.
    """
    key = _key(plan, arrays, pairs, operands)
    if plan.options.split:
        verdicts = _verdicts(key, plan, tree, arrays, pairs)
        joint = [verdict.coupled for verdict in verdicts if verdict.coupled][:1]
        if joint and plan.options.microbatch is not None:
            return Answer(None, (), (True,))
        change = {"options": replace(plan.options, split=False)} if joint else {"verdicts": verdicts}
        bent = (BENT,) if any(verdict.bent for verdict in verdicts) else ()
        plan = replace(plan, notes=(*joint, *bent), **change)
    given = tree, arrays, pairs, seed, operands
    try:
        return _run((plan, *key[1:]), measure, plan, *given)
    except (InParts, tf.errors.OpError) as error:
        if not plan.options.split or plan.options.microbatch is not None:
            raise
        plan = plan.whole(error)
        return _run((plan, *key[1:]), measure, plan, *given)  # where the batch itself fails, this raises again


def run_inside(plan: Plan, *given: Any) -> Any:
    """The result in the graph around it, as tensors."""
    try:
        return separately(lambda: measure(plan, *given)[0].result)
    except InParts as error:
        whole = plan.whole(error)
        return separately(lambda: measure(whole, *given)[0].result)


def _verdicts(key: Any, plan: Plan, tree: Any, arrays: Arrays, pairs: tuple) -> tuple[Verdict, ...]:
    """How the samples of each batch are taken apart; found out once for each model and shapes."""
    known = _VERDICTS.get(key)
    if known is not None:
        return known
    found = [_verdict(plan, tree, arrays, validation.unpack(pair)[0]) for pair in pairs]
    verdicts = tuple(verdict for verdict, _ in found)
    if all(lasting for _, lasting in found):
        remember(_VERDICTS, key, verdicts)
        _forget_with(plan.structure.static, _VERDICTS, key)
    return verdicts


def _verdict(plan: Plan, tree: Any, arrays: Arrays, inputs: Any) -> tuple[Verdict, bool]:
    """How the samples of one batch are taken apart, whatever is measured, and whether that is remembered."""
    mine = Plan(compare, plan.structure, Options(microbatch=plan.options.microbatch), plan.jit_compile)
    key = _key(mine, arrays, inputs, {})
    if key in _VERDICTS:
        return _VERDICTS[key][0], True
    try:
        seen: Comparison = _run(key, _judge, mine, tree, arrays, (inputs,), 0, {}).result
    except tf.errors.OpError as error:  # from single samples or from the batch, which will be run again
        return Verdict(coupled=alone_note(error)), False
    verdict, lasting = seen.verdict(), all(missed == missed for missed in seen.missed.values())
    if lasting:  # what is not a number tells nothing
        remember(_VERDICTS, key, (verdict,))
        _forget_with(plan.structure.static, _VERDICTS, key)
    return verdict, lasting


def _judge(
    plan: Plan, tree: Any, arrays: Arrays, given: tuple, seed: Any, operands: dict[str, Any]
) -> tuple[Answer, list[Forward]]:
    """Compare taps with single samples."""
    (inputs,) = given
    run = forward(plan.structure, tree, arrays, inputs)
    seen = compare(run, inputs, plan.options.microbatch)
    return Answer(seen, (), ()), [run]


def _run(
    key: Any, body: Callable, plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]
) -> Answer:
    tensors = [leaf for leaf in leaves(pairs) if tf.is_tensor(leaf)]
    dynamic = (arrays, tensors, tf.cast(seed, tf.int64), operands)
    traced = _TRACED.get(key)
    if traced is None:
        traced, lasting = _trace(body, plan, tree, pairs, dynamic)
        if lasting:
            remember(_TRACED, key, traced)
            _forget_with(plan.structure.static, _TRACED, key)
    before = [(variable, variable.read_value()) for variable in traced.written]
    try:
        with undisturbed(*plan.structure.roots, plan.options.loss) if traced.calls else contextlib.nullcontext():
            packed, *made = traced.function(*dynamic)
        values = iter(packed.numpy().tolist())
    finally:
        for variable, value in before:
            variable.assign(value)

    def number(spec: Any) -> Any:
        if isinstance(spec, Place):
            return made[spec]
        if not isinstance(spec, tf.DType):
            return spec
        value = next(values)
        return value if spec.is_floating else int(value)

    return map_leaves(number, traced.answer)


def _trace(body: Callable, plan: Plan, tree: Any, pairs: tuple, dynamic: tuple) -> tuple[Traced, bool]:
    """The measurement as a graph, and whether that is one for later measurements too."""
    seen: list[Any] = []

    def graph(arrays: Arrays, tensors: list, seed: tf.Tensor, operands: dict[str, Any]) -> list[tf.Tensor]:
        given = iter(tensors)
        filled = map_leaves(lambda leaf: next(given) if tf.is_tensor(leaf) else leaf, pairs)
        answer, runs = body(plan, tree, arrays, filled, seed, operands)
        tensors = [leaf for leaf in leaves(answer) if tf.is_tensor(leaf)]
        numbers = [tf.cast(leaf, tf.float64) for leaf in tensors if not leaf.shape.rank]
        made = [leaf for leaf in tensors if leaf.shape.rank]
        places = map(Place, range(len(made)))
        shown = lambda leaf: (next(places) if leaf.shape.rank else leaf.dtype) if tf.is_tensor(leaf) else leaf
        seen[:] = [map_leaves(shown, answer), not any(run.drawing for run in runs)]
        return [tf.stack(numbers) if numbers else tf.zeros(0, tf.float64), *made]

    function = tf.function(graph, autograph=False, jit_compile=plan.jit_compile or None)
    spec = tf.nest.map_structure(tf.type_spec_from_value, dynamic, expand_composites=False)
    with undisturbed(*plan.structure.roots, plan.options.loss):
        concrete = function.get_concrete_function(*spec)
    answer, lasting = seen
    return Traced(concrete, answer, written(concrete.graph), calls_python(concrete.graph)), lasting


def separately(body: Callable[[], Any]) -> Any:
    """What `body` returns, traced as a function of its own that the graph around it calls.

    The operations around it stay as they are without: the same seeds, and the same ones to be fused by an optimiser.
    """
    seen: list[Any] = []

    def run() -> list[tf.Tensor]:
        seen[:] = [body()]
        return [leaf for leaf in leaves(seen[0]) if tf.is_tensor(leaf)]

    function = tf.function(run, autograph=False, experimental_attributes={"_noinline": True})
    made = iter(function.get_concrete_function()())
    return map_leaves(lambda leaf: next(made) if tf.is_tensor(leaf) else leaf, seen[0])


def _key(plan: Plan, arrays: Arrays, pairs: tuple, operands: dict[str, Any]) -> Any:
    """What traced code is found by: the plan, and the shapes and dtypes of everything that is passed to it."""
    given = map_leaves(_described, (pairs, operands))
    key = (plan, tuple(map(_described, arrays.values())), str(given))
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(
            f"The loss, forward or model cannot be hashed ({error}), which traced code is found by. Expected a "
            "function, or an object with __hash__."
        ) from error
    return key


def _described(leaf: Any) -> Any:
    if isinstance(leaf, tf.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return tf.type_spec_from_value(leaf) if tf.is_tensor(leaf) else leaf


def remember(memory: OrderedDict, key: Any, value: Any) -> None:
    """Keep the last few."""
    memory[key] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)


def _forget_with(static: Any, memory: OrderedDict, key: Any) -> None:
    """Variables that a graph has captured live as long as it does: a module's goes with the module."""
    if isinstance(static, weakref.ref):
        weakref.finalize(static(), memory.pop, key, None)
