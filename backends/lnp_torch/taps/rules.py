"""Operations whose per-sample gradients follow from their input and the cotangent of their output.

Operations are recognised, not layers: `F.linear` in whatever module it is called, a product with a parameter, a
normalisation's scale. A rule says, for each parameter that its operation uses, how to form the gradients of single
samples from the cotangent d of the output, in one of the forms of `lnp.per_sample.uses`. What is not here is left to
the general way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from array_api_compat import torch as xp
from torch import Tensor
from torch.nn import functional as F

from lnp.per_sample.experts import Sent
from lnp.per_sample.norms import Window
from lnp_torch.taps.copies import NOTHING, Unknown, Use, joined, rearranged, repeated, unspread
from lnp_torch.taps.einsum import einsum
from lnp_torch.taps.layout import Unread


def recognised(func: Callable, args: tuple, kwargs: dict) -> list[Use]:
    """The uses that a call makes of its tensors, as far as they are known. The tensors may be no parameters."""
    rule = RULES.get(func)
    if rule is None:
        return []
    try:
        return [use for use in rule(*args, **kwargs) if isinstance(use.tensor, Tensor)]
    except (TypeError, Unknown):  # called in a way that the rule has not been written for
        return []


def _linear(input, weight, bias=None):
    return [Use(weight, "outer", lambda d, at: (at.positions(d), at.positions(input))), *_bias(bias)]


def _bias(bias):
    return [] if bias is None else [Use(bias, "dense", lambda d, at: (at.positions(d).sum(1),))]


def _matmul(input, other, **kwargs):
    """x @ W, and W @ x with the samples before the last two axes, or along the last one."""
    if kwargs:
        raise Unknown
    uses = []
    if other.ndim == 2:
        uses.append(Use(other, "outer", lambda d, at: (at.positions(d), at.positions(input)), transposed=True))
    if input.ndim == 2:
        uses.append(Use(input, "outer", lambda d, at: (at.positions(d.mT), at.positions(other.mT))))
    return uses


def _experts(input, weight, offs=None, bias=None, out_dtype=None):
    """Rows in the order of their expert: x @ W[0] up to the first offset, x @ W[1] from there to the second."""
    if weight.ndim != 3 or input.ndim != 2 or offs is None or bias is not None:
        raise Unknown

    @cache
    def sent(at):
        row = torch.arange(len(input), dtype=offs.dtype, device=offs.device)
        expert = torch.searchsorted(offs, row, right=True)
        return Sent(xp, at.samples_of(row), torch.where(expert < len(weight), expert, -1), at.samples, len(weight))

    return [Use(weight, "experts", lambda d, at: (sent(at), input, d))]


def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1 or input.ndim != 1:
        raise Unknown
    return [*_matmul(mat1, mat2), *_bias(input)]


def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None or scale_grad_by_freq:
        raise Unknown

    def rows(d, at):
        return at.first(index, 0).reshape(at.samples, -1), at.positions(d)

    index = input if padding_idx is None else torch.where(input == padding_idx % weight.shape[0], -1, input)
    return [Use(weight, "rows", rows, index=index)]


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What is added to the scores, such as a bias by distance: its gradient is that of the scores."""
    if not isinstance(attn_mask, Tensor) or dropout_p or is_causal:
        raise Unknown

    def factors(d, at):
        k, v = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) if enable_gqa else t for t in (key, value))
        scores = query @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + attn_mask
        weights, of_weights = torch.softmax(scores, -1), d @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        return (at.reduced(of_scores, unspread(attn_mask)),)

    return [Use(attn_mask, "dense", factors)]


def _getitem(input, index):
    """Rows of a matrix; what else is looked up is found by autograd, if all samples share it."""
    if not isinstance(index, Tensor) or index.dtype in (torch.bool, torch.uint8) or input.ndim != 2:
        raise Unknown
    return _embedding(index % input.shape[0], input)  # negative ones count from the end


