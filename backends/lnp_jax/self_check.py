"""The self-check's operations in JAX, and its verdicts, remembered for each structure and shapes."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lnp.contract import validation
from lnp.contract.linearization import Vector, unit
from lnp.contract.options import Options
from lnp.per_sample import self_check
from lnp.per_sample.self_check import Alone, Differences, Pulled
from lnp.per_sample.verdict import Verdict, found_interacting
from lnp_jax import fallback
from lnp_jax.bound_model import Network, bind
from lnp_jax.model import Arrays, Structure
from lnp_jax.outputs import flatten
from lnp_jax.processes import fetched
from lnp_jax.taps.backward_pass import tap

REMEMBERED = 256
_VERDICTS: OrderedDict[tuple, Verdict] = OrderedDict()

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
"""XLA's options to compile quickly what runs seldom: 2.3 s in the place of 7.6 s for a small ResNet's comparison."""
NOT_ASKED = Verdict(sure=False)
"""Nothing was compared: what is measured is made of the gradient that training follows, whatever its backward pass."""

jax.tree_util.register_dataclass(Differences, [field.name for field in fields(Differences)], [])


class WholeBatch:
    """The operations of a batch whose samples cannot be run apart."""

    xp = jnp

    def __init__(self, net: Network) -> None:
        self.custom_backward = net.custom_backward
        self.outputs, self._pullback = jax.vjp(net.batch_outputs, dict(net.parameters))

    def pull(self, v: jax.Array) -> Pulled:
        """One backward pass of the whole batch."""
        return Pulled(self._pullback(v)[0], {})


class Apart(WholeBatch):
    """The operations of a batch, and of its samples on their own."""

    def __init__(self, net: Network) -> None:
        super().__init__(net)
        self._net, self._taps = net, tap(net, net.split.samples, {})
        self._outputs_alone, self._pull_samples = self._taps.forward(net.split.rows)

    def pull(self, v: jax.Array) -> Pulled:
        """One backward pass of the whole batch, and one of its samples with taps."""
        norms, general = self._pull_samples(v)[1], self._taps.plan.general
        ruled = {name: squares for name, squares in norms.items() if name not in general}
        return Pulled(super().pull(v).gradient, ruled, general)

    def outputs_alone(self) -> jax.Array:
        """(N, K) outputs of all samples, each run by itself."""
        return self._outputs_alone

    def alone(self, index: Sequence[int], v: jax.Array) -> Alone:
        """Single samples one after the other, with one gradient in memory at a time."""
        of_one = fallback.single(self._net.function, self._net.split)
        parameters = dict(self._net.parameters)

        def step(total: Mapping, now: tuple) -> tuple:
            rows, v = now
            outputs, pullback = jax.vjp(lambda p: of_one(p, rows), parameters)
            (gradient,) = pullback(v)
            squares = {name: jnp.sum(fallback.wide(u) ** 2) for name, u in gradient.items()}
            return jax.tree.map(jnp.add, total, gradient), (outputs, squares)

        zeros = {name: jnp.zeros_like(p) for name, p in parameters.items()}
        rows = [row[np.asarray(index)] for row in self._net.split.rows]
        total, (outputs, squares) = jax.lax.scan(step, zeros, (rows, v))
        return Alone(outputs, total, squares)


def find_verdict(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> Verdict:
    """Whether the samples of this model, at these shapes, can be taken apart; found out once, and remembered."""
    remembered = known_verdict(structure, arrays, batch, options)
    if remembered is not None:
        return remembered
    inputs, how, key = _case(structure, arrays, batch, options)
    found, reason = None, ""
    if options.split:
        found, reason = first_that_runs(lambda: _compared(structure, arrays, inputs, how))
    if found is None:
        about = _about(structure, arrays, inputs, how)
        bend = float(fetched(jax.jit(partial(_bend, structure, how))(arrays, inputs))) if about.custom_backward else 0.0
        found = Verdict(reason, bent=bend > about.tolerance)
    if found.sure:
        _keep(_VERDICTS, key, found)
    return found


def remember_interacting(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> Verdict:
    """The verdict on samples that were found to interact when they were measured. It holds from then on: what couples
    them may be closed again in the next batch's outputs, and still be open in its gradients.
    """
    verdict = Verdict(found_interacting())
    _keep(_VERDICTS, _case(structure, arrays, batch, options)[2], verdict)
    return verdict


def known_verdict(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> Verdict | None:
    """What was found out before about this model at these shapes, or None. Needs no values, so that it is there for
    what is traced too.
    """
    key = _case(structure, arrays, batch, options)[2]
    if key not in _VERDICTS:
        return None
    _VERDICTS.move_to_end(key)
    return _VERDICTS[key]


def traced(arrays: Any) -> bool:
    """Whether this runs inside a compiled function: some arrays have no value, or what is made of them has none."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in (*jax.tree.leaves(arrays), jnp.zeros(())))


