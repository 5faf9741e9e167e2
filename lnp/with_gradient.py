"""A computation that hands out the loss gradient on its way: what a training step needs beside the measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lnp.linearization import Array, Linearization


@dataclass(frozen=True)
class WithGradient:
    """record -> (what the computation returns, {parameter name: its part of J^T g}), by one pull-back for both.

    Numbers have one axis there, as backends bring arrays of shape () to the host.
    """

    computation: Callable

    def __call__(self, lin: Linearization, **operands: Any) -> tuple[Any, dict[str, Array]]:
        gradient = lin.vjp(lin.loss_gradient)
        known = replace(
            lin, vjp=lambda v: gradient if v is lin.loss_gradient else lin.vjp(v), gradient_square_norms=None
        )
        names = list(lin.inner_products(gradient, gradient))
        parts = gradient if isinstance(gradient, Mapping) else dict(zip(names, gradient, strict=True))
        raised = {n: parts[n] if len(parts[n].shape) else lin.xp.reshape(parts[n], (1,)) for n in names}
        return self.computation(known, **operands), raised
