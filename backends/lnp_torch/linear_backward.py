"""Whether backward passes that somebody wrote by hand are linear in what comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from array_api_compat import torch as xp

from lnp.contract.linearization import Vector
from lnp.per_sample import self_check
from lnp.per_sample.self_check import Pulled
from lnp.per_sample.verdict import BENT
from lnp_torch.step_loss import Output
from lnp_torch.taps.function_mode import Tap


def custom_backward(parts: list[torch.Tensor]) -> bool:
    """Whether a backward pass that somebody wrote by hand leads to the outputs: in Python, in C++, or as a hook."""
    stack, visited = [part.grad_fn for part in parts], set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        written: Any = getattr(type(node), "_forward_cls", None)
        if (written is not None and written not in (Tap, Output)) or "CppNode" in node.name():
            return True
        stack.extend(following for following, _ in node.next_functions)
    return False


@dataclass
class Joint:
    """A batch whose samples are not compared: for the linearity of its backward pass alone."""

    outputs: torch.Tensor
    gradients: Callable[[torch.Tensor], Vector]
    xp: Any = xp
    custom_backward: bool = True

    def pull(self, v: torch.Tensor) -> Pulled:
        """One backward pass of the batch."""
        return Pulled(self.gradients(v), {})


def refuse_bent(joint: Joint, g: torch.Tensor, tolerance: float) -> None:
    """Raise ValueError for a backward pass that is not linear, of a network whose samples are not taken apart."""
    if float(self_check.bend_of_batch(joint, g)) > tolerance:
        raise ValueError(BENT)
