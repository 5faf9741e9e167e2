"""Probes of groups of samples, and what averages of them are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lnp.contract.linearization import Array, Linearization
from lnp.estimators.errors import Error

PILOT = 16
"""Samples of a pilot at least: the differences of their pairs have to tell an error that is trusted."""
Count = int | Array
"""A number of probes; an array of shape () where it depends on values, as in a compiled loop."""


@dataclass(frozen=True)
class Pilot:
    """Probes of some samples, drawn at random.

    Attributes
    ----------
    index:
        The indices of the samples, ascending, shape (M,).
    square_norms:
        v (N, K) -> (R, M) array of ||J_rm^T v_m||^2.
    """

    index: Array
    square_norms: Callable[[Array], Array]


@dataclass(frozen=True)
class Exact:
    """Orthogonal probes that together are exact.

    Attributes
    ----------
    probes:
        How many.
    square_norms:
        () -> (R, G) array, the sums of their squared norms.
    """

    probes: int
    square_norms: Callable[[], Array]


@dataclass(frozen=True)
class Probe:
    """v (N, K) -> (R, G) array of squared norms, one for each row of parameters and group of samples.

    Attributes
    ----------
    square_norms:
        The function.
    groups:
        G.
    rows:
        R.
    pilot:
        Makes the pilot where groups are single samples, or None.
    exact:
        What takes over once the random probes that are still needed are likely to be more, or None.
    """

    square_norms: Callable[[Array], Array]
    groups: int
    rows: int
    pilot: Callable[[], Pilot] | None = None
    exact: Exact | None = None


@dataclass(frozen=True)
class ProbeAverage:
    """The average of the probes that were spent.

    Attributes
    ----------
    mean:
        (R, G) averages over the probes.
    error:
        Of the sums over groups.
    probes:
        How many cotangents were pulled back for each group.
    squares, own:
        What the error is made of, where more probes may follow: see `State`.
    exact:
        1 where orthogonal probes took over, else 0.
    """

    mean: Array
    error: Error
    probes: Count
    squares: Array
    own: Array
    exact: Count = 0


def pilot_size(samples: int) -> int:
    """M: an eighth of the samples, but as many as an error asks for, in pairs; all where that is more than half.

    >>> [pilot_size(samples) for samples in (8, 31, 32, 64, 128, 728, 808)]
    [8, 31, 16, 16, 16, 92, 102]
    """
    size = max(samples // 8 + samples // 8 % 2, PILOT)
    return size if 2 * size <= samples else samples


def compute_if(
    lin: Linearization, condition: Array, compute: Callable[[], tuple[Array, ...]], otherwise: tuple[Array, ...]
) -> tuple[Array, ...]:
    """`compute()` where the condition holds; a loop of at most one turn, which every framework has."""

    def body(state: tuple) -> tuple:
        return state[0] + 1, *compute()

    return lin.while_loop(lambda state: (state[0] < 1) & condition, body, (0, *otherwise))[1:]
