"""Models before and after an update. JAX's arrays do not change; only Flax NNX modules get others in their place."""

from __future__ import annotations

import sys
from typing import Any

from lnp_jax.models import separate


def snapshot(model: Any) -> Any:
    """The model as it is now: itself, or a copy of an NNX module."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.clone(model) if nnx is not None and isinstance(model, nnx.Module) else model


def difference(before: Any, after: Any) -> dict[str, Any]:
    """What the update added to each parameter, {name: array}."""
    structure, old = separate(before, None, None)
    other, new = separate(after, None, None)
    if structure.shown != other.shown:
        raise ValueError(
            "The model has other trained parameters than before. Expected the same model, before and after one update."
        )
    return {shown: new[name] - old[name] for name, shown in structure.shown.items()}
