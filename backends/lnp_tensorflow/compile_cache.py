"""Traced once per model structure, computation and shapes."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from lnp.contract import validation
from lnp.contract.options import Options
from lnp.contract.trees import leaves, map_leaves
from lnp.per_sample.self_check import BENT, Verdict, failing, found_interacting, moved
from lnp_tensorflow import array_namespace
from lnp_tensorflow.effects import calls_python, written
from lnp_tensorflow.fallback import FATAL
from lnp_tensorflow.model import Arrays, Structure
from lnp_tensorflow.record import record
from lnp_tensorflow.replay import Forward, forward
from lnp_tensorflow.self_check import Checked, Comparison, compared
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
    checked: tuple[Checked, ...] = ()
    loss_state: tuple = ()

    def jointly(self, reason: str) -> Plan:
        """The same with no samples taken apart, and why."""
        return replace(self, options=replace(self.options, split=False), notes=(reason,), checked=())


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
        (arrays, batches' tensors, seed, number of the measurement, operands) -> every number of the answer in one float64 vector, and its arrays.
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
_CHECKED: OrderedDict[Any, Checked] = OrderedDict()
_TURNS = itertools.count()
"""Numbers of measurements. The samples that are looked at are drawn from them, never from the user's random state."""
CONVERTED: OrderedDict[Any, None] = OrderedDict()
"""Structures that need AutoGraph."""


def measure(
    plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, turn: Any, operands: dict[str, Any]
) -> tuple[Answer, list[Forward]]:
    """Linearise the model on each batch and compute. Each pass puts back what the model and the loss write to."""
    given = [validation.unpack(pair) for pair in pairs]
    runs = [forward(plan.structure, tree, arrays, inputs) for inputs, _ in given]
    records = [
        record(run, *pair, seed, plan.options, plan.notes, checked, turn)
        for run, pair, checked in zip(runs, given, plan.checked or [None] * len(runs), strict=True)
    ]
    try:
        result = plan.computation(*records, **operands)
    except FATAL:
        raise
    except Exception as error:
        raise (InParts(error) if plan.options.split and plan.options.microbatch is None else error) from error
    checks = [check for lin in records for check in lin.violations]
    coupled = tuple(lin.coupled() for lin in records if lin.coupled is not None)
    return Answer(result, tuple(flag for flag, _ in checks), coupled, tuple(message for _, message in checks)), runs


def run(plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]) -> Answer:
    """The answer with numbers, in one transfer from the device.

    What has once been compared with single samples is remembered. Samples that interact are not taken apart; where they
    are found to do so in this measurement, it is made again.
    """
    key, given = _key(plan, arrays, pairs, operands), (tree, arrays, pairs, seed, operands)
    if not plan.options.split:
        return _run((plan, *key[1:]), measure, plan, *given)
    models = [_Model(plan, tree, arrays, validation.unpack(pair)[0]) for pair in pairs]
    checked = tuple(model.checked() for model in models)
    if any(found.verdict.bent for found in checked):
        raise ValueError(BENT)
    reason = next((found.verdict.reason for found in checked if found.verdict.reason), "")
    apart, refused = replace(plan, checked=checked), Answer(None, (), (True,))
    if reason:
        return refused if plan.options.microbatch is not None else _jointly(plan, reason, key, given)
    try:
        answer = _run((apart, *key[1:]), measure, apart, *given)
    except (InParts, tf.errors.OpError) as error:
        if plan.options.microbatch is not None or isinstance(error, FATAL):
            raise
        return _jointly(plan, failing(error.args[0] if isinstance(error, InParts) else error), key, given)
    for model, interacting in zip(models, answer.coupled, strict=True):
        if interacting:
            model.remember(Checked(Verdict(reason=found_interacting())))
    if any(answer.coupled):
        return refused if plan.options.microbatch is not None else _jointly(plan, found_interacting(), key, given)
    return answer


def _jointly(plan: Plan, reason: str, key: Any, given: tuple) -> Answer:
    """The answer with no samples taken apart. Where it is the batch itself that fails, its error is raised again."""
    plan = plan.jointly(reason)
    return _run((plan, *key[1:]), measure, plan, *given)


