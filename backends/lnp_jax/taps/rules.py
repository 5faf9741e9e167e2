"""Operations whose per-sample gradients follow from their input and the cotangent of their output.

Operations of the program are recognised, not layers: a product, a convolution or a look-up with a parameter in it, or
with a view of one (transposed, reshaped, sliced, converted). Everything else is left to a copy of the parameter for
each sample, if that is small, or to single samples on their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lnp.per_sample import uses
from lnp.per_sample.uses import Factors, Kind
from lnp_jax.taps import convolution
from lnp_jax.taps.convolution import Window

Arrays = tuple[jax.Array, ...]
UNCHANGED = frozenset({"convert_element_type", "copy", "copy_p", "name", "optimization_barrier", "sharding_constraint"})
"""Operations that hand on the numbers as they are, or in another type."""


@dataclass(frozen=True)
class View:
    """Numbers of a parameter, each at most once, in another order.

    Attributes
    ----------
    name:
        Of the parameter.
    piece:
        The box that was cut out, (start, stop) for each axis; () for the whole.
    space:
        The shapes that it went through, where axes were merged or split.
    axes:
        For each axis, which axis of that space it is.
    scanned:
        Which of the surrounding scans run over its leading axes.
    """

    name: str
    piece: tuple = ()
    space: tuple = ()
    axes: tuple[int, ...] = ()
    scanned: tuple[int, ...] = ()

    @property
    def group(self) -> tuple[str, tuple]:
        """What it is one use of."""
        return self.name, self.piece

    def step(self, depth: int) -> View:
        """What one step of a scan sees of it, at this depth of scans."""
        return replace(self, axes=self.axes[1:], scanned=(*self.scanned, depth))


def view_after(view: View, eqn: Any) -> View | None:
    """The view of all its numbers that an operation makes of a view, or None."""
    name, params = eqn.primitive.name, eqn.params
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if name in UNCHANGED and len(eqn.invars) == 1:
        return view if jnp.issubdtype(after.dtype, jnp.floating) else None
    if name == "transpose":
        return replace(view, axes=tuple(view.axes[axis] for axis in params["permutation"]))
    if name == "squeeze":
        kept = [axis for axis in range(before.ndim) if axis not in params["dimensions"]]
        return replace(view, axes=tuple(view.axes[axis] for axis in kept))
    if (name in ("reshape", "broadcast_in_dim") and after.size == before.size) or name == "rev":
        how = (name, view.axes, tuple(after.shape), str(params.get("broadcast_dimensions", params.get("dimensions"))))
        return replace(view, space=(*view.space, how), axes=tuple(range(after.ndim)))
    return None


def pieces_of(view: View, eqn: Any) -> list[View] | None:
    """The pieces that an operation cuts out of a whole parameter, or None."""
    name, params, shape = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    if view.piece or view.space or view.scanned or view.axes != tuple(range(len(shape))):
        return None
    if name == "slice" and set(params["strides"] or (1,)) == {1}:
        boxes = [list(zip(params["start_indices"], params["limit_indices"], strict=True))]
    elif name == "split":
        ends = list(itertools.accumulate(params["sizes"]))
        boxes = []
        for start, end in zip([0, *ends], ends, strict=False):
            boxes.append([(start, end) if axis == params["axis"] else (0, size) for axis, size in enumerate(shape)])
    else:
        return None
    return [replace(view, piece=tuple((int(start), int(stop)) for start, stop in box)) for box in boxes]


def disjoint(pieces: Sequence[tuple]) -> bool:
    """Whether boxes of one parameter do not overlap; the whole overlaps with any."""
    for index, one in enumerate(pieces):
        for other in pieces[:index]:
            apart = any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, other, strict=False))
            if not (one and other and apart):
                return False
    return True


@dataclass(frozen=True)
class Use:
    """One view in one operation.

    Attributes
    ----------
    kind:
        "outer": sum_s left[s] right[s]^T; "rows": sum_s e_index[s] values[s]^T; "convolution": a convolution's weight.
    operand:
        Which input of the operation stands beside the view: what is multiplied, or the index.
    factors:
        (that input (N, ...), cotangent of the output (N, ...)) -> what `lnp.per_sample.uses` takes for that kind.
    size:
        Numbers that squared norms need in memory for one sample.
    gradient:
        As `factors` -> (squared norms, the weight's gradient), where that costs no more than the gradient; or None.
    back:
        (weight, cotangent of one sample's output) -> that of its input, where it is written out here; or None.
    frame:
        Which axes of the parameter run along the factors' last axes; uses of one frame can be added. None for uses
        that cannot.
    flipped:
        Whether left runs over the frame's second set of axes.
    window:
        How a convolution's kernel slides.
    """

    kind: Kind
    operand: int
    factors: Callable[[jax.Array, jax.Array], Arrays]
    size: int
    frame: tuple | None = None
    flipped: bool = False
    gradient: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    back: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    window: Window | None = None

    def square_norms(self, beside: jax.Array, d: jax.Array) -> jax.Array:
        """(that input (N, ...), cotangent of the output (N, ...)) -> (N,) squared norms."""
        use = Factors(self.kind, self.factors(beside, d))
        slide = None if self.window is None else partial(convolution.square_norms, window=self.window)
        found = uses.square_norms(jnp, [use], slide, UNBOUNDED)
        return jnp.sum(found.reshape(d.shape[0], -1), axis=1)


def use_of(eqn: Any, position: int, view: View) -> Use | None:
    """The use that an operation makes of a view at its input `position`, if it is known."""
    rule = {"dot_general": _dot, "conv_general_dilated": _convolution, "gather": _gather}.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, position, view)


def _dot(eqn: Any, position: int, view: View) -> Use:
    """y = x . W or W . x: contracted axes of W are rows, free ones columns; along shared ones W is one of many."""
    (contracting, shared) = eqn.params["dimension_numbers"]
    x, w = eqn.invars[1 - position].aval, eqn.invars[position].aval
    x_rows, w_rows = contracting[1 - position], contracting[position]
    x_shared, w_shared = shared[1 - position], shared[position]
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_rows, *x_shared)]
    w_free = [axis for axis in range(w.ndim) if axis not in (*w_rows, *w_shared)]
    order = sorted(range(len(w_rows)), key=lambda i: view.axes[w_rows[i]])
    x_rows = [x_rows[i] for i in order]
    own = sorted(range(len(w_free)), key=lambda i: view.axes[w_free[i]])
    start = len(shared[0])
    first = start + (len(x_free) if position == 1 else 0)  # of the columns in y
    d_free = range(start + (len(w_free) if position == 0 else 0), y_ndim(eqn) - (len(w_free) if position == 1 else 0))

    def size(aval: Any, axes: Sequence[int]) -> int:
        return math.prod(aval.shape[axis] for axis in axes)

    outer, rows, columns = size(w, w_shared), size(w, w_rows), size(w, w_free)

    def factors(x: jax.Array, d: jax.Array) -> Arrays:
        left = _permuted(x, x_shared, x_free, x_rows).reshape(x.shape[0] * outer, -1, rows)
        right = _permuted(d, range(start), d_free, [first + i for i in own]).reshape(x.shape[0] * outer, -1, columns)
        return left, right

    row_axes = tuple(sorted(view.axes[axis] for axis in w_rows))
    column_axes = tuple(sorted(view.axes[axis] for axis in w_free))
    flipped = row_axes > column_axes
    frame = (view.space, *((column_axes, row_axes) if flipped else (row_axes, column_axes)))
    return Use(
        "outer", 1 - position, factors, _outer_size(size(x, x_free), rows, columns) * outer,
        None if w_shared else frame, flipped,
    )  # fmt: skip


def _outer_size(positions: int, rows: int, columns: int) -> int:
    if positions == 1:
        return rows + columns
    return min(rows * columns, 2 * positions**2)


def _gather(eqn: Any, position: int, view: View) -> Use | None:
    """Whole rows of a table by their number."""
    how, sizes, mode = (eqn.params[name] for name in ("dimension_numbers", "slice_sizes", "mode"))
    table, index, y = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    looked_up = [axis for axis in range(table.ndim) if sizes[axis] != table.shape[axis]]
    clips = "CLIP" in str(mode)
    if position != 0 or how.operand_batching_dims or len(looked_up) != 1 or sizes[looked_up[0]] != 1:
        return None
    axis = looked_up[0]
    if axis not in how.start_index_map or not (clips or tuple(how.start_index_map) == (axis,)):
        return None
    column, count = how.start_index_map.index(axis), table.shape[axis]
    kept = [a for a in range(table.ndim) if a not in how.collapsed_slice_dims]  # the tables' axes behind offset_dims
    offset = [(view.axes[a], d) for a, d in zip(kept, how.offset_dims, strict=True) if a != axis]
    positions = [a for a in range(y.ndim) if a not in [d for _, d in offset]]
    columns = [d for _, d in sorted(offset)]

    def factors(index: jax.Array, d: jax.Array) -> Arrays:
        rows = index[..., column].reshape(index.shape[0], -1)
        outside = (rows < 0) | (rows >= count)
        rows = jnp.clip(rows, 0, count - 1) if clips else jnp.where(outside, -1, rows)
        return rows, _permuted(d, (), positions, columns).reshape(*rows.shape, -1)

    length = math.prod(index.shape[:-1])
    frame = (view.space, (view.axes[axis],), tuple(sorted(a for a, _ in offset)))
    return Use("rows", 1, factors, 2 * length**2, frame)


def _convolution(eqn: Any, position: int, view: View) -> Use | None:
    """A batch inside a sample counts as one more spatial axis, along which the kernel has length 1."""
    params = eqn.params
    if position != 1 or params["batch_group_count"] != 1:
        return None
    how, w, y = params["dimension_numbers"], eqn.invars[1].aval, eqn.outvars[0].aval
    padding = [(0, 0, 0), (0, 0, 0)]
    padding += [(lo, hi, step - 1) for (lo, hi), step in zip(params["padding"], params["lhs_dilation"], strict=True)]
    padding += [(0, 0, 0)]
    x_axes, y_axes = ((spec[0], *spec[2:], spec[1]) for spec in (how.lhs_spec, how.out_spec))
    x = eqn.invars[0].aval
    groups, sizes = params["feature_group_count"], [x.shape[axis] for axis in x_axes]
    padded = [lo + hi + size + step * max(size - 1, 0) for (lo, hi, step), size in zip(padding[1:], sizes, strict=True)]
    window = Window(
        (1, *(w.shape[axis] for axis in how.rhs_spec[2:])), (1, *params["window_strides"]),
        (1, *params["rhs_dilation"]), tuple(padded[:-1]), tuple(y.shape[axis] for axis in y_axes[:-1]),
        w.shape[how.rhs_spec[1]], w.shape[how.rhs_spec[0]] // groups, groups,
    )  # fmt: skip

    def factors(x: jax.Array, d: jax.Array) -> Arrays:
        x, d = _permuted(x, x_axes), _permuted(d, y_axes)
        return lax.pad(x, jnp.zeros((), x.dtype), padding), d

    def gradient(x: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        padded, cotangent = factors(x, d)
        found, kernel = convolution.with_gradient(padded, cotangent, window)
        places = (*how.rhs_spec[2:], how.rhs_spec[1], how.rhs_spec[0])  # of the weight's axes, for each of the kernel's
        return found, jnp.transpose(kernel[0], [places.index(axis) for axis in range(w.ndim)]).astype(w.dtype)

    return Use(
        "convolution", 0, factors, 1, gradient=None if window.gram else gradient,
        back=_back(params, x.shape, y.shape) if groups == 1 else None, window=window,
    )  # fmt: skip


def _back(params: dict[str, Any], given: tuple[int, ...], made: tuple[int, ...]) -> Callable:
    """(weight, cotangent of y) -> cotangent of x of a convolution, with channels last and the kernel's put in order:
    inside of loops XLA does not do that by itself, and a CPU has fast convolutions for this order only.
    """
    how, spatial = params["dimension_numbers"], range(len(given) - 2)
    padding = []
    for axis in spatial:
        (lo, _), stride, dilation = (params[name][axis] for name in ("padding", "window_strides", "lhs_dilation"))
        size, count = given[how.lhs_spec[axis + 2]], made[how.out_spec[axis + 2]]
        padding.append((lo, (size - 1) * dilation + 1, (count - 1) * stride + 1))

    def back(w: jax.Array, d: jax.Array) -> jax.Array:
        kernel = jnp.transpose(lax.rev(w, how.rhs_spec[2:]), (*how.rhs_spec[2:], how.rhs_spec[0], how.rhs_spec[1]))
        reach = [(w.shape[a] - 1) * step for a, step in zip(how.rhs_spec[2:], params["rhs_dilation"], strict=True)]
        sides = [(r - lo, size + r - count - (r - lo)) for r, (lo, size, count) in zip(reach, padding, strict=True)]
        last = jnp.transpose(d, (how.out_spec[0], *how.out_spec[2:], how.out_spec[1]))
        order = tuple(range(1, last.ndim - 1))
        axes = lax.ConvDimensionNumbers(
            (0, last.ndim - 1, *order), (last.ndim - 1, last.ndim - 2, *spatial), (0, last.ndim - 1, *order)
        )
        x = lax.conv_general_dilated(
            last, kernel, params["lhs_dilation"], sides, params["window_strides"], params["rhs_dilation"], axes,
            precision=params["precision"], preferred_element_type=params["preferred_element_type"],
        )  # fmt: skip
        places = (how.lhs_spec[0], *how.lhs_spec[2:], how.lhs_spec[1])
        return jnp.transpose(x, [places.index(axis) for axis in range(x.ndim)])

    return back


UNBOUNDED = 2**62
"""For `lnp.per_sample.uses`, which is given as many samples as the budget allows."""


def y_ndim(eqn: Any) -> int:
    """Axes of the output."""
    return eqn.outvars[0].aval.ndim


def _permuted(array: jax.Array, *axes: Sequence[int]) -> jax.Array:
    """The array (N, ...) with its axes behind the first in this order."""
    return jnp.transpose(array, (0, *(axis + 1 for part in axes for axis in part)))
