"""What PyTorch's own losses average over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional as F

from lnp.losses import IGNORE_INDEX

ELEMENTS = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.SoftMarginLoss, nn.KLDivLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss, F.kl_div),
)
"""Losses whose mean is over all elements of outputs and targets."""
LABELS = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
"""Losses whose mean is over class labels."""


@dataclass(frozen=True)
class Known:
    """How one of PyTorch's losses reduces.

    Attributes
    ----------
    labels:
        Whether it averages over class labels, or over elements.
    reduction:
        "mean", "sum", "none" or "batchmean".
    ignore_index:
        Label that takes no part.
    weighted:
        Whether classes have weights, by which the mean is weighted.
    """

    labels: bool
    reduction: str
    ignore_index: int
    weighted: bool


def known(loss: str | Callable | None) -> Known | None:
    """What is known of a loss: a module, a function, or a function with keywords bound by `functools.partial`."""
    settings: dict[str, Any] = {}
    identity: Any = loss
    if isinstance(loss, nn.Module):
        settings, identity = vars(loss) | loss._buffers, type(loss)
    while isinstance(identity, functools.partial):
        settings = {**identity.keywords, **settings}
        identity = None if identity.args else identity.func
    if not any(identity is one for one in (*ELEMENTS, *LABELS)):
        return None
    return Known(
        any(identity is one for one in LABELS),
        settings.get("reduction", "mean"),
        settings.get("ignore_index", IGNORE_INDEX),
        settings.get("weight") is not None,
    )