def run_inside(plan: Plan, tree: Any, arrays: Arrays, pairs: tuple, seed: Any, operands: dict[str, Any]) -> Any:
    """The result in the graph around it, as tensors. Whenever that runs, the batch is compared with single samples."""
    given = (tree, arrays, pairs, seed, None, operands)
    try:
        return separately(lambda: measure(plan, *given)[0].result)
    except InParts as error:
        joint = plan.jointly(failing(error.args[0]))
        return separately(lambda: measure(joint, *given)[0].result)


class _Model:
    """A model on inputs of some shapes, whatever is measured, and how its samples can be taken apart."""

    def __init__(self, plan: Plan, tree: Any, arrays: Arrays, inputs: Any) -> None:
        options = Options(microbatch=plan.options.microbatch)
        self._plan, self._given = Plan(_judge, plan.structure, options, plan.jit_compile), (tree, arrays, (inputs,))
        self._key = _key(self._plan, arrays, inputs, {})

    def checked(self) -> Checked:
        """What comparing the batch with single samples shows: at its parameters, and at others."""
        if self._key in _CHECKED:
            return _CHECKED[self._key]
        try:
            seen: Comparison = self._compared(moving=False)
        except FATAL:
            raise
        except tf.errors.OpError as error:  # from single samples, or from the batch, which will be run again
            return Checked(Verdict(failing(error), sure=False))
        found, verdict = Checked(seen.verdict(), seen.expanded), seen.verdict()
        if verdict.sure and not verdict.reason and not verdict.bent:
            found = replace(found, verdict=self._at_other_parameters(verdict))
        if verdict.sure:
            self.remember(found)
        return found

    def remember(self, found: Checked) -> None:
        """For measurements to come."""
        remember(_CHECKED, self._key, found)
        _forget_with(self._plan.structure.static, _CHECKED, self._key)

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
        return _run(self._key, _judge, self._plan, *self._given, 0, {}, moving=moving).result


def _judge(
    plan: Plan, tree: Any, arrays: Arrays, given: tuple, seed: Any, turn: Any, operands: dict[str, Any]
) -> tuple[Answer, list[Forward]]:
    """Compare a batch with single samples."""
    (inputs,) = given
    run = forward(plan.structure, tree, arrays, inputs)
    return Answer(compared(run, inputs, plan.options.microbatch), (), ()), [run]


def _run(
    key: Any,
    body: Callable,
    plan: Plan,
    tree: Any,
    arrays: Arrays,
    pairs: tuple,
    seed: Any,
    operands: dict[str, Any],
    moving: bool = False,
) -> Answer:
    """The answer of a traced body with numbers; with `moving` at other values of the trained parameters."""
    tensors = [leaf for leaf in leaves(pairs) if tf.is_tensor(leaf)]
    turn = tf.constant(next(_TURNS), tf.int64)
    dynamic = (arrays, tensors, tf.cast(seed, tf.int64), turn, operands)
    traced = _TRACED.get(key)
    if traced is None:
        traced, lasting = _trace(body, plan, tree, pairs, dynamic)
        if lasting:
            remember(_TRACED, key, traced)
            _forget_with(plan.structure.static, _TRACED, key)
    before = [(variable, variable.read_value()) for variable in traced.written]
    moved_to = _moved(plan.structure, arrays, traced.function) if moving else contextlib.nullcontext(arrays)
    try:
        with (
            undisturbed(*plan.structure.roots, plan.options.loss) if traced.calls else contextlib.nullcontext(),
            moved_to as arrays,
        ):
            packed, *made = traced.function(arrays, *dynamic[1:])
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


def _trace(body: Callable, plan: Plan, tree: Any, pairs: tuple, dynamic: tuple) -> tuple[Traced, bool]:
    """The measurement as a graph, and whether that is one for later measurements too."""
    seen: list[Any] = []

    def graph(
        arrays: Arrays, tensors: list, seed: tf.Tensor, turn: tf.Tensor, operands: dict[str, Any]
    ) -> list[tf.Tensor]:
        given = iter(tensors)
        filled = map_leaves(lambda leaf: next(given) if tf.is_tensor(leaf) else leaf, pairs)
        answer, runs = body(plan, tree, arrays, filled, seed, turn, operands)
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
