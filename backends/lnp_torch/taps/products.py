"""Inner products of single samples' gradients with one of the parameter's shape, without the gradients."""

from __future__ import annotations

import math

import torch
from array_api_compat import torch as xp
from torch import Tensor
from torch.nn import functional as F

from lnp.per_sample import norms, uses
from lnp.per_sample.uses import Factors
from lnp_torch.taps.derived import Frame


def inner_products(frame: Frame, factors: Factors, parameter: Tensor, u: Tensor) -> Tensor:
    """<gradient of sample m, u> by one use, with u of the parameter's shape. (M,)."""
    start, shape, strides = frame
    if (start, shape, strides) != (0, parameter.shape, parameter.stride()):
        same = torch.empty_strided(parameter.shape, parameter.stride(), dtype=u.dtype, device=u.device)
        u = same.copy_(u).as_strided(shape, strides, start)
    if factors.kind != "convolution":
        return uses.inner_products(xp, factors, u)
    x, d, window = factors.arrays
    weight, convolve = u.to(x.dtype), (F.conv1d, F.conv2d, F.conv3d)[d.ndim - 3]

    def products(x: Tensor, d: Tensor) -> Tensor:
        made = convolve(x, weight, None, window.stride, 0, window.dilation, window.groups)
        product = made[(..., *map(slice, d.shape[2:]))].mul_(d)  # a stride may leave room for more places
        return product.reshape(len(product), -1).sum(1)

    return norms.chunked(xp, products, (x, d), 2 * math.prod(d.shape[1:]), norms.PATCHES)
