"""Batches that are dictionaries with labels, for models that compute their own loss (Hugging Face)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from array_api_compat import torch as xp
from torch import nn

from lnp.contract.validation import unpack
from lnp.losses import kinds
from lnp_torch.losses import integer
from lnp_torch.outputs import Outputs

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the class names and loss types of models that predict the next token."""

AUXILIARY = "the model's auxiliary loss is part of the loss, but not of its gradient"


def split_batch(batch: Any, loss: Any) -> tuple[Any, Any]:
    """(inputs, targets); targets are None where the model computes its own loss from a dictionary with labels."""
    if not isinstance(batch, Mapping):
        return unpack(batch)
    inputs = dict(batch)
    if "labels" not in inputs:
        raise ValueError(
            f"The batch is a dictionary with {sorted(inputs)}, without labels. Expected 'labels' among them, from "
            "which the model computes its loss. Add them, or pass (inputs, targets)."
        )
    if loss is None:
        return inputs, None
    return {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]


def own_loss_terms(modules: Iterable[nn.Module], inputs: Any, outputs: Outputs) -> tuple[Any, bool, tuple[str, ...]]:
    """(`loss_terms` of the loss that a model computes itself, whether that is a mean over samples, notes).

    Of Hugging Face's own losses this is known, by their `loss_type` or the class's name. What another model computes
    may be anything: contrasts between samples, say.
    """
    modules = tuple(modules)
    names = {str(getattr(module, "loss_type", None)) for module in modules} | {type(m).__name__ for m in modules}
    labels = inputs["labels"] if isinstance(inputs, Mapping) else None
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"labels are {type(labels).__name__}. Expected a tensor.")
    causal = any(kind.endswith(CAUSAL) for kind in names)
    known = causal or any(kind.startswith("For") for kind in names)
    notes = [] if outputs.auxiliary_loss is None else [AUXILIARY]
    if not integer(labels):
        terms, counted = labels.numel(), "the elements of the labels"
    else:
        # the label of a position is the next token: the first label has no prediction
        terms = kinds.label_terms(xp, labels[..., 1:] if causal else labels)
        counted = f"the labels that are not {kinds.IGNORE_INDEX}"
    if not known:
        notes.append(f"loss_terms counts {counted}, which is assumed; pass loss_terms=")
    return terms, known, tuple(notes)
