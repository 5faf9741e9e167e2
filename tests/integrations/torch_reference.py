"""What the decomposition must be, from a dense Jacobian by plain autograd, one row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lnp

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative, between a measurement and the dense Jacobian in the same dtype."""
VALUES = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


def assert_agrees(d: lnp.Decomposition, expected: dict[str, float], dtype: torch.dtype) -> None:
    """The measurement is what `dense` says."""
    assert {name: getattr(d, name) for name in VALUES} == pytest.approx(expected, rel=TOLERANCE[dtype])


def with_batch_statistics(model: nn.Module, run) -> nn.Module:
    """A copy whose batch normalisation uses the statistics that `run(copy)` sees, with biased variance."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]

    def freeze(module, inputs):
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        module.running_mean = inputs[0].detach().mean(axes)
        module.running_var = inputs[0].detach().var(axes, correction=0)
        module.eval()

    handles = [norm.register_forward_pre_hook(freeze) for norm in norms]
    run(model)
    for handle in handles:
        handle.remove()
    return model


def dense(model: nn.Module, outputs: torch.Tensor, loss: torch.Tensor, loss_terms: int) -> dict[str, float]:
    """The factors from J, row by row; `loss` must be a function of the very tensor `outputs`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    (g,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    rows = []
    for index in range(outputs.numel()):
        v = torch.zeros(outputs.numel(), dtype=outputs.dtype)
        v[index] = 1
        grads = torch.autograd.grad(
            outputs, parameters, v.reshape(outputs.shape), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        grads = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
        # a complex parameter is two real ones
        rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).reshape(-1) for g in grads]))
    jacobian, g = torch.stack(rows).double(), g.reshape(-1).double()
    kernel = jacobian @ jacobian.T
    rate, g2, trace = g @ kernel @ g, g @ g, kernel.trace()
    return {
        "loss": loss.item(),
        "rate": rate.item(),
        "chi_loss": (loss_terms * g2).item(),
        "chi_net": (trace / loss_terms).item(),
        "chi_pos": (rate / (g2 * trace)).item(),
    }
