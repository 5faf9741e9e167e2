"""`torch.einsum` of the samples' tensor with a parameter, where it is a matrix product in other words."""

from __future__ import annotations

import torch
from torch import Tensor

from lnp_torch.taps.copies import NOTHING, Unknown, Use


def einsum(equation, *operands):
    """The uses of two operands: y = x W along some axes of x, such as "bsd,dhk->bshk" or "hkd,bhk->bd"."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or len(operands) != 2 or any(not (n.isalpha() and len(set(n)) == len(n)) for n in (*names, out)):
        raise Unknown
    (a, b), (x, y) = names, operands
    return [_use(a, x, b, y, out), _use(b, y, a, x, out)]


def _use(own: str, weight: Tensor, names: str, x: Tensor, out: str) -> Use:
    """The use of a weight whose axes are summed with x or go to the output, each in one block; nothing of another."""
    summed, kept = [i for i in own if i in names], [i for i in own if i not in names]
    rest = [i for i in out if i not in own]
    products = [i for i in names if i not in own]
    blocks = summed + kept, kept + summed
    if not (summed and kept and rest) or list(own) not in blocks or set(rest) != set(products):
        return NOTHING
    if set(summed) & set(out) or not set(kept) <= set(out):
        return NOTHING
    first = summed if list(own) == blocks[0] else kept
    rows = torch.Size(weight.shape[: len(first)]).numel()
    try:
        matrix = weight.detach().view(rows, -1)
    except RuntimeError:  # of a weight that lies in memory in another way
        return NOTHING

    def arranged(tensor: Tensor, axes: str, last: list[str]) -> Tensor:
        return tensor.permute([axes.index(i) for i in rest + last]).flatten(len(rest))

    return Use(
        weight,
        "outer",
        lambda d, at: (at.positions(arranged(d, out, kept)), at.positions(arranged(x, names, summed))),
        transposed=first is summed,
        matrix=matrix,
    )
