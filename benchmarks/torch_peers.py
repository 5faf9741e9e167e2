"""Other ways in PyTorch to what lnp's probes measure, each as a function v -> squared norms or tr Theta.

A peer is offered a module and its inputs and answers with a callable of a cotangent v (N, K) that runs its own forward
pass; what cannot be imported, or does not know the module's layers, raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Peer = Callable[[torch.Tensor], Any]


def vmap(model: nn.Module, x: torch.Tensor) -> Peer:
    """`torch.func.vmap` of vector-Jacobian products: gradients of single samples, all at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def product(parameters: dict, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(model, parameters, (x[None],))[0].reshape(-1) * v).sum()

    gradients = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))
    return lambda v: sum(g.reshape(len(g), -1).square().sum(1) for g in gradients(parameters, x, v).values())


def opacus(model: nn.Module, x: torch.Tensor) -> Peer:
    """Opacus' ghost clipping: norms of per-sample gradients from layer hooks."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model), loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def norms(v: torch.Tensor) -> torch.Tensor:
        (wrapped(x).reshape(len(x), -1) * v).sum().backward()
        found = wrapped.get_norm_sample() ** 2
        wrapped.zero_grad()
        return found

    return norms


def backpack(model: nn.Module, x: torch.Tensor) -> Peer:
    """BackPACK's `BatchL2Grad`."""
    from backpack import backpack as extension
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    extended = extend(copy.deepcopy(model))

    def norms(v: torch.Tensor) -> torch.Tensor:
        with extension(BatchL2Grad()):
            (extended(x).reshape(len(x), -1) * v).sum().backward()
        found = sum(p.batch_l2 for p in extended.parameters())
        extended.zero_grad()
        return found

    return norms


def curvlinops(model: nn.Module, x: torch.Tensor) -> Peer:
    """curvlinops' Hutchinson estimate of tr J^T J, as a Gauss-Newton matrix of squared error; v is not used."""
    from curvlinops import GGNLinearOperator, hutchinson_trace

    targets = torch.zeros_like(model(x).detach())
    operator = GGNLinearOperator(
        model, nn.MSELoss(reduction="sum"), list(model.parameters()), [(x, targets)], check_deterministic=False
    )
    return lambda v: torch.as_tensor(hutchinson_trace(operator, num_matvecs=1)) / 2


def nngeometry(model: nn.Module, x: torch.Tensor) -> Peer:
    """nngeometry's exact diagonal of J^T J, summed; v is not used."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))

    def outputs(*batch: torch.Tensor) -> torch.Tensor:
        return model(batch[0])

    def trace(v: torch.Tensor) -> torch.Tensor:
        matrix = FIM(model=model, loader=loader, representation=PMatDiag, variant="regression", function=outputs)
        return matrix.trace() * len(x)

    return trace


PER_SAMPLE = {"vmap": vmap, "Opacus": opacus, "BackPACK": backpack}
"""v -> (N,) squared norms."""
TRACES = {"curvlinops": curvlinops, "nngeometry": nngeometry}
"""v -> an estimate of tr Theta, or its exact value."""
