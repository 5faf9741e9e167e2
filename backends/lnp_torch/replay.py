"""Forward passes of one measurement: the first fixes the randomness, all others repeat it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch

from lnp.contract.trees import leaves, map_leaves
from lnp.per_sample.verdict import FROZEN_DIFFERS
from lnp.state.preserve import PLAIN
from lnp_torch.clones import cast
from lnp_torch.draws import Record, rows
from lnp_torch.model import Parameters, Program
from lnp_torch.outputs import Outputs
from lnp_torch.replay_modes import Frozen
from lnp_torch.replica import Replica
from lnp_torch.state_guard import RandomState, same_randomness
from lnp_torch.taps.function_mode import Taps

Part: TypeAlias = slice | torch.Tensor
"""Which samples: a slice, or their indices."""


@dataclass(frozen=True)
class Passes:
    """A program on one batch, as the same function at every call.

    Attributes
    ----------
    program:
        The model.
    inputs:
        The batch's inputs.
    samples:
        N.
    record:
        Dropout masks, batch statistics and other random numbers of the first pass.
    state, after:
        Random states that the first pass began and ended with.
    statistics:
        Whether batch normalisation keeps the first pass's statistics.
    attention:
        Whether the masks of fused attention were recorded too.
    explained:
        Whether all that PyTorch's generators drew is recorded.
    over:
        Whether each input runs over the samples along its first axis, found out on the whole batch.
    hooked:
        Whether hooks were put on activations.
    measured:
        Which of the outputs are measured, see `Outputs`.
    """

    program: Program
    inputs: Any
    samples: int
    record: Record
    state: RandomState
    after: RandomState
    statistics: bool
    attention: bool = True
    explained: bool = True
    over: tuple[bool, ...] = ()
    hooked: bool = False
    measured: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.over:
            over = (
                isinstance(x, torch.Tensor) and x.ndim > 0 and x.size(0) == self.samples for x in leaves(self.inputs)
            )
            object.__setattr__(self, "over", tuple(over))

    def replayed(self, record: Record) -> Frozen:
        """The mode in which the network repeats what was recorded."""
        return Frozen(self.statistics, self.program, record, self.attention)

    def called(self, parameters: Parameters, inputs: Any) -> Outputs:
        """The outputs of one call of the program."""
        return Outputs(self.program.call(parameters, inputs), self.measured)

    def whole(self, parameters: Parameters) -> Outputs:
        """The whole batch at other parameters."""
        with same_randomness(self.state), self.replayed(self.record):
            return self.called(parameters, copied(self.inputs))

    def part(self, parameters: Parameters, part: Part) -> Outputs:
        """Some of the samples.

        Raises
        ------
        RuntimeError
            If the network drew other numbers for them than for the whole batch.
        """
        some = self.some(part)
        with same_randomness(self.state):
            with self.replayed(some.record):
                outputs = self.called(parameters, copied(some.inputs))
            self.check_draws()
        return outputs

    def check_draws(self) -> None:
        """See to it that a pass over some of the samples drew as many numbers as the batch, by whatever drew them."""
        if not RandomState(self.after.devices).same(self.after):
            raise RuntimeError("it draws other random numbers for some of the samples than for all of them")

    def some(self, part: Part) -> Passes:
        """The same with some of the samples."""
        over = iter(self.over)
        inputs = map_leaves(lambda leaf: leaf[part] if next(over) else leaf, self.inputs)
        count = len(range(*part.indices(self.samples))) if isinstance(part, slice) else len(part)
        return replace(self, inputs=inputs, samples=count, record=rows(self.record, self.samples, part))

    def in_float64(self) -> Passes:
        """The same function in float64, see `Program.in_float64`."""
        double = partial(cast, dtype=torch.float64)
        record = [(kind, map_leaves(double, value)) for kind, value in self.record]
        inputs = map_leaves(double, self.inputs)
        return replace(self, program=self.program.in_float64(), inputs=inputs, record=record)

    def restricted(self, names: Iterable[str]) -> Passes:
        """The same with some of the parameters to differentiate."""
        return replace(self, program=self.program.restricted(names))

    def own_statistics(self) -> frozenset[int]:
        """Numbers of the batch normalisations whose statistics are single samples' own.

        A pass over fewer samples tells: theirs are as many fewer, while those of a batch are as many as before.
        """
        whole, few = _lengths(self.record), min(2, self.samples - 1)
        if few < 1 or not self.divisible or not any(length % self.samples == 0 for length in whole if length):
            return frozenset()
        mode, some = Frozen(True, self.program), self.some(slice(0, few))
        try:
            with same_randomness(self.state), mode:
                without_graph(lambda p: self.program.call(p, copied(some.inputs)), self.program.parameters)
        except Exception:  # a network that does not run on a part of its batch
            return frozenset()
        pairs = zip(whole, _lengths(mode.record), strict=False)
        return frozenset(i for i, (a, b) in enumerate(pairs) if a and b and a != b and a * few == b * self.samples)

    @property
    def divisible(self) -> bool:
        """Whether any input does, so that samples can be taken apart."""
        return any(self.over)


def _lengths(record: Record) -> list[int]:
    """How many means each batch normalisation has, 0 where none are held."""
    found: list[int] = []
    for kind, value in record:
        if kind == "no batch's":
            found.append(0)
        elif kind == "statistics":
            found[-1] = len(value[0])
    return found


Result = TypeVar("Result")


def without_graph(run: Callable[[Parameters], Result], parameters: Parameters) -> Result:
    """What a run at these parameters returns, without a graph that leads to them.

    Gradients stay on, for a network may differentiate inside: in its inputs it can, else it runs with such a graph.
    """
    try:
        return run({name: p.detach() for name, p in parameters.items()})
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return run({name: p.detach().requires_grad_() for name, p in parameters.items()})


def copied(inputs: Any) -> Any:
    """The same inputs in new memory: a network may write to what it is given, and later passes need it as it was."""
    return map_leaves(_copied, inputs)


def _copied(leaf: Any) -> Any:
    """An input in new memory; what is no tensor is copied with all that it holds."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    if type(leaf) in PLAIN:
        return leaf
    replica = Replica((leaf,))
    replica.rewind({})
    return replica.roots[0]