def first_that_runs(way: Callable[[], Any]) -> tuple[Any, str]:
    """(What it returns, ""), or (None, why it failed), whatever the user's function raised on a part of its batch.

    That the whole batch runs has been seen before: an error that is its own has been raised by then.
    """

    def attempt() -> Any:
        try:
            return way()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise MemoryError(str(error)) from error
            raise

    return self_check.first_that_runs([attempt], (MemoryError,))


def check_single_samples(net: Network) -> None:
    """Run the network on one sample and on two, without numbers.

    Raises
    ------
    ValueError
        If no input runs over samples, or their outputs have other shapes than in the batch; and whatever it raises.
    """
    samples, parameters = net.split.samples, dict(net.parameters)
    if not net.split.possible:
        raise ValueError(f"no input runs over the {samples} samples along its first axis")
    of_one = fallback.single(net.function, net.split)

    def of_few(p: Vector, rows: list) -> jax.Array:
        return flatten(net.function(p, net.split.inputs(rows)))

    found = {1: jax.eval_shape(jax.vmap(of_one, (None, 0)), parameters, net.split.rows).shape[1:]}
    for few in {1, min(2, samples)}:
        made = jax.eval_shape(of_few, parameters, [row[:few] for row in net.split.rows]).shape
        found[few] = made[1:] if made[0] == few else made
    expected = jax.eval_shape(flatten, net.tree).shape[1:]
    for few, shape in found.items():
        if shape != expected:
            raise ValueError(f"{few} of them have outputs of shape {shape} instead of {expected}")


