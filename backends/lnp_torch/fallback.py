"""Gradients of single samples, or of groups of them, one chunk at a time: nothing of size samples x parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from lnp.contract.trees import leaves, map_leaves
from lnp_torch.draws import by_sample
from lnp_torch.float16 import at_scale_one
from lnp_torch.model import Parameters
from lnp_torch.outputs import flatten, read, split, widened
from lnp_torch.replay import Passes, copied
from lnp_torch.state_guard import same_randomness

BUDGET = 2**28
"""Bytes of per-sample gradients that are in memory at a time."""

Chunk = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Outputs (C, K) of C samples or groups, and {name: (C, ...) gradients}."""
Pull = Callable[[torch.Tensor], Iterator[Chunk]]
"""v (N, K) -> chunks of J_n^T v_n, in the order of the samples."""


def looped(passes: Passes, size: int = 1) -> Pull:
    """`size` samples at a time, each group with a forward and a backward pass of its own: for any network."""
    parameters = passes.program.parameters
    names, leaves = list(parameters), list(parameters.values())

    def pull(v: torch.Tensor) -> Iterator[Chunk]:
        for start in range(0, passes.samples, size):
            part = slice(start, start + size)
            parts = passes.part(parameters, part).parts
            grads = gradients(parts, leaves, v[part])
            yield flatten([p.detach() for p in parts]), {n: g[None] for n, g in zip(names, grads, strict=True)}

    return pull


def vectorized(passes: Passes) -> Pull:
    """As many samples at a time as fit the budget, by `torch.func.vmap`, where the network's operations allow it."""
    parameters = {name: p.detach() for name, p in passes.program.parameters.items()}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = max(1, min(passes.samples, BUDGET // max(size, 1)))
    flat, mapped = leaves(passes.inputs), passes.over
    apart = [by_sample(kind, value, passes.samples) for kind, value in passes.record]
    masks = [value for value in apart if value is not None]

    def single(rows: list, masks: list, v: torch.Tensor) -> Chunk:
        values = iter([leaf[None] if over else leaf for leaf, over in zip(rows, mapped, strict=True)])
        inputs, drawn = map_leaves(lambda _: next(values), passes.inputs), iter(masks)
        pairs = zip(passes.record, apart, strict=True)
        record = [(kind, value if own is None else next(drawn)) for (kind, value), own in pairs]

        def outputs(parameters: Parameters) -> list[torch.Tensor]:
            with passes.replayed(record):
                return read(passes.program.call(parameters, inputs)).parts

        parts, pullback = torch.func.vjp(outputs, parameters)
        backward = lambda vector: list(pullback(split(vector[0], parts))[0].values())
        grads = at_scale_one(backward, [v[None]], [*parts, *parameters.values()])
        return flatten(parts)[0], dict(zip(parameters, grads, strict=True))

    batched = torch.func.vmap(single, in_dims=([0 if over else None for over in mapped], [0] * len(masks), 0))

    def pull(v: torch.Tensor) -> Iterator[Chunk]:
        for start in range(0, passes.samples, chunk):
            part = slice(start, start + chunk)
            rows = copied([leaf[part] if over else leaf for leaf, over in zip(flat, mapped, strict=True)])
            with torch.no_grad(), warnings.catch_warnings(), same_randomness(passes.state):
                warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap falls back to a loop
                pulled = batched(rows, [mask[part] for mask in masks], v[part])
                passes.check_draws()
            yield pulled

    return pull


def square_norms(pull: Pull, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: (G,) array of ||J_g^T v_g||^2}, in float32 or better."""
    chunks = [
        {name: widened(g).reshape(len(g), -1).square().sum(dim=1) for name, g in grads.items()} for _, grads in pull(v)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def total(pull: Pull, v: torch.Tensor) -> list[torch.Tensor]:
    """The sum of the gradients of samples or groups, J^T v where they do not interact."""
    sums: list[torch.Tensor] = []
    for _, grads in pull(v):
        parts = [widened(g).sum(dim=0) for g in grads.values()]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    return sums


@dataclass(frozen=True)
class Comparison:
    """What one pull-back of single samples shows.

    Attributes
    ----------
    difference:
        The largest relative difference from the batch, in outputs and in J^T v.
    square_norms:
        {name: (N,) array of ||J_n^T v_n||^2}.
    """

    difference: float
    square_norms: dict[str, torch.Tensor]


def compare(pull: Pull, outputs: torch.Tensor, v: torch.Tensor, gradient: list[torch.Tensor]) -> Comparison:
    """Samples taken apart beside the batch's outputs (N, K) and J^T v. Reads the device."""
    alone, norms, sums = [], [], None
    for part, grads in pull(v):
        wide = {name: widened(g) for name, g in grads.items()}
        alone.append(part)
        norms.append({name: g.reshape(len(g), -1).square().sum(dim=1) for name, g in wide.items()})
        parts = [g.sum(dim=0) for g in wide.values()]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
    joined = torch.cat(alone)
    if joined.shape != outputs.shape:
        return Comparison(float("inf"), {})
    apart = torch.maximum(_in_gradient(sums or [], gradient), _scalar(_in_outputs(joined, outputs)))
    return Comparison(apart.item(), {name: torch.cat([part[name] for part in norms]) for name in norms[0]})


def _in_outputs(alone: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    return (alone - outputs).abs().max() / outputs.abs().max().clamp_min(torch.finfo(outputs.dtype).tiny)


def _in_gradient(sums: list[torch.Tensor], gradient: list[torch.Tensor]) -> torch.Tensor:
    norms = torch.stack([_scalar(torch.linalg.vector_norm(widened(g))) for g in gradient])
    missed = [_scalar(torch.linalg.vector_norm(s - widened(g))) for s, g in zip(sums, gradient, strict=True)]
    # a parameter whose gradient is rounding noise beside the others' (a key's bias) is compared with a share of the
    # whole
    floor = 0.03 * torch.linalg.vector_norm(norms)
    return (torch.stack(missed) / (norms + floor).clamp_min(torch.finfo(norms.dtype).tiny)).max()


def gradients(parts: list[torch.Tensor], leaves: list[torch.Tensor], v: torch.Tensor) -> list[torch.Tensor]:
    """J^T v by one backward pass on a kept graph, zero for parameters that were not used."""

    def backward(vector: list[torch.Tensor]) -> list[torch.Tensor]:
        used = [(part, w) for part, w in zip(parts, split(vector[0], parts), strict=True) if part.requires_grad]
        if not used:
            return [torch.zeros_like(leaf) for leaf in leaves]
        outputs, cotangents = zip(*used, strict=True)
        grads = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)
        return dense(grads, leaves)

    return at_scale_one(backward, [v], [*parts, *leaves])


def dense(grads: Iterable[torch.Tensor | None], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of unused parameters are zero, and embeddings can ask for sparse ones."""
    pairs = zip(grads, leaves, strict=True)
    return [torch.zeros_like(p) if grad is None else grad.to_dense() if grad.is_sparse else grad for grad, p in pairs]


def _scalar(value: torch.Tensor) -> torch.Tensor:
    """One dtype for parameters of several; Apple's GPUs have no float64."""
    return value.float() if value.device.type == "mps" else value.double()
