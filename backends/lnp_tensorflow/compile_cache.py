"""Traced once per model structure, computation and shapes."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from lnp.contract import recompiled
from lnp.contract.options import Options
from lnp.contract.recompiled import keep_last
from lnp.contract.trees import leaves, map_leaves
from lnp.per_sample.self_check import moved
from lnp_tensorflow import array_namespace
from lnp_tensorflow.effects import calls_python, written
from lnp_tensorflow.model import Arrays, Structure
from lnp_tensorflow.self_check import Checked
from lnp_tensorflow.state_guard import undisturbed

ONCE = (
    "The network or its loss calls Python while it runs (tf.py_function), where something failed. The backward pass "
    "through such a call can run only once, and a measurement needs several. Expected TensorFlow's operations between "
    "parameters and outputs. Pass forward= or a loss without the call."
)
KEPT = 16
"""Measurements whose traced code is kept: up to 30 MB each."""
REMEMBERED = 64
"""Of what is small."""


@dataclass(frozen=True)
class Plan:
    """All that is fixed when a measurement is traced; equal plans share the traced code."""

    computation: Callable
    structure: Structure
    options: Options
    jit_compile: bool = False
    notes: tuple[str, ...] = ()
    checked: tuple[Checked, ...] = ()
    loss_state: tuple = ()

    def jointly(self, reason: str) -> Plan:
        """The same with no samples taken apart, and why."""
        return replace(self, options=replace(self.options, split=False), notes=(reason,), checked=())


@dataclass(frozen=True)
class Given:
    """What a measurement is given each time.

    Attributes
    ----------
    tree, arrays:
        Of the model, see `lnp_tensorflow.model`.
    pairs:
        The batches; of a comparison the inputs of one.
    seed, operands:
        Of the computation.
    """

    tree: Any
    arrays: Arrays
    pairs: Any
    seed: Any = 0
    operands: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a measurement returns: the computation's result, the checks on values, and notes on its compilation."""

    result: Any
    violated: tuple
    coupled: tuple
    messages: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Place(int):
    """Where a tensor that is no number is found among those of an answer."""


@dataclass(frozen=True)
class Traced:
    """A measurement as a graph.

    Attributes
    ----------
    function:
        (arrays, batches' tensors, seed, number of the measurement, operands) -> every number of the answer in one
        float64 vector, and its arrays.
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
_TURNS = itertools.count()
"""Numbers of measurements. The samples that are looked at are drawn from them, never from the user's random state."""


def run_traced(body: Callable, plan: Plan, given: Given, moving: bool = False) -> Answer:
    """The answer of a traced body with numbers; with `moving` at other values of the trained parameters."""
    key = key_of(plan, given)
    tensors = [leaf for leaf in leaves(given.pairs) if tf.is_tensor(leaf)]
    turn = tf.constant(next(_TURNS), tf.int64)
    dynamic = (given.arrays, tensors, tf.cast(given.seed, tf.int64), turn, given.operands)
    traced = _TRACED.get(key)
    notes: tuple[str, ...] = ()
    if traced is None:
        traced, lasting = _trace(body, plan, given, dynamic)
        if lasting:
            remember(_TRACED, key, traced, plan.structure.static, KEPT)
            functions = plan.structure.static, plan.structure.forward, plan.options.loss
            notes = recompiled.compiled(functions, (plan.computation, *functions[:2]), key[1:], KEPT)
    before = [(variable, variable.read_value()) for variable in traced.written]
    unchanged = undisturbed(*plan.structure.roots, plan.options.loss) if traced.calls else contextlib.nullcontext()
    others = _moved(plan.structure, given.arrays, traced.function) if moving else contextlib.nullcontext(given.arrays)
    try:
        with unchanged, others as arrays:
            packed, *made = traced.function(arrays, *dynamic[1:])
        return replace(_filled(traced.answer, packed.numpy().tolist(), made), notes=notes)
    except tf.errors.UnknownError as error:
        raise (ValueError(ONCE) if traced.calls else error) from error
    finally:
        for variable, value in before:
            variable.assign(value)


