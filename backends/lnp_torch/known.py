"""What PyTorch's own losses average over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional as F

from lnp.losses.kinds import IGNORE_INDEX

ELEMENTS = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss),
    *(nn.SoftMarginLoss, nn.KLDivLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss, F.kl_div),
    F.gaussian_nll_loss,  # with its variance bound by functools.partial; the module takes it in every call
)
"""Losses whose mean is over all elements of outputs and targets."""
LABELS = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
"""Losses whose mean is over class labels."""
SAMPLES = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, F.multi_margin_loss, F.multilabel_margin_loss)
"""Losses whose mean is over samples, however many classes they have."""


@dataclass(frozen=True)
class Known:
    """How one of PyTorch's losses reduces.

    Attributes
    ----------
    over:
        "elements", "labels" or "samples": what its mean averages over.
    reduction:
        "mean", "sum", "none" or "batchmean".
    ignore_index:
        Label that takes no part.
    weighted:
        Whether weights are given, for classes or elements.
    """

    over: str
    reduction: str
    ignore_index: int
    weighted: bool


def known(loss: str | Callable | None) -> Known | None:
    """What is known of a loss: a module, a function, or either with keywords bound by `functools.partial`."""
    identity: Any = loss
    settings: dict[str, Any] = {}
    if isinstance(identity, functools.partial):
        settings = identity.keywords
        identity = None if identity.args else identity.func
    if isinstance(identity, nn.Module):
        # by its exact type: a subclass may compute something else
        identity, settings = type(identity), {**vars(identity), **identity._buffers, **settings}
    kinds = {"elements": ELEMENTS, "labels": LABELS, "samples": SAMPLES}
    over = next((name for name, losses in kinds.items() if any(identity is one for one in losses)), None)
    if over is None or {"size_average", "reduce"} & settings.keys():  # the old way to say how a function reduces
        return None
    return Known(
        over,
        settings.get("reduction", "mean"),
        settings.get("ignore_index", IGNORE_INDEX),
        settings.get("weight") is not None,
    )
