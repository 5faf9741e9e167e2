"""Traced once per model structure, computation and shapes."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from lnp import batches
from lnp.backends import Options
from lnp.structure import leaves, map_leaves
from lnp_tensorflow.forward import Forward, forward
from lnp_tensorflow.isolation import undisturbed
from lnp_tensorflow.models import Arrays, Structure
from lnp_tensorflow.record import record

REMEMBERED = 64
"""Measurements whose traced code is kept."""


@dataclass(frozen=True)
class Plan:
    """All that is fixed when a measurement is traced; equal plans share the traced code."""

    computation: Callable
    structure: Structure
    options: Options
    jit_compile: bool = False
    coupled: bool = False


@dataclass(frozen=True)
class Answer:
    """What a measurement returns: the computation's result, and the checks on values."""

    result: Any
    violated: tuple
    coupled: tuple
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Traced:
    """A measurement as a graph.

    Attributes
    ----------
    function:
        (arrays, batches' tensors, seed, operands) -> every number of the answer, in one float64 vector.
    answer:
        The answer with specifications in the numbers' places.
    written:
        Variables that the model writes to.
    """

    function: Any
    answer: Answer
    written: tuple[tf.Variable, ...]


_TRACED: OrderedDict[Any, Traced] = OrderedDict()
_COUPLED: OrderedDict[Any, None] = OrderedDict()


def measure(
    plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]
) -> tuple[Answer, list[Forward]]:
    """Linearise the model on each batch and compute. Pure but for what the model itself writes, which is put back."""
    given = [batches.unpack(pair) for pair in pairs]
    runs = [forward(plan.structure, tree, arrays, inputs) for inputs, _ in given]
    records = [record(run, *pair, seed, plan.options, plan.coupled) for run, pair in zip(runs, given, strict=True)]
    result = plan.computation(*records, **operands)
    for run in runs:
        run.restore()
    checks = [check for lin in records for check in lin.violations]
    coupled = tuple(lin.coupled for lin in records if lin.coupled is not None)
    return Answer(result, tuple(flag for flag, _ in checks), coupled, tuple(message for _, message in checks)), runs


def run(plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]) -> Answer:
    """The answer with numbers, in one transfer from the device. Samples that interact are not taken apart again."""
    key = _key(plan, arrays, pairs, operands)
    if key in _COUPLED:
        plan, key = _joint(plan), _joint_key(key)
    answer = _run(key, plan, tree, arrays, pairs, seed, operands)
    if not any(answer.coupled) or plan.options.microbatch is not None or any(answer.violated):
        return answer
    _remember(_COUPLED, key, None)
    return _run(_joint_key(key), _joint(plan), tree, arrays, pairs, seed, operands)


def _run(key: Any, plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]) -> Answer:
    tensors = [leaf for leaf in leaves(pairs) if tf.is_tensor(leaf)]
    dynamic = (arrays, tensors, tf.cast(seed, tf.int64), operands)
    traced = _TRACED.get(key)
    if traced is None:
        traced = _trace(plan, tree, pairs, dynamic)
        _remember(_TRACED, key, traced)
        if isinstance(plan.structure.static, weakref.ref):
            # variables that the graph has captured live as long as it does
            weakref.finalize(plan.structure.static(), _TRACED.pop, key, None)
    before = [(variable, variable.read_value()) for variable in traced.written]
    try:
        values = iter(traced.function(*dynamic).numpy().tolist())
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise

    def number(spec: Any) -> Any:
        if not isinstance(spec, tf.DType):
            return spec
        value = next(values)
        return value if spec.is_floating else int(value)

    return map_leaves(number, traced.answer)


def _trace(plan: Plan, tree: Any, pairs: tuple, dynamic: tuple) -> Traced:
    seen: list[Any] = []

    def graph(arrays: Arrays, tensors: list, seed: tf.Tensor, operands: dict[str, Any]) -> tf.Tensor:
        given = iter(tensors)
        filled = map_leaves(lambda leaf: next(given) if tf.is_tensor(leaf) else leaf, pairs)
        answer, runs = measure(plan, tree, arrays, filled, seed, operands)
        numbers = [tf.cast(leaf, tf.float64) for leaf in leaves(answer) if tf.is_tensor(leaf)]
        seen[:] = [
            map_leaves(lambda leaf: leaf.dtype if tf.is_tensor(leaf) else leaf, answer),
            tuple({id(v): v for run in runs for v, _ in run.written}.values()),
        ]
        return tf.stack(numbers)

    function = tf.function(graph, autograph=False, jit_compile=plan.jit_compile or None)
    spec = tf.nest.map_structure(tf.type_spec_from_value, dynamic, expand_composites=False)
    with undisturbed(plan.structure.static):
        concrete = function.get_concrete_function(*spec)
    return Traced(concrete, *seen)


def _key(plan: Plan, arrays: Arrays, pairs: tuple, operands: dict[str, Any]) -> Any:
    """What traced code is found by: the plan, and the shapes and dtypes of everything that is passed to it."""
    given = (arrays, pairs, operands)
    shown = str(map_leaves(lambda leaf: tf.type_spec_from_value(leaf) if tf.is_tensor(leaf) else leaf, given))
    key = (plan, shown)
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(
            f"The loss, forward or model cannot be hashed ({error}), which traced code is found by. Expected a "
            "function, or an object with __hash__."
        ) from error
    return key


def _joint(plan: Plan) -> Plan:
    return replace(plan, options=replace(plan.options, split=False), coupled=True)


def _joint_key(key: tuple) -> tuple:
    return _joint(key[0]), *key[1:]


def _remember(memory: OrderedDict, key: Any, value: Any) -> None:
    memory[key] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
