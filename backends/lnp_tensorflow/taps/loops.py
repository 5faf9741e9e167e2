"""What the turns of a `tf.while_loop` make of the parameters: recurrent networks use one weight at each of them.

The user's loop is built again with two things beside: a zero added to what each operation with a parameter returns, one
for each turn, whose cotangents are those of all turns; and lists in which the data that the operation saw are kept.
After the loop the operation stands once more in the graph, on the data of all turns: what `rules` read there, with the
turns as further positions of each sample. Nobody runs that one.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import while_v2  # every loop in a graph is built there, and there is no public way to see it

from lnp_tensorflow.state_guard import undisturbed
from lnp_tensorflow.taps.constants import constant, number_of_turns, placed
from lnp_tensorflow.taps.graph import Frontier, Walk, walk
from lnp_tensorflow.taps.rules import RULES

Watching = Callable[..., Any]
_WATCHING: ContextVar[Watching | None] = ContextVar("watching", default=None)
_LOCK = threading.Lock()
_PASSES: list[Any] = []
"""Passes that see loops now, in all threads."""
_LOOP = while_v2.while_loop


@dataclass
class Loops:
    """The loops of one forward pass.

    Attributes
    ----------
    tape:
        Of the pass.
    graph, before:
        In which it is traced, and how many operations that had before.
    parameters, data, samples:
        As `walk` takes them. Of no samples, loops are left as they are.
    roots:
        What the user's code may write to while it is traced.
    taps:
        {name of an operation that stands for those of all turns: the zeros that were added to what they return}.
    loops:
        Names of the operations that are loops with taps: what they make of parameters is known.
    general:
        {parameter: the operation in a loop that has no rules}.
    """

    tape: tf.GradientTape
    graph: Any
    before: int
    parameters: dict[str, str]
    data: list[str]
    samples: int
    roots: tuple
    taps: dict[str, tf.Tensor] = field(default_factory=dict)
    loops: set[str] = field(default_factory=set)
    general: dict[str, str] = field(default_factory=dict)

    def built(self, *args: Any, **options: Any) -> Any:
        """The loop as the user asked for it, with taps where it can have some."""
        if tf.compat.v1.get_default_graph() is not self.graph or not self.samples:
            return _LOOP(*args, **options)
        asked = inspect.signature(_LOOP).bind(*args, **options)
        asked.apply_defaults()
        with contextlib.suppress(Exception):  # what is the user's own error comes again
            loop = _loop(self, asked.arguments)
            if loop is not None:
                return loop.tapped(self)
        return _LOOP(*args, **options)


@contextlib.contextmanager
def watched(loops: Loops) -> Iterator[None]:
    """Where the loops of this thread are built by `loops`."""
    token = _WATCHING.set(loops.built)
    with _LOCK:
        _PASSES.append(loops)
        while_v2.while_loop = _while_loop
    try:
        yield
    finally:
        _WATCHING.reset(token)
        with _LOCK:
            _PASSES[:] = [other for other in _PASSES if other is not loops]
            if not _PASSES:
                while_v2.while_loop = _LOOP


def _while_loop(*args: Any, **options: Any) -> Any:
    return (_WATCHING.get() or _LOOP)(*args, **options)


@dataclass(frozen=True)
class _Loop:
    """A loop that the user has asked for.

    Attributes
    ----------
    asked:
        The arguments of `while_v2.while_loop`.
    body:
        The graph of a turn, traced to see what it does.
    outside:
        {name of a tensor that goes into it: the same before the loop} of what is the same in each turn.
    moving:
        Which of the loop's variables depend on the samples.
    first:
        Which input of the graph is the first of the loop's variables.
    outer:
        What is before the loop.
    turns:
        How many there are at most.
    """

    asked: dict[str, Any]
    body: Any
    outside: dict[str, tf.Tensor]
    moving: frozenset[int]
    first: int
    outer: Walk
    turns: int

    def tapped(self, loops: Loops) -> Any:
        """What the loop returns, built with taps."""
        seen, samples = self._walk(self.body, self.outside, self.first, loops.samples), loops.samples
        for frontier in seen.frontiers:
            if not _readable(frontier, samples):
                loops.general |= dict.fromkeys(self._names(frontier, seen), frontier.op.type)
        read = [frontier for frontier in seen.frontiers if _readable(frontier, samples)]
        data = list({x.ref(): x for frontier in read for x in _data(frontier, seen)}.values())
        zeros = [tf.zeros((self.turns * out.shape[0], *out.shape[1:]), out.dtype) for out in map(_out, read)]
        loops.tape.watch(zeros)
        lists = [_by_turn(zero, self.turns, samples) for zero in zeros]
        kept = [tf.TensorArray(x.dtype, self.turns, element_shape=x.shape) for x in data]
        _, kept, *made = self._run(loops, lists, kept)
        stacked = {x.name: _of_all_turns(a, x.shape, self.turns, samples) for x, a in zip(data, kept, strict=True)}
        standing = placed([f.op for f in read], self.outside | stacked)
        loops.taps |= {op.name: zero for op, zero in zip(standing, zeros, strict=True)}
        loops.loops |= {part.op.name for part in tf.nest.flatten(_flows(made))}
        if not self.asked["return_same_structure"] and len(made) == 1:
            return made[0]
        return type(self.asked["loop_vars"])(made)

    def _run(self, loops: Loops, lists: list, kept: list) -> Any:
        """(turns, arrays of the data of all turns, *the user's variables) after the loop."""
        asked = self.asked

        def body(turn: tf.Tensor, kept: list, *variables: Any) -> tuple:
            graph: Any = tf.compat.v1.get_default_graph()
            made = asked["body"](*variables)
            made = list(made) if isinstance(made, list | tuple) else [made]
            outside = _captured(graph, loops.graph)
            seen = self._walk(graph, outside, 3 + len(kept), loops.samples)
            read = [frontier for frontier in seen.frontiers if _readable(frontier, loops.samples)]
            given = list({x.ref(): x for frontier in read for x in _data(frontier, seen)}.values())
            kept = [array.write(turn, x) for array, x in zip(kept, given, strict=True)]
            for frontier, zeros in zip(read, lists, strict=True):
                made = _added(_out(frontier), zeros.read(turn), made)
            return (turn + 1, kept, *made)

        options = {k: asked[k] for k in ("parallel_iterations", "maximum_iterations", "name", "back_prop")}
        state = (tf.constant(0), kept, *asked["loop_vars"])
        return _LOOP(lambda turn, kept, *variables: asked["cond"](*variables), body, state, **options)

    def _walk(self, graph: Any, outside: dict[str, tf.Tensor], first: int, samples: int) -> Walk:
        """What a turn makes of the parameters."""
        parameters = {name: outer.name for name, outer in outside.items() if outer.name in self.outer.origins}
        data = [name for name, outer in outside.items() if outer.name in self.outer.data]
        data += [graph.inputs[first + number].name for number in self.moving]
        return walk(graph.get_operations(), parameters, data, samples)

    def _names(self, frontier: Frontier, seen: Walk) -> set[str]:
        """The parameters that an operation in the loop depends on."""
        outer = {name for place in frontier.places for name in seen.origins[frontier.op.inputs[place].name]}
        return {name for tensor in outer for name in self.outer.origins[tensor]}


def _loop(loops: Loops, asked: dict[str, Any]) -> _Loop | None:
    """The loop, if taps can be added to it and it uses parameters."""
    variables = asked["loop_vars"]
    if asked["shape_invariants"] is not None or type(variables) not in (list, tuple):
        return None
    code = (*loops.roots, asked["body"], asked["cond"])
    with loops.tape.stop_recording(), undisturbed(*code):  # a tape has loops built in functions of their own
        op, given = _traced(asked)
    if op is None:
        return None
    made = loops.graph.get_operations()[loops.before :]
    outer = walk(made, loops.parameters, loops.data, loops.samples, loops.loops)
    body, first = op._body_graph, 2
    count = len(tf.nest.flatten(_flows(variables), expand_composites=True))
    fixed = [i for i, (x, y) in enumerate(zip(body.inputs, body.outputs, strict=True)) if x is y]
    outside = {body.inputs[i].name: given[i] for i in fixed}
    changing = [i - first for i in range(first, first + count) if i not in fixed]
    if any(given[first + i].name in outer.origins for i in changing):
        return None
    moving = {i for i in changing if given[first + i].name in outer.data}
    turns = _turns(asked, op, given)
    if turns is None:
        return None
    while True:
        loop = _Loop(asked, body, outside, frozenset(moving), first, outer, turns)
        seen = loop._walk(body, outside, first, loops.samples)
        if any(body.outputs[first + i].name in seen.origins for i in changing):
            return None
        more = {i for i in changing if body.outputs[first + i].name in seen.data}
        if more <= moving:
            return loop if seen.frontiers else None
        moving |= more


def _traced(asked: dict[str, Any]) -> tuple[Any, list[tf.Tensor]]:
    """The loop as an operation in a graph that is thrown away, and what goes into it: as outside, where it is there."""
    op: list[Any] = []

    def once() -> None:
        before = len(tf.compat.v1.get_default_graph().get_operations())
        _LOOP(**asked)
        op[:] = [op for op in tf.compat.v1.get_default_graph().get_operations()[before:] if op.type in LOOPS]

    outer: Any = tf.compat.v1.get_default_graph()
    graph = tf.function(once, autograph=False).get_concrete_function().graph
    outside = _captured(graph, outer)
    return (op[0], [outside.get(x.name, x) for x in op[0].inputs]) if len(op) == 1 else (None, [])


LOOPS = {"While", "StatelessWhile"}


def _captured(graph: Any, outer: Any) -> dict[str, tf.Tensor]:
    """{name of an input of a graph: the tensor of the graph around it}."""
    eager = [given for given, _ in graph.captures if not hasattr(given, "graph")]  # these are captured past it
    inside = {id(given): outer.capture(given) for given in eager}
    return {inner.name: inside.get(id(given), given) for given, inner in graph.captures}


def _turns(asked: dict[str, Any], op: Any, given: list[tf.Tensor]) -> int | None:
    """How many turns a loop has at most, if that is known before it runs."""
    if asked["maximum_iterations"] is None:
        return number_of_turns(op, given)
    most = constant(given[1])
    return None if most is None else int(most)


def _readable(frontier: Frontier, samples: int) -> bool:
    """Whether an operation in a loop has rules, which read it with the samples of all turns along its first axis."""
    op = frontier.op
    if op.type not in RULES or frontier.expanding or len(op.outputs) != 1:
        return False
    out = op.outputs[0].shape
    if not out.is_fully_defined() or not out.rank or out[0] % samples:
        return False
    others = [x.shape for place, x in enumerate(op.inputs) if place not in frontier.places and x.shape.rank]
    return all(shape.is_fully_defined() and shape[0] == out[0] for shape in others) or "Gather" in op.type


def _data(frontier: Frontier, seen: Walk) -> list[tf.Tensor]:
    """What the operation takes of the samples."""
    return [x for x in frontier.op.inputs if x.name in seen.data]


def _out(frontier: Frontier) -> tf.Tensor:
    return frontier.op.outputs[0]


def _added(out: tf.Tensor, zero: tf.Tensor, made: list) -> list:
    """What a turn returns, with a zero added to the output of one of its operations."""
    users = list(out.consumers())
    total = out + tf.ensure_shape(zero, out.shape)
    for user in users:
        for place, given in enumerate(user.inputs):
            if given is out:
                user._update_input(place, total)
    return tf.nest.map_structure(lambda part: total if part is out else part, made)


def _by_turn(zeros: tf.Tensor, turns: int, samples: int) -> tf.TensorArray:
    """Zeros (N * T * S, ...) as T arrays (N * S, ...)."""
    rest = zeros.shape[1:]
    split = tf.reshape(zeros, (samples, turns, -1, *rest))
    by_turn = tf.transpose(split, (1, 0, *range(2, split.shape.rank)))
    rows = zeros.shape[0] // turns
    array = tf.TensorArray(zeros.dtype, turns, element_shape=(rows, *rest), clear_after_read=False)
    return array.unstack(tf.reshape(by_turn, (turns, rows, *rest)))


def _of_all_turns(array: tf.TensorArray, shape: tf.TensorShape, turns: int, samples: int) -> tf.Tensor:
    """(N * T * S, ...) of T arrays (N * S, ...)."""
    stacked = tf.reshape(array.stack(), (turns, samples, -1, *shape[1:]))
    rows = turns * shape[0]
    return tf.reshape(tf.transpose(stacked, (1, 0, *range(2, stacked.shape.rank))), (rows, *shape[1:]))


def _flows(tree: Any) -> Any:
    """The structure with the tensors that stand for arrays."""
    return tf.nest.map_structure(lambda part: part.flow if isinstance(part, tf.TensorArray) else part, tree)
