"""The record that every backend builds and the core works on.

A model with trainable parameters theta and a batch of N samples has outputs f of shape (N, K). Around theta the record
offers the Jacobian J = df/dtheta (N*K rows, one column per parameter) as operators, never as a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import array_api_compat

Array = Any
"""An array of the backend's framework; the core uses it through the array API alone."""

Namespace = Any
"""The array-API namespace of a framework, `xp`."""

Vector = Mapping[str, Array]
"""A vector in parameter space: {parameter name: array of the parameter's shape}."""

CHEAP = 2.0
"""Pull-backs of the batch up to which single samples are cheap."""
MAPPED_COST = 4.0
"""Pull-backs that single samples cost where a framework maps over them, in chunks (2.4 to 13 measured)."""


def while_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], state: Any) -> Any:
    """Repeat `state = body(state)` while `condition(state)`; a compiling backend supplies its own."""
    while condition(state):
        state = body(state)
    return state


@dataclass(frozen=True)
class Subset:
    """Some samples of a batch, drawn at random, with a forward pass of their own.

    Attributes
    ----------
    index:
        Which samples, ascending, shape (M,).
    sample_square_norms:
        v (M, K) -> {parameter name: (M,) array of ||J_ml^T v_m||^2}.
    jvp:
        u -> J u of shape (M, K), or None.
    """

    index: Array
    sample_square_norms: Callable[[Array], Mapping[str, Array]]
    jvp: Callable[[Vector], Array] | None = None


@dataclass(frozen=True)
class GradientPass:
    """What one backward pass of the loss has yielded. What was not asked for may be there as well, or not.

    Let g = dL/df be the loss gradient.

    Attributes
    ----------
    square_norms:
        {parameter name: ||J_l^T g||^2, shape ()}.
    sample_square_norms:
        {parameter name: (N,) array of ||J_nl^T g_n||^2}, or None.
    products:
        (M,) array of <J_m^T g_m, J^T g>, the inner products of M samples' gradients with that of the batch, or None.
    index:
        (M,) array: which samples these are, drawn at random. None if they are all, in their order.
    vector:
        J^T g, or None.
    magnitude:
        m, shape (), where all of this is of g / m in the place of g, whose squares stay in the range of numbers
        (`unit`); None where it is of g itself, as in a step that trains.
    """

    square_norms: Mapping[str, Array]
    sample_square_norms: Mapping[str, Array] | None = None
    products: Array | None = None
    index: Array | None = None
    vector: Vector | None = None
    magnitude: Array | None = None


