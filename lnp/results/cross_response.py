"""Cross response: how the loss on one batch answers to a step taken on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lnp.contract.linearization import Array, GradientPass, Linearization, ratio, valid
from lnp.results import display
from lnp.results.decomposition import Decomposition, sum_of
from lnp.results.finished import explained
from lnp.results.tables import Page, Shown


@dataclass(frozen=True)
class CrossResponse(Shown):
    """-dL_m/dt = <grad L_m, grad L_t> and its factors: floats, or 0-d arrays inside a compiled function.

    Attributes
    ----------
    rate:
        Speed at which the measured loss falls while gradient descent trains on the other batch; may be negative.
    chi_loss, chi_net:
        Geometric means of the two batches' loss and network scales.
    chi_pos:
        rate / (chi_loss chi_net), in [-1, 1]; nan for 0/0.
    chi_net_stderr, chi_pos_stderr:
        Standard errors, at most: those of the two traces may go together.
    trained, measured:
        The decomposition of each batch.
    notes:
        What the user should know beside the notes of the two decompositions.
    """

    rate: float
    chi_loss: float
    chi_net: float
    chi_pos: float
    chi_net_stderr: float
    chi_pos_stderr: float
    trained: Decomposition
    measured: Decomposition
    notes: tuple[str, ...] = ()

    def _page(self) -> Page:
        return display.cross_page(self)


def cross_response_of(
    trained: Linearization,
    measured: Linearization,
    decomposed: Callable[[Linearization], tuple[Decomposition, GradientPass]],
) -> CrossResponse:
    """The cross response of two linearised batches of one model, for `finished`. Pure, safe to trace and compile.

    `decomposed` takes a record to its decomposition and to the backward pass of its loss, with J^T g.
    """
    t, t_pass = decomposed(trained)
    m, m_pass = decomposed(measured)
    assert t_pass.vector is not None, "`decomposed` asks for it"
    assert m_pass.vector is not None, "`decomposed` asks for it"
    found = trained.inner_products(t_pass.vector, m_pass.vector)
    return response(trained.xp, valid(trained, valid(measured, sum_of(found, found))), t, m)


def response(xp: Any, rate: Array, t: Decomposition, m: Decomposition) -> CrossResponse:
    """The factors of <grad L_m, grad L_t>, from the decompositions of both batches.

    With the relative errors a and b of the two traces, that of their geometric mean is (a + b) / 2 at most: both are
    probed with the same signs, so that their errors go together, on one batch entirely.
    """
    # the roots and ratios in turn, since products may overflow
    chi_loss = xp.sqrt(t.chi_loss) * xp.sqrt(m.chi_loss)
    chi_net = xp.sqrt(t.chi_net) * xp.sqrt(m.chi_net)
    relative = 0.5 * (ratio(xp, t.chi_net_stderr, t.chi_net) + ratio(xp, m.chi_net_stderr, m.chi_net))
    chi_pos = ratio(xp, ratio(xp, rate, chi_loss), chi_net)
    return CrossResponse(
        rate=rate,
        chi_loss=chi_loss,
        chi_net=chi_net,
        chi_pos=chi_pos,
        chi_net_stderr=chi_net * relative,
        chi_pos_stderr=abs(chi_pos) * relative,
        trained=t,
        measured=m,
    )


def finished(c: CrossResponse) -> CrossResponse:
    """The cross response of two loss gradients, from that of both divided by their magnitudes (`decomposed`).

    Arrays inside a compiled function have no value yet.
    """
    t, m = c.trained.magnitude, c.measured.magnitude
    trained, measured = explained(c.trained), explained(c.measured)
    return replace(c, rate=c.rate * t * m, chi_loss=c.chi_loss * t * m, trained=trained, measured=measured)