def pair_differs(net: Network, outputs: jax.Array) -> jax.Array:
    """Whether two samples of the batch, compared as a batch of their own, interact or have wrong rules. Shape ()."""
    index = np.asarray([0, net.split.samples // 2][: net.split.samples])
    pair = Apart(net.some(index, len(index)))
    differences, _ = self_check.compare(pair)
    beside_others = self_check.look(jnp, outputs[index], pair.outputs) > net.tolerance
    return beside_others | differences.exceed(jnp, net.tolerance)


def bends(net: Network, v: jax.Array, g: jax.Array, drawn: jax.Array) -> jax.Array:
    """Whether the backward pass of one sample is not linear, shape (); which one, the bits of `drawn` say. And that of
    the sample with the largest loss gradient, which a clip reaches before all others.
    """
    bits = jax.lax.bitcast_convert_type(drawn.astype(jnp.float32), jnp.uint32)
    sample = (bits % net.split.samples).astype(jnp.int32)
    pull, (u, magnitude) = _pull_of(net, sample), unit(jnp, g)
    at_random = self_check.bend_at(jnp, pull, v[sample], pull(v[sample]), (self_check.SMALLER,))
    largest = jnp.argmax(jnp.max(jnp.abs(u), axis=1))
    at_largest = self_check.bend_of_loss(jnp, _pull_of(net, largest), u[largest], magnitude)
    return jnp.maximum(at_random, at_largest) > net.tolerance


def _pull_of(net: Network, sample: jax.Array) -> Callable[[jax.Array], Vector]:
    """Cotangent (K,) of one sample -> its gradient."""
    of_one, rows = fallback.single(net.function, net.split), [row[sample] for row in net.split.rows]
    outputs, pullback = jax.vjp(lambda p: of_one(p, rows), dict(net.parameters))
    return lambda v: pullback(v.astype(outputs.dtype))[0]


@jax.tree_util.register_static
@dataclass(frozen=True)
class _About:
    """What is known of a network when it is traced.

    Attributes
    ----------
    tolerance, custom_backward:
        As of `Network`.
    missing:
        (parameter without rules, why) pairs.
    """

    tolerance: float
    custom_backward: bool
    missing: tuple[tuple[str, str], ...] = ()


def _about(structure: Structure, arrays: Arrays, inputs: Any, how: Options) -> _About:
    """The same, of a network whose samples are not compared."""

    def bound(arrays: Arrays, inputs: Any) -> _About:
        net = bind(structure, arrays, inputs, how)
        return _About(net.tolerance, net.custom_backward)

    return jax.eval_shape(bound, arrays, inputs)


def _compared(structure: Structure, arrays: Arrays, inputs: Any, how: Options) -> Verdict:
    """The verdict of comparing the batch with single samples, at the parameters as they are and at moved ones."""
    found, differences = [], _quickly_compiled(partial(_differences, structure, how))
    for at in (arrays, {**arrays, **_moved({name: arrays[name] for name in structure.trained})}):
        apart, about = differences(at, inputs)
        found.append(fetched(apart).verdict(about.tolerance, dict(about.missing)))
    return found[0].joined(found[1])


def _moved(parameters: Vector) -> Vector:
    """Other parameters, by a program of its own: where devices share the work, XLA computes in several places what a
    program makes of them, and rounds it there in different ways.
    """
    return _quickly_compiled(partial(self_check.moved, jnp))(parameters)


def _differences(structure: Structure, options: Options, arrays: Arrays, inputs: Any) -> tuple[Differences, _About]:
    """What the core's comparison finds; with micro-batches, on one of them."""
    net = bind(structure, arrays, inputs, options)
    check_single_samples(net)
    if options.microbatch is not None:
        size = min(max(2, options.microbatch), net.split.samples)
        net = net.some(np.arange(size), size)
    found, missing = self_check.compare(Apart(net))
    return found, _About(net.tolerance, net.custom_backward, tuple(missing.items()))


def _quickly_compiled(function: Callable) -> Callable:
    """What a comparison runs once or twice and never again: on a CPU compiling it takes longer by far, and most of that
    goes into making it run faster. Its code goes with what is returned.
    """
    known = _known_of_quick(jax.default_backend())
    return jax.jit(function, compiler_options=known) if known else jax.jit(function)


@cache
def _known_of_quick(platform: str) -> dict[str, Any]:
    """Which of these options this release of JAX takes."""
    known: dict[str, Any] = {}
    if platform == "cpu" and "compiler_options" in inspect.signature(jax.jit).parameters:
        for name, value in QUICK.items():
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.jit(jnp.zeros_like, compiler_options={name: value})(0.0)
                known[name] = value
    return known


def _bend(structure: Structure, options: Options, arrays: Arrays, inputs: Any) -> jax.Array:
    """How far the backward pass of the whole batch is from linear, shape ()."""
    return self_check.bend_of_batch(WholeBatch(bind(structure, arrays, inputs, options)))


def _keep(found: OrderedDict, key: tuple, value: Any) -> None:
    """Remember the latest."""
    found[key] = value
    while len(found) > REMEMBERED:
        found.popitem(last=False)


def _case(structure: Structure, arrays: Arrays, batch: Any, options: Options) -> tuple[Any, Options, tuple]:
    """(inputs, the options that matter, what the verdict is found by)."""
    inputs, _ = validation.unpack(batch)
    how = Options(microbatch=options.microbatch, batch_statistics=options.batch_statistics, split=options.split)
    leaves, treedef = jax.tree.flatten((arrays, inputs))
    return inputs, how, (structure, how, treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
