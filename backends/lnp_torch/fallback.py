"""Gradients of single samples, or of groups of them, one chunk at a time: nothing of size samples x parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lnp.contract.trees import leaves, map_leaves
from lnp.per_sample.self_check import Alone
from lnp_torch.draws import by_sample
from lnp_torch.float16 import at_scale_one, scale_to_one
from lnp_torch.met import Meet
from lnp_torch.model import Parameters
from lnp_torch.outputs import flatten, split, square_norm, widened
from lnp_torch.replay import Passes, copied
from lnp_torch.state_guard import same_randomness

BUDGET = 2**28
"""Bytes of per-sample gradients that are in memory at a time."""

Chunk = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Outputs (C, K) of C samples or groups, and {name: (C, ...) gradients}."""
Pull = Callable[[torch.Tensor], Iterator[Chunk]]
"""v (N, K) -> chunks of J_n^T v_n, in the order of the samples."""


@dataclass(frozen=True)
class Way:
    """A way to run single samples.

    Attributes
    ----------
    pull:
        Passes of a batch -> their gradients.
    outputs:
        Passes of a batch -> (N, K) outputs, by forward passes alone.
    """

    pull: Callable[[Passes], Pull]
    outputs: Callable[[Passes], torch.Tensor]


def looped(passes: Passes, size: int = 1) -> Pull:
    """`size` samples at a time, each group with a forward and a backward pass of its own: for any network."""
    parameters = passes.program.parameters
    names, leaves = list(parameters), list(parameters.values())

    def pull(v: torch.Tensor) -> Iterator[Chunk]:
        for part in _slices(passes, size):
            parts = passes.part(parameters, part).parts
            grads = gradients(parts, leaves, v[part])
            yield flatten([p.detach() for p in parts]), {n: g[None] for n, g in zip(names, grads, strict=True)}

    return pull


def looped_outputs(passes: Passes) -> torch.Tensor:
    """(N, K) outputs of all samples, each by a forward pass of its own. Gradients stay on: a network may need them."""
    every = []
    for part in _slices(passes, 1):
        parts = passes.part(passes.program.parameters, part).parts
        every.append(flatten([part.detach() for part in parts]))
        del parts  # and the graph, before the next one is made
    return torch.cat(every)


def _slices(passes: Passes, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, passes.samples, size)]