@dataclass(frozen=True)
class Linearization:
    """A network and its loss around the current parameters, for one batch.

    Let f be the outputs of shape (N, K), theta the trainable parameters and J[n, k, p] = d f[n, k] / d theta[p].

    Attributes
    ----------
    xp:
        Array-API namespace of the arrays below.
    outputs:
        f, shape (N, K).
    loss:
        L(f), shape ().
    loss_gradient:
        g = dL/df, shape (N, K).
    loss_terms:
        Number of terms that the loss's mean reduction averages; an int or an array of shape ().
    vjp:
        v (N, K) -> J^T v = {parameter name: array of its shape} (vector-Jacobian product with cotangent v).
    inner_products:
        (u, w) -> {parameter name: <u_l, w_l>}, each of shape (), accumulated in float32 or better.
    signs:
        probe index -> (N, K) random signs in the outputs' dtype, on their device; the same index gives the same signs.
        `lnp.estimators.signs.Signs`, whose samples are balanced, or any function that gives independent ones.
    jvp:
        u -> J u of shape (N, K) (Jacobian-vector product), or None.
    gradient_pass:
        (per_sample, products, vector) -> `GradientPass`, what the core asks of the backward pass of the loss: the
        squared norms of single samples if `per_sample` is true, the inner products of `products` samples, J^T g itself
        if `vector` is true. What a backend leaves out the core takes from the other operators
        (`lnp.contract.gradient_pass`); one without `jvp` leaves out no products. None where the backend has nothing
        better than `vjp`.
    sample_square_norms:
        v -> {parameter name: (N,) array of ||J_nl^T v_n||^2}, without N x P memory. None where it cannot be had.
    subset:
        M -> `Subset` of M samples, or None where the backend has none to offer. The same samples at each call.
    subset_pays:
        Whether a pass over a few of the samples is much cheaper than one over all: not where the work is small beside
        what starts it.
    sample_cost:
        What `sample_square_norms` costs, in pull-backs of the batch: about 1 where the backward pass yields them,
        N where they run one after the other.
    coupled:
        () -> array of shape (), True if the samples have turned out to interact although they are taken apart: in any
        pass that ran since the record was made, a sample's outputs or its gradient were not those that it has in the
        batch. The core asks after its last pass, and its numbers are nan where they do. None where samples are not
        taken apart, and where the backend cannot look.
    group_square_norms:
        v -> {parameter name: (G,) array of ||J_gl^T v_g||^2} for the G groups of samples that the batch was split into
        (micro-batches), or None. With one group, a whole batch: without J^T v in memory.
    groups:
        G.
    loss_along:
        (u, step) -> L at theta + step * u, shape (): the loss after a step that is really taken. Nothing is changed.
    separable:
        Whether the loss is known to be a mean over samples.
    sample_terms:
        w_n, shape (N,): what each sample weighs in that mean, its number of labels or the sum of their classes'
        weights, up to a factor that all have in common. None where all weigh the same, or nobody knows.
    sample_losses:
        () -> (N,) array, the loss of each sample by itself, at the outputs that it has in the batch; nan where the loss
        takes no single samples. None where the backend cannot tell.
    violations:
        (array of shape () that is True when a check of values fails, error message) pairs. The core's numbers are
        nan where one is True; a backend that can read it raises the error.
    notes:
        What the user should know about how the record was made.
    loss_name:
        Which loss it is, in words.
    evidence:
        Rows of the batch in which it shows whether that loss was meant (`lnp.losses.evidence`).
    while_loop:
        (condition, body, state) -> state; a compiling framework's own loop, otherwise Python's.
    """

    xp: Any
    outputs: Array
    loss: Array
    loss_gradient: Array
    loss_terms: Any
    vjp: Callable[[Array], Vector]
    inner_products: Callable[[Vector, Vector], Mapping[str, Array]]
    signs: Callable[[Any], Array]
    jvp: Callable[[Vector], Array] | None = None
    gradient_pass: Callable[[bool, int, bool], GradientPass] | None = None
    sample_square_norms: Callable[[Array], Mapping[str, Array]] | None = None
    subset: Callable[[int], Subset] | None = None
    subset_pays: bool = True
    sample_cost: float = MAPPED_COST
    coupled: Callable[[], Array] | None = None
    group_square_norms: Callable[[Array], Mapping[str, Array]] | None = None
    groups: int = 1
    loss_along: Callable[[Vector, Any], Array] | None = None
    separable: bool = False
    sample_terms: Array | None = None
    sample_losses: Callable[[], Array] | None = None
    violations: tuple[tuple[Array, str], ...] = ()
    notes: tuple[str, ...] = ()
    loss_name: str = ""
    evidence: Mapping[str, tuple[Array, ...]] = field(default_factory=dict)
    while_loop: Callable = while_loop

    @property
    def cheap(self) -> bool:
        """Whether single samples cost so little that population values come by default."""
        return self.sample_cost <= CHEAP


def accumulation_dtype(xp: Any, dtype: Any) -> Any:
    """Where sums are taken: float64 for float64, float32 for everything narrower."""
    return xp.float64 if dtype == xp.float64 else xp.float32


def device_of(array: Array) -> Any:
    """The device on which to make what an array meets; None where its framework has none, or needs not be told.

    JAX moves what is made without a device to where it is used. Its tracers have none, and write a message of where
    they come from before they say so, in a time that grows with all that was traced.
    """
    return None if array_api_compat.is_jax_array(array) else getattr(array, "device", None)


def square_norm(xp: Any, array: Array) -> Array:
    """||array||^2 over all elements, accumulated in float32 or better. Shape ()."""
    wide = xp.astype(array, accumulation_dtype(xp, array.dtype), copy=False)
    return xp.sum(wide * wide)


def unit(xp: Any, array: Array) -> tuple[Array, Array]:
    """(array / m, m) with m its largest entry, shape (): numbers whose squares neither vanish nor overflow.

    >>> import numpy
    >>> [part.tolist() for part in unit(numpy, numpy.asarray([4e-30, -2e-30], dtype="float32") / 4e-30)]
    [[1.0, -0.5], 1.0]
    """
    wide = xp.astype(array, accumulation_dtype(xp, array.dtype), copy=False)
    magnitude = xp.max(xp.abs(wide))
    least = float(xp.finfo(wide.dtype).smallest_normal)  # of zeros, which stay zeros
    magnitude = xp.maximum(magnitude, xp.full_like(magnitude, least))
    return wide / magnitude, magnitude


def coupling_tolerance(xp: Any, dtype: Any) -> float:
    """The relative difference up to which a sample alone and in its batch are the same: 4 sqrt(eps), at most 0.05."""
    return min(4.0 * float(xp.finfo(dtype).eps) ** 0.5, 0.05)


def valid(lin: Linearization, value: Array) -> Array:
    """The value, or nan where a check of the record failed. Shape ()."""
    flags = [flag for flag, _ in lin.violations]
    for flag in flags if lin.coupled is None else [*flags, lin.coupled()]:
        value = lin.xp.where(flag, value * float("nan"), value)
    return value


def ratio(xp: Any, numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and nan for 0/0 without the framework's warning."""
    zero = denominator == 0
    safe = xp.where(zero, xp.ones_like(denominator), denominator)
    return xp.where(zero, xp.full_like(denominator, float("nan")), numerator / safe)