def first_pass(
    program: Program, inputs: Any, statistics: bool, keep_graph: bool, watching: Callable[[], AbstractContextManager],
    own: frozenset[int] | None = None,
) -> tuple[Outputs, Callable[[Outputs], Passes], AbstractContextManager, tuple[str, ...]]:  # fmt: skip
    """The outputs of the whole batch, the passes that repeat it once it is known which of them are measured, what
    watched, and notes.

    Batch normalisation is not held at its statistics where the network would compute something else with them, nor
    where they are single samples' own; which these are (`own`) is found out.
    """
    state, watch = RandomState([program.device]), watching()
    if isinstance(watch, Taps):
        watch.begin_with(program.replica)

    def run(parameters: Parameters) -> tuple[Outputs, Frozen]:
        state.restore()
        with watch, Frozen(statistics, program, own=own or frozenset()) as mode:
            return Outputs(program.call(parameters, copied(inputs))), mode

    outputs, mode = run(program.parameters) if keep_graph else without_graph(run, program.parameters)
    if mode.agree and not bool(torch.stack(mode.agree).all()):
        state.restore()
        return *first_pass(program, inputs, False, keep_graph, watching)[:3], (FROZEN_DIFFERS,)
    after, explained = RandomState([program.device]), mode.explained

    def repeat(measured: Outputs) -> Passes:
        return Passes(
            program, inputs, measured.samples, mode.record, state, after, statistics,
            explained=explained, hooked=mode.hooked, measured=measured.measured,
        )  # fmt: skip

    sized = [place for place, leaf in enumerate(outputs.candidates) if leaf.ndim]  # a loss of the model's own is not
    asked = own is None and any(_lengths(mode.record)) and sized
    found = repeat(replace(outputs, measured=(sized[0],))).own_statistics() if asked else None
    if found:
        state.restore()
        return first_pass(program, inputs, statistics, keep_graph, watching, found)
    return outputs, repeat, watch, ()
