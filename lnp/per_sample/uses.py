r"""Uses of a parameter in a network's operations: joined where they add, then squared.

An operation makes of a parameter, for each sample n, a gradient in one of five forms:

    outer        sum_s left[n, s] right[n, s]^T       weights of linear maps
    rows         sum_s e_index[n, s] values[n, s]^T   embeddings
    dense        the gradient itself (N, ...)         biases and scales, which are small
    convolution  a kernel's, from x and the cotangent of x * W
    experts      sum_r e_expert[r] x left[r] x right[r] over a sample's rows, weights that divide them between them

A backend's rule says which (`Use`). Several uses of the same numbers add before they are squared; uses of different
numbers do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lnp.contract.linearization import Array, device_of
from lnp.per_sample import experts, norms

Kind = Literal["outer", "rows", "dense", "convolution", "experts"]


@dataclass(frozen=True)
class Factors:
    """The gradients of N samples by one use of a parameter.

    Attributes
    ----------
    kind:
        In which form.
    arrays:
        outer: left (N, S, p) and right (N, S, q). rows: index (N, S) and values (N, S, q). dense: the gradients
        (N, ...). convolution: x, cotangent and window, as the backend's convolution takes them. experts: which rows are
        sent where, left (R, p) and right (R, q).
    """

    kind: Kind
    arrays: tuple[Any, ...]

    def of(self, some: Array | slice) -> Factors:
        """The gradients of some samples."""
        if self.kind == "experts":
            sent, left, right = self.arrays
            return Factors(self.kind, (sent.of(some), left, right))
        return Factors(self.kind, tuple(f[some] if hasattr(f, "shape") else f for f in self.arrays))

    def transposed(self) -> Factors:
        """Of the transposed weight."""
        return Factors(self.kind, self.arrays[::-1]) if self.kind == "outer" else self


def addable(kinds: Iterable[Kind]) -> bool:
    """Whether uses of the same numbers in these forms can be joined before they are squared.

    >>> addable(["outer", "rows", "outer"]), addable(["dense", "dense"]), addable(["convolution", "convolution"])
    (True, True, False)
    """
    kinds = list(kinds)
    return len(kinds) == 1 or set(kinds) <= {"outer", "rows"} or set(kinds) == {"dense"}


def by_frame(frames: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """{which numbers of a parameter: the uses of them}, from each use's frame.

    >>> by_frame(["whole", "first half", "whole"])
    {'whole': [0, 2], 'first half': [1]}
    """
    found: dict[Hashable, list[int]] = {}
    for number, frame in enumerate(frames):
        found.setdefault(frame, []).append(number)
    return found


def readable(frames: Sequence[Hashable], kinds: Sequence[Kind], disjoint: Callable[[list[Hashable]], bool]) -> bool:
    """Whether the uses of one parameter can be squared: those of the same numbers add, all others do not overlap."""
    groups = by_frame(frames)
    if len(groups) > 1 and not disjoint(list(groups)):
        return False
    return all(addable([kinds[number] for number in group]) for group in groups.values())


def square_norms(
    xp: Any, uses: Sequence[Factors], convolution: Callable[..., Array] | None = None, budget: int = norms.BUDGET
) -> Array:
    """||sum of the uses||^2 for each sample, (N,). The uses are of the same numbers, in forms that add.

    `convolution` takes the arrays of that form to squared norms, where a backend has a faster way than
    `lnp.per_sample.norms.convolution`. `budget` is as there: numbers that are in memory at a time.
    """
    kind = uses[0].kind
    if kind == "convolution":
        (use,) = uses
        if convolution is not None:
            return convolution(*use.arrays)
        x, cotangent, window = use.arrays
        return norms.convolution(xp, x, cotangent, window, budget)
    if kind == "experts":
        ((sent, left, right),) = [use.arrays for use in uses]
        return experts.square_norms(sent, left, right, budget)
    if kind == "dense":
        return norms.dense(xp, total(xp, [use.arrays[0] for use in uses]))
    outer = joined(xp, [use.arrays for use in uses if use.kind == "outer"])
    rows = joined(xp, [use.arrays for use in uses if use.kind == "rows"])
    found = []
    if outer:
        left, right = outer
        found.append(norms.outer(xp, left, right, budget=budget))
    if rows:
        index, values = rows
        found.append(norms.rows(xp, index, values, budget))
    if outer and rows:
        found.append(2 * norms.rows_and_outer(xp, index, values, left, right, budget))
    return total(xp, found)


def gradients(xp: Any, use: Factors, shape: Sequence[int]) -> Array:
    """The gradients of N samples themselves, (N, *shape) for a parameter that the use sees in this shape.

    For what is computed from a parameter before it meets the samples: its gradient has to be there to be pulled back
    to the parameter's.
    """
    if use.kind == "convolution":
        return xp.reshape(norms.convolution_gradients(xp, *use.arrays), (-1, *shape))
    if use.kind == "dense":
        return xp.reshape(use.arrays[0], (-1, *shape))
    if use.kind == "experts":
        return xp.reshape(experts.gradients(*use.arrays), (-1, *shape))
    if use.kind == "outer":
        left, right = use.arrays
        return xp.reshape(xp.matmul(xp.matrix_transpose(left), right), (-1, *shape))
    index, values = use.arrays
    rows = xp.arange(shape[0], dtype=index.dtype, device=device_of(index))
    chosen = xp.astype(index[:, None, :] == rows[None, :, None], values.dtype)
    return xp.reshape(xp.matmul(chosen, values), (-1, *shape))


def inner_products(xp: Any, use: Factors, u: Array) -> Array:
    """<gradient of sample n, u> by one use that is no convolution, with u of the parameter's shape as the use sees it.

        outer    sum_s (left_ns u) . right_ns
        rows     sum_s u[index_ns] . values_ns
        dense    gradient_n . u
        experts  sum_r (left_r u[expert_r]) . right_r

    Shape (N,). Rows of negative index are left out.
    """
    if use.kind == "experts":
        sent, left, right = use.arrays
        return experts.inner_products(sent, left, right, u)
    if use.kind == "outer":
        left, right = use.arrays
        product = xp.matmul(left, xp.astype(u, left.dtype, copy=False)) * right
    elif use.kind == "rows":
        index, values = use.arrays
        table = xp.reshape(xp.astype(u, values.dtype, copy=False), (u.shape[0], -1))
        flat = xp.reshape(xp.where(index < 0, xp.zeros_like(index), index), (-1,))
        looked_up = xp.reshape(xp.take(table, flat, axis=0), values.shape)
        product = xp.where((index >= 0)[:, :, None], looked_up * values, xp.zeros_like(values))
    else:
        (gradient,) = use.arrays
        product = gradient * xp.reshape(xp.astype(u, gradient.dtype, copy=False), gradient.shape[1:])
    return xp.sum(xp.reshape(product, (product.shape[0], -1)), axis=1)


def joined(xp: Any, factors: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Factors of several uses, one after the other along the places S that add. () for none."""
    if len(factors) < 2:
        return factors[0] if factors else ()
    return tuple(xp.concat(list(same), axis=1) for same in zip(*factors, strict=True))


def total(xp: Any, arrays: Sequence[Array]) -> Array:
    """The sum of gradients of the same numbers, in the first one's shape."""
    found = arrays[0]
    for array in arrays[1:]:
        found = found + xp.reshape(array, found.shape)
    return found
