"""What PyTorch's optimizers multiply gradients with, for `lnp.decompose(preconditioner=)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lnp.user_warnings import warn


def preconditioner(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The diagonal M of the optimizer's next update, -eta M (its average of gradients), for each of the model's
    parameters.

        Adam and its like    1 / (sqrt(v / (1 - beta2^t)) + eps)        v: average of squared gradients, t updates
        RMSprop              1 / (sqrt(v) + eps)                        v - a^2 for v, if centered, a: their average
        Adadelta             sqrt(u + eps) / sqrt(v + eps)              u: average of squared updates
        Adagrad              1 / (sqrt(s) + eps)                        s: sum of squared gradients
        SGD                  1

    Adam's like are AdamW, NAdam, SparseAdam and optimizers of other libraries that keep `exp_avg_sq`. Where an adaptive
    optimizer has not updated a parameter yet there is no average, M is 1, and a warning says so. A parameter that the
    optimizer does not train has 0. Learning rates that differ between parameter groups are part of M, relative to the
    first one that is not 0.

    Raises
    ------
    TypeError
        For an optimizer whose update is not known to be of this form, such as Lion, Muon or LBFGS.
    ValueError
        If the optimizer trains none of the model's parameters.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> preconditioner(optimizer, model)["bias"]
    tensor([1.])
    """
    optimizer = _unwrapped(optimizer)
    _check(optimizer)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    first = next((rate for group in optimizer.param_groups if (rate := float(group["lr"]))), 0.0)
    found: dict[str, torch.Tensor] = {}
    without: list[str] = []
    for group in optimizer.param_groups:
        scale = float(group["lr"]) / first if first else 1.0
        for p in group["params"]:
            if id(p) in names:
                state = optimizer.state.get(p, {})
                updates = float(state.get("step", 1)) if state else 0.0
                found[names[id(p)]] = scale * _diagonal(state, group, p, updates)
                without += [] if updates else [names[id(p)]]
    if not found:
        raise ValueError(
            f"This {type(optimizer).__name__} trains none of the model's parameters. Expected the optimizer of the "
            "model."
        )
    if without and not isinstance(optimizer, torch.optim.SGD):
        warn(
            f"lnp: {type(optimizer).__name__} has not updated {len(without)} of its {len(found)} parameters yet "
            f"({without[0]}...): the preconditioner is 1 there, which the next update's is not. Measure after the "
            "first update."
        )
    return {name: found.get(name, torch.zeros_like(p)) for name, p in model.named_parameters() if p.requires_grad}


def step_size(optimizer: Any) -> tuple[float | None, str]:
    """(Learning rate of the optimizer's next update, why that is none of gradient descent with it, or "").

    With momentum m a gradient moves parameters by learning_rate (1 - dampening) / (1 - m) in the end, which is what
    counts. None where parameter groups differ: then no single number says how far a step goes.

    Examples
    --------
    >>> step_size(torch.optim.SGD(nn.Linear(2, 1).parameters(), 0.5, momentum=0.75))
    (2.0, '')
    >>> step_size(torch.optim.Adam(nn.Linear(2, 1).parameters(), 0.1))
    (0.1, 'Adam rescales the gradient')
    """
    optimizer = _unwrapped(optimizer)
    plain = isinstance(optimizer, torch.optim.SGD)
    rates = {float(group["lr"]) * (_persistence(group) if plain else 1.0) for group in optimizer.param_groups}
    if len(rates) != 1:
        return None, f"the parameter groups of {type(optimizer).__name__} have learning rates of their own"
    return rates.pop(), "" if plain else f"{type(optimizer).__name__} rescales the gradient"


def _persistence(group: Mapping[str, Any]) -> float:
    """How much of a gradient arrives in the sum of all updates to come."""
    momentum = float(group.get("momentum", 0.0))
    return (1 - float(group.get("dampening", 0.0))) / (1 - momentum) if 0 < momentum < 1 else 1.0


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that Accelerate or Lightning have wrapped."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check(optimizer: torch.optim.Optimizer) -> None:
    optim = torch.optim
    known = (
        *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.SparseAdam),
        *(optim.RMSprop, optim.Adadelta, optim.Adagrad),
    )
    states = [state for state in optimizer.state.values() if state]
    alike = states and all("exp_avg_sq" in state for state in states) and not isinstance(optimizer, optim.RAdam)
    if not (isinstance(optimizer, known) or alike):
        raise TypeError(
            f"The update of {type(optimizer).__name__} is not known to be a diagonal matrix times an average of "
            "gradients. Expected SGD, Adam, AdamW, NAdam, RMSprop, Adadelta or Adagrad. Pass your own diagonal, "
            "{parameter name: tensor}, as preconditioner=."
        )


def _diagonal(state: Mapping[str, Any], group: Mapping[str, Any], p: torch.Tensor, updates: float) -> torch.Tensor:
    """1 / (sqrt(v) + eps), or 1 for an optimizer or a parameter without squared gradients."""
    if not updates:  # Adagrad has a sum from the start, and fused Adam a state after an update that a scaler skipped
        return torch.ones_like(p)
    epsilon = group.get("eps", 0.0)
    if "exp_avg_sq" in state:
        squares = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        return 1 / ((squares / (1 - group["betas"][1] ** updates)).sqrt() + epsilon)
    if "acc_delta" in state:
        return ((state["acc_delta"] + epsilon) / (state["square_avg"] + epsilon)).sqrt()
    if "square_avg" in state:
        squares = state["square_avg"] - (state["grad_avg"] ** 2 if group.get("centered") else 0)
        return 1 / (squares.sqrt() + epsilon)
    if "sum" in state:
        return 1 / (state["sum"].sqrt() + epsilon)
    return torch.ones_like(p)
