"""Jacobian-vector products by forward mode, and by two backward passes where an operation has no forward mode."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lnp_torch.embedding_bag import InPieces
from lnp_torch.model import Parameters

NEITHER = (
    "J u, the derivative of the outputs along a direction of the parameters, cannot be computed for this network: one "
    "of its operations has neither a forward mode nor a second derivative in PyTorch ({}: {}). lnp.spectrum, "
    "lnp.kernel and population values by the general way need it. Expected operations that have one of them. Put "
    "another operation in its place, or call lnp.decompose, which does without."
)
Run = Callable[[Parameters], list[torch.Tensor]]


def jvp(run: Run, parameters: Parameters, u: list[torch.Tensor]) -> list[torch.Tensor]:
    """J u, where `run` maps parameters to outputs.

    Fused attention and recurrent kernels have no forward mode. Then u -> J u is the derivative of the linear map
    w -> <J^T w, u>, which takes two backward passes.
    """
    try:
        return _forward(run, parameters, u)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        return double_backward(run, parameters, u)


@functools.cache
def _load() -> None:
    """Have PyTorch load what forward mode needs, without its warnings about how it does that: they may be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _forward(run: Run, parameters: Parameters, u: list[torch.Tensor]) -> list[torch.Tensor]:
    """J u by dual numbers."""
    _load()
    with torch.no_grad(), forward_ad.dual_level(), InPieces():
        duals = {
            name: forward_ad.make_dual(p.detach(), tangent.to(p.dtype))
            for (name, p), tangent in zip(parameters.items(), u, strict=True)
        }
        pairs = [forward_ad.unpack_dual(part) for part in run(duals)]
        return [torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent for pair in pairs]


def double_backward(run: Run, parameters: Parameters, u: list[torch.Tensor]) -> list[torch.Tensor]:
    """J u as the derivative of w -> <J^T w, u>.

    Raises
    ------
    NotImplementedError
        If an operation cannot be differentiated twice.
    """
    try:
        return _twice(run, parameters, u)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = (str(error).splitlines() or [""])[0][:120]
        raise NotImplementedError(NEITHER.format(type(error).__name__, said)) from error


def _twice(run: Run, parameters: Parameters, u: list[torch.Tensor]) -> list[torch.Tensor]:
    """J u by a backward pass through a backward pass."""
    with sdpa_kernel(SDPBackend.MATH), InPieces():  # the fused kernels cannot be differentiated twice
        leaves = [p.detach().requires_grad_() for p in parameters.values()]
        parts = run(dict(zip(parameters, leaves, strict=True)))
        w = [torch.zeros_like(part, requires_grad=True) for part in parts]
        pulled = torch.autograd.grad(parts, leaves, w, create_graph=True, allow_unused=True, materialize_grads=True)
        used = [(grad, tangent.to(grad.dtype)) for grad, tangent in zip(pulled, u, strict=True) if grad.requires_grad]
        outputs, tangents = zip(*used, strict=True)
        return list(torch.autograd.grad(outputs, w, tangents, allow_unused=True, materialize_grads=True))