def _filled(answer: Answer, numbers: list[float], arrays: list[tf.Tensor]) -> Answer:
    """An answer with its numbers and arrays in the places of what specifies them."""
    values = iter(numbers)

    def number(spec: Any) -> Any:
        if isinstance(spec, Place):
            return arrays[spec]
        if not isinstance(spec, tf.DType):
            return spec
        value = next(values)
        return value if spec.is_floating else int(value)

    return map_leaves(number, answer)


@contextlib.contextmanager
def _moved(structure: Structure, arrays: Arrays, function: Any) -> Iterator[Arrays]:
    """Where a traced function has other trained parameters: arrays with other values, and variables in the places of
    those that it has captured. The user's are not touched.
    """
    sources = structure.sources(arrays)
    others = moved(array_namespace, {name: tf.convert_to_tensor(source) for name, source in sources.items()})
    if structure.kind == "function":
        yield {**arrays, **others}
        return
    made = {id(source.handle): tf.Variable(others[name], trainable=False) for name, source in sources.items()}
    captured = list(function.captured_inputs)
    function.set_external_captures([made[id(x)].handle if id(x) in made else x for x in captured])
    try:
        yield arrays
    finally:
        function.set_external_captures(captured)


def _trace(body: Callable, plan: Plan, given: Given, dynamic: tuple) -> tuple[Traced, bool]:
    """The measurement as a graph, and whether that is one for later measurements too."""
    seen: list[Any] = []

    def graph(
        arrays: Arrays, tensors: list, seed: tf.Tensor, turn: tf.Tensor, operands: dict[str, Any]
    ) -> list[tf.Tensor]:
        values = iter(tensors)
        pairs = map_leaves(lambda leaf: next(values) if tf.is_tensor(leaf) else leaf, given.pairs)
        answer, runs = body(plan, Given(given.tree, arrays, pairs, seed, operands), turn)
        tensors = [leaf for leaf in leaves(answer) if tf.is_tensor(leaf)]
        numbers = [tf.cast(leaf, tf.float64) for leaf in tensors if not leaf.shape.rank]
        made = [leaf for leaf in tensors if leaf.shape.rank]
        seen[:] = [_specification(answer), not any(run.drawing for run in runs)]
        return [tf.stack(numbers) if numbers else tf.zeros(0, tf.float64), *made]

    function = tf.function(graph, autograph=False, jit_compile=plan.jit_compile or None)
    spec = tf.nest.map_structure(tf.type_spec_from_value, dynamic, expand_composites=False)
    with undisturbed(*plan.structure.roots, plan.options.loss):
        concrete = function.get_concrete_function(*spec)
    answer, lasting = seen
    return Traced(concrete, answer, written(concrete.graph), calls_python(concrete.graph)), lasting


def _specification(answer: Answer) -> Answer:
    """An answer with dtypes in the places of its numbers, and the places of its arrays in theirs."""
    places = map(Place, itertools.count())

    def shown(leaf: Any) -> Any:
        if not tf.is_tensor(leaf):
            return leaf
        return next(places) if leaf.shape.rank else leaf.dtype

    return map_leaves(shown, answer)


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


def key_of(plan: Plan, given: Given) -> Any:
    """What traced code is found by: the plan, and the shapes and dtypes of everything that is passed to it."""
    described = map_leaves(_described, (given.pairs, given.operands))
    key = (plan, tuple(map(_described, given.arrays.values())), str(described))
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


def remember(memory: OrderedDict, key: Any, value: Any, static: Any = None, count: int = REMEMBERED) -> None:
    """Keep the last few. What belongs to a module goes with it: variables that a graph has captured live as long as the
    graph does.
    """
    keep_last(memory, key, value, count)
    if isinstance(static, weakref.ref):
        weakref.finalize(static(), memory.pop, key, None)


def forget(key: Any) -> None:
    """Let go of a graph that will not run again."""
    _TRACED.pop(key, None)