def looks_up(func: Callable, args: tuple) -> bool:
    """Whether an operation takes rows of a matrix, by their numbers."""
    return func is F.embedding or (func is Tensor.__getitem__ and bool(recognised(func, args, {})))


def spreads(func: Callable, args: tuple, used: list[Tensor], out: Tensor) -> bool:
    """Whether an operation on parameters alone makes copies of them along the first axis, for the samples, or has been
    given such copies.
    """
    if func in REPEATS:
        return bool(recognised(func, args, {}))
    return all(_grows(unspread(tensor), out.shape) for tensor in used) and bool(recognised(func, args, {}))


def _grows(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether what has this shape is broadcast along the first axis of a whole."""
    return len(whole) > 0 and whole[0] > 1 and (len(shape) < len(whole) or shape[0] == 1)


def _multiply(input, other):
    return [_scale(input, other), _scale(other, input)]


def _scale(tensor, beside):
    if not isinstance(tensor, Tensor) or tensor.is_complex():
        return NOTHING
    return Use(tensor, "dense", lambda d, at: (at.reduced(d * beside, unspread(tensor)),))


def _divide(input, other, *, rounding_mode=None):
    if rounding_mode is not None:
        raise Unknown
    uses = [_scale(input, 1 / other)]
    if isinstance(other, Tensor) and not other.is_complex():
        uses.append(Use(other, "dense", lambda d, at: (at.reduced(-d * input / other**2, unspread(other)),)))
    return uses


def _add(input, other, *, alpha=1):
    return [_shift(input, 1), _shift(other, alpha)]


def _subtract(input, other, *, alpha=1):
    return [_shift(input, 1), _shift(other, -alpha)]


def _shift(tensor, factor):
    if not isinstance(tensor, Tensor) or tensor.is_complex() or isinstance(factor, Tensor):
        return NOTHING
    return Use(tensor, "dense", lambda d, at: (at.reduced(factor * d, unspread(tensor)),))


def _addcmul(input, tensor1, tensor2, *, value=1):
    if value != 1:
        raise Unknown
    return [_shift(input, 1), *_multiply(tensor1, tensor2)]


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return _trailing(weight, bias, lambda: F.layer_norm(input, normalized_shape, None, None, eps))


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return _trailing(weight, None, lambda: F.rms_norm(input, normalized_shape, None, eps))


def _trailing(weight, bias, normalised):
    """Scale and shift along the last axes."""
    return [
        Use(weight, "dense", lambda d, at: (at.reduced(d * normalised(), weight.shape),)),
        Use(bias, "dense", lambda d, at: (at.reduced(d, bias.shape),)),
    ]


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return _channels(weight, bias, lambda: F.group_norm(input, num_groups, None, None, eps))


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:  # statistics of the batch couple its samples, unless they are frozen
        raise Unknown
    return _channels(weight, bias, lambda: F.batch_norm(input, running_mean, running_var, eps=eps))


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    statistics = (None, None) if use_input_stats else (running_mean, running_var)
    return _channels(weight, bias, lambda: F.instance_norm(input, *statistics, None, None, use_input_stats, 0.0, eps))


def _prelu(input, weight):
    return [Use(weight, "dense", lambda d, at: (at.channels(d * input.clamp(max=0), weight.numel()),))]


def _channels(weight, bias, normalised):
    """Scale and shift along the second axis."""
    return [
        Use(weight, "dense", lambda d, at: (at.channels(d * normalised(), weight.numel()),)),
        Use(bias, "dense", lambda d, at: (at.channels(d, bias.numel()),)),
    ]


def _variants_of_convolution(dimension: int) -> dict[Callable, Callable]:
    """{operation: rule} of the convolution along so many axes, and of its transpose."""
    forward = getattr(F, f"conv{dimension}d")
    backward = getattr(F, f"conv_transpose{dimension}d")
    return {forward: partial(_convolution, dimension), backward: partial(_transposed_convolution, dimension)}


def _convolution(dimension, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A convolution's kernel, from the padded input and the cotangent."""
    window = _window(dimension, weight, stride, dilation, groups)
    reach = [step * (size - 1) for step, size in zip(window.dilation, window.kernel, strict=True)]
    if padding == "same":
        sides = [(total // 2, total - total // 2) for total in reach]
    else:
        sides = [(p, p) for p in _of_each(dimension, 0 if padding == "valid" else padding)]
    flat = [p for side in reversed(sides) for p in side]
    return _slid(dimension, input, weight, bias, lambda x, d: (F.pad(x, flat), d, window))


def _transposed_convolution(
    dimension, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    """A transposed convolution's kernel: the input and the padded cotangent change places."""
    window = _window(dimension, weight, stride, dilation, groups)

    def arrays(x, d):
        sides: list[int] = []  # what positions a kernel at each place of x reaches, beyond d on either side
        axes = zip(
            *(window.kernel, window.stride, window.dilation, _of_each(dimension, padding), d.shape[2:], x.shape[2:]),
            strict=True,
        )
        for size, step, spread, before, there, places in axes:
            reach = (places - 1) * step + spread * (size - 1) + 1
            sides = [before, max(0, reach - before - there), *sides]
        return F.pad(d, sides), x, window

    return _slid(dimension, input, weight, bias, arrays)


def _slid(dimension, input, weight, bias, arrays):
    """The uses of kernel and bias; `arrays` makes of input and cotangent what the squared norms are taken of."""
    if input.ndim != dimension + 2:
        raise Unknown  # a single sample

    def factors(d, at):
        if at.time_major or d.shape[0] != at.samples:
            raise Unread
        return arrays(input, d)

    kernel = Use(weight, "convolution", factors)
    if bias is None:
        return [kernel]
    return [kernel, Use(bias, "dense", lambda d, at: (at.channels(d, bias.numel()),))]


def _window(dimension: int, weight: Tensor, stride: Any, dilation: Any, groups: int) -> Window:
    """How a kernel slides."""
    each = partial(_of_each, dimension)
    return Window(tuple(weight.shape[2:]), each(stride), each(dilation), groups)


def _of_each(dimension: int, value: int | tuple[int, ...]) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * dimension if isinstance(value, int) else tuple(value) * (dimension // len(value))


def _variants(*names: str) -> list[Callable]:
    """The functions of these names, of torch and of its tensors."""
    found = [getattr(home, name, None) for home in (torch, Tensor, F) for name in names]
    return [function for function in found if function is not None]


REPEATS = frozenset({Tensor.repeat, Tensor.tile})
RULES: dict[Callable, Callable] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    **dict.fromkeys(_variants("rms_norm"), _rms_norm),
    **dict.fromkeys(_variants("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(_variants("grouped_mm", "_grouped_mm"), _experts),
    **dict.fromkeys(_variants("addmm"), _addmm),
    **dict.fromkeys(_variants("mul", "multiply", "__mul__", "__rmul__"), _multiply),
    **dict.fromkeys(_variants("div", "divide", "true_divide", "__truediv__"), _divide),
    **dict.fromkeys(_variants("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(_variants("sub", "subtract", "__sub__"), _subtract),
    **dict.fromkeys(_variants("addcmul"), _addcmul),
    torch.einsum: einsum,
    F.scaled_dot_product_attention: _attention,
    Tensor.__getitem__: _getitem,
    **dict.fromkeys(REPEATS, repeated),
    **dict.fromkeys(_variants("cat", "concat", "concatenate"), joined),
    **dict.fromkeys(_variants("reshape", "contiguous", "clone", "to", "type_as", "float"), rearranged),
    **_variants_of_convolution(1),
    **_variants_of_convolution(2),
    **_variants_of_convolution(3),
}
