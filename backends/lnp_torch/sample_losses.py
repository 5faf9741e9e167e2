"""The losses of single samples: of the outputs that a batch's forward pass has given, or by the model's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lnp.contract.trees import leaves, map_leaves
from lnp_torch.outputs import Outputs, wide, widened
from lnp_torch.replay import Passes

MOST = 1024
"""Samples that are run one by one, at half a millisecond or more for each."""
Loss = Callable[[Any, Any], torch.Tensor]
"""(outputs, targets) -> scalar."""


def of_outputs(function: Loss, run: Loss, outputs: Outputs, targets: Any) -> torch.Tensor:
    """(N,) the loss of each sample by itself, or nan where it takes no single samples, whatever it raises.

    All at once by `torch.func.vmap` of the loss's function, where it draws nothing and its operations allow that; else
    one by one by `run`, which leaves no trace and takes half a millisecond each.
    """
    samples = outputs.samples
    parts = [part.detach().to(wide([part])) for part in outputs.parts]
    tree = outputs.with_parts(parts), targets
    over = [leaf for leaf in leaves(tree) if _over(leaf, samples)]

    def alone(loss: Loss, rows: list[torch.Tensor]) -> torch.Tensor:
        """The loss of the sample that these rows are of, each with a first axis of 1."""
        given = iter(rows)
        return loss(*map_leaves(lambda leaf: next(given) if _over(leaf, samples) else leaf, tree)).sum().detach()

    def one_by_one() -> torch.Tensor:
        _check_number(samples)
        with torch.enable_grad():  # a loss may differentiate in the outputs
            return torch.stack([alone(run, [_leaf(leaf[n : n + 1]) for leaf in over]) for n in range(samples)])

    def at_once() -> torch.Tensor:
        with torch.no_grad():
            rows = [leaf.detach().clone() for leaf in over]  # a loss may write to them
            return torch.func.vmap(lambda *rows: alone(function, [row.unsqueeze(0) for row in rows]))(*rows)

    for way in (at_once, one_by_one):
        try:
            return widened(way())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what vmap does not support, and whatever the user's code raises for one sample
            continue
    return torch.full((samples,), torch.nan, device=parts[0].device)


def by_the_model(passes: Passes) -> torch.Tensor:
    """(N,) the loss that a model computes itself, of each sample by itself; nan where it runs on no single ones."""
    try:
        _check_number(passes.samples)
        with torch.no_grad():
            found = [_own(passes.part(passes.program.parameters, slice(n, n + 1))) for n in range(passes.samples)]
        return torch.stack(found)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model raises on a part of its batch
        return torch.full((passes.samples,), torch.nan, device=passes.program.device)


def _check_number(samples: int) -> None:
    if samples > MOST:
        raise ValueError(f"{samples} samples one by one would take longer than the measurement.")


def _own(outputs: Outputs) -> torch.Tensor:
    loss = outputs.own_loss
    assert loss is not None, "the model has computed one for the whole batch"
    return widened(loss.detach().sum())


def _over(leaf: Any, samples: int) -> bool:
    """Whether a leaf runs over the samples along its first axis."""
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == samples


def _leaf(row: torch.Tensor) -> torch.Tensor:
    return row.clone().requires_grad_().clone() if row.is_floating_point() else row
