"""Tensor-parallel models: what was measured with whole weights is held against the model as it is.

`parallelize_module` splits single operations over processes that all have the same batch. lnp runs such a network with
whole weights, as one process would, so that samples can be taken apart by the same rules. Code that counts on its part,
such as on a number of heads, might then compute something else. So the model itself runs once more, split as in
training, forward and backward in all processes at a time: outputs and gradient have to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lnp.contract.linearization import Linearization, unit
from lnp.contract.options import Options
from lnp.contract.trees import map_leaves
from lnp_torch.collectives import with_others
from lnp_torch.dtensors import is_sharded
from lnp_torch.group import ShardedProcesses
from lnp_torch.model import Program
from lnp_torch.on_a_copy import on_a_copy
from lnp_torch.outputs import dot, flatten, widened
from lnp_torch.own_loss import split_batch
from lnp_torch.record import first_loss, graph_gradients
from lnp_torch.refusals import SPLIT
from lnp_torch.taken_apart import tolerance_of


def check_against_model(
    processes: ShardedProcesses, model: Any, batch: Any, options: Options, lin: Linearization
) -> None:
    """Raise ValueError, in every process, if the model as it is has other outputs or another gradient than the network
    with whole weights, whose record is given.

    Every process has to call it at once.
    """

    def compared(own: Program) -> tuple[list[list[float]], float]:
        call = own.call
        whole = replace(own, call=lambda parameters, inputs: map_leaves(_whole, call(parameters, inputs)))
        return _differences(whole, processes.summed_gradient, batch, options, lin)

    with _as_it_is(processes):
        (found, tolerance), prepared = on_a_copy(model, options, compared)
    prepared.replica.clear()
    every = processes.exchange("compared", found)
    for name, parts in zip(("outputs", "gradient"), zip(*every, strict=True), strict=True):
        apart, size = (sum(one[place] for one in parts) ** 0.5 for place in (0, 1))
        if math.isfinite(size) and not apart <= tolerance * size:  # a model that has diverged has no numbers anyway
            share = apart / size if size else float("inf")
            raise ValueError(SPLIT.format(f"its {name} differ from its own by {share:.1e} of their size"))


def _differences(
    own: Program, summed: dict[str, torch.Tensor], batch: Any, options: Options, lin: Linearization
) -> tuple[list[list[float]], float]:
    """[||f' - f||^2, ||f||^2] and the same of this process's part of the gradient, of the model as it is; a tolerance.

    Gradients are those of g / m, with m the largest entry of the loss gradient.
    """
    inputs, targets = split_batch(batch, options.loss)
    loss, outputs, *_ = first_loss(
        own, inputs, targets, replace(options, split=False, microbatch=None, population=False)
    )
    flat = flatten([part.detach() for part in outputs.parts])
    if flat.shape != lin.outputs.shape:
        raise ValueError(SPLIT.format(f"its outputs are of shape {tuple(lin.outputs.shape)}, not {tuple(flat.shape)}"))
    g, _ = unit(lin.xp, loss.gradient)
    gradient = graph_gradients(outputs.parts, own.parameters)(g)
    pairs = [(widened(_part(gradient[name], own.parameters[name])), total) for name, total in summed.items()]
    squares = [dot(flat - lin.outputs, flat - lin.outputs), dot(lin.outputs, lin.outputs)]
    squares += [sum(dot(a - b, a - b) for a, b in pairs), sum(dot(b, b) for _, b in pairs)]
    numbers = torch.stack(squares).tolist()
    return [numbers[:2], numbers[2:]], tolerance_of(own, outputs.parts)


@contextmanager
def _as_it_is(processes: ShardedProcesses) -> Iterator[None]:
    """Programs that are made inside are split over the processes, as in training."""
    processes.gathering.as_it_is = True
    try:
        with with_others():
            yield
    finally:
        processes.gathering.as_it_is = False


def _whole(leaf: Any) -> Any:
    """An output that no process has whole, gathered."""
    return leaf.full_tensor() if is_sharded(leaf) else leaf


def _part(gradient: Any, parameter: Any) -> torch.Tensor:
    """A gradient as this process holds the parameter."""
    if not is_sharded(parameter):
        return _whole(gradient)
    return gradient.redistribute(parameter.device_mesh, parameter.placements).to_local()