def vectorized(passes: Passes) -> Pull:
    """As many samples at a time as fit the budget, by `torch.func.vmap`, where the network's operations allow it."""
    parameters = {name: p.detach() for name, p in passes.program.parameters.items()}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = max(1, min(passes.samples, BUDGET // max(size, 1)))
    forward = _forward_of_one(passes)

    def single(rows: list, masks: list, v: torch.Tensor) -> Chunk:
        parts, pullback = torch.func.vjp(lambda parameters: forward(parameters, rows, masks), parameters)

        def backward(vector: list[torch.Tensor]) -> list[torch.Tensor]:
            return list(pullback(split(vector[0], parts))[0].values())

        grads = at_scale_one(backward, [v[None]], [*parts, *parameters.values()])
        return flatten(parts)[0], dict(zip(parameters, grads, strict=True))

    return lambda v: _mapped(passes, single, chunk, v)


def vectorized_outputs(passes: Passes) -> torch.Tensor:
    """(N, K) outputs of all samples, each run by itself, by `torch.func.vmap`."""
    parameters = {name: p.detach() for name, p in passes.program.parameters.items()}
    forward = _forward_of_one(passes)

    def single(rows: list, masks: list, v: torch.Tensor) -> torch.Tensor:
        return flatten(forward(parameters, rows, masks))[0]

    nothing = torch.zeros(passes.samples, device=passes.program.device)
    return torch.cat(list(_mapped(passes, single, passes.samples, nothing)))


def _forward_of_one(passes: Passes) -> Callable[[Parameters, list, list], list[torch.Tensor]]:
    """(parameters, one sample's rows of the inputs, its masks) -> the outputs of this sample as a batch of one."""
    drawn_apart = [by_sample(kind, value, passes.samples) is not None for kind, value in passes.record]

    def forward(parameters: Parameters, rows: list, masks: list) -> list[torch.Tensor]:
        values = iter([leaf[None] if over else leaf for leaf, over in zip(rows, passes.over, strict=True)])
        inputs, drawn = map_leaves(lambda _: next(values), passes.inputs), iter(masks)
        pairs = zip(passes.record, drawn_apart, strict=True)
        record = [(kind, next(drawn) if apart else value) for (kind, value), apart in pairs]
        with passes.replayed(record):
            return passes.called(parameters, inputs).parts

    return forward


def _mapped(passes: Passes, single: Callable, chunk: int, v: torch.Tensor) -> Iterator:
    """single(rows, masks, v_n) for all samples, `chunk` of them at a time."""
    flat, over = leaves(passes.inputs), passes.over
    masks = [m for kind, value in passes.record if (m := by_sample(kind, value, passes.samples)) is not None]
    batched = torch.func.vmap(single, in_dims=([0 if along else None for along in over], [0] * len(masks), 0))
    for part in _slices(passes, chunk):
        rows = copied([leaf[part] if along else leaf for leaf, along in zip(flat, over, strict=True)])
        with torch.no_grad(), warnings.catch_warnings(), same_randomness(passes.state):
            warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap falls back to a loop
            found = batched(rows, [mask[part] for mask in masks], v[part])
            passes.check_draws()
        yield found


VECTORIZED, LOOPED = Way(vectorized, vectorized_outputs), Way(looped, looped_outputs)


def square_norms(pull: Pull, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: (G,) array of ||J_g^T v_g||^2}, in float32 or better."""
    chunks = [_square_norms(grads) for _, grads in pull(v)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def alone(pull: Pull, v: torch.Tensor, with_sum: bool = True) -> Alone:
    """Outputs, squared norms and, where it is asked for, the sum of the gradients of single samples."""
    outputs, norms = [], []
    sums: dict[str, torch.Tensor] = {}
    for part, grads in pull(v):
        outputs.append(part)
        norms.append(_square_norms(grads))
        if with_sum:
            _add(sums, grads)
    return Alone(torch.cat(outputs), sums, {name: torch.cat([part[name] for part in norms]) for name in norms[0]})


def total(pull: Pull, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sum of the gradients of samples or groups, J^T v where they do not interact."""
    sums: dict[str, torch.Tensor] = {}
    for _, grads in pull(v):
        _add(sums, grads)
    return sums


def _square_norms(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: (C,)} of gradients (C, ...), in float32 or better."""
    return {name: widened(g).reshape(len(g), -1).square().sum(dim=1) for name, g in grads.items()}


def _add(sums: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
    """Add gradients (C, ...), summed over their first axis, to what is there."""
    for name, g in grads.items():
        part = widened(g).sum(dim=0)
        sums[name] = sums[name] + part if name in sums else part


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


def gradient_square_norms(
    parts: list[torch.Tensor], parameters: Parameters, v: torch.Tensor, also: Meet | None = None
) -> dict[str, torch.Tensor]:
    """{name: ||J_l^T v||^2, shape ()} by one backward pass, which frees the graph: one gradient in memory at a time,
    which is handed to `also`.
    """
    found = {name: torch.zeros((), device=v.device) for name in parameters}
    scale = scale_to_one([v], [*parts, *parameters.values()])
    cotangents = split(v if scale is None else widened(v) * scale, parts)
    used = [(part, w) for part, w in zip(parts, cotangents, strict=True) if part.requires_grad]

    def meet(name: str, p: torch.Tensor) -> None:
        gradient, p.grad = p.grad, None
        assert gradient is not None, "the hook runs after it was accumulated"
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        found[name] = square_norm(gradient) if scale is None else square_norm(gradient) / scale**2
        if also is not None:
            also(name, gradient if scale is None else widened(gradient) / scale)

    hooks = [p.register_post_accumulate_grad_hook(partial(meet, name)) for name, p in parameters.items()]
    try:
        if used:
            torch.autograd.backward([part for part, _ in used], [w for _, w in used], inputs=list(parameters.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def dense(grads: Iterable[torch.Tensor | None], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of unused parameters are zero, and embeddings can ask for sparse ones."""
    pairs = zip(grads, leaves, strict=True)
    return [torch.zeros_like(p) if grad is None else grad.to_dense() if grad.is_sparse else grad for grad, p in pairs]
