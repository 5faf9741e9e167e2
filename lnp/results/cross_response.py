"""Cross response: how the loss on one batch answers to a step taken on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lnp.contract.linearization import GradientPass, Linearization, ratio, valid
from lnp.results.decomposition import Decomposition, sum_of
from lnp.results.finished import explained


@dataclass(frozen=True)
class CrossResponse:
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
        Standard errors.
    trained, measured:
        The decomposition of each batch.
    """

    rate: Any
    chi_loss: Any
    chi_net: Any
    chi_pos: Any
    chi_net_stderr: Any
    chi_pos_stderr: Any
    trained: Decomposition
    measured: Decomposition


def cross_response_of(
    trained: Linearization,
    measured: Linearization,
    decomposed: Callable[[Linearization], tuple[Decomposition, GradientPass]],
) -> CrossResponse:
    """The cross response of two linearised batches of one model, for `finished`. Pure, safe to trace and compile.

    `decomposed` takes a record to its decomposition and to the backward pass of its loss, with J^T g. The two traces
    are estimated with independent errors a and b (relative), so that the relative error of their geometric mean is
    sqrt(a^2 + b^2) / 2.
    """
    xp = trained.xp
    t, t_pass = decomposed(trained)
    m, m_pass = decomposed(measured)
    assert t_pass.vector is not None, "`decomposed` asks for it"
    assert m_pass.vector is not None, "`decomposed` asks for it"
    products = trained.inner_products(t_pass.vector, m_pass.vector)
    rate = valid(trained, valid(measured, sum_of(products, products)))
    # the roots and ratios in turn, since products may overflow
    chi_loss = xp.sqrt(t.chi_loss) * xp.sqrt(m.chi_loss)
    chi_net = xp.sqrt(t.chi_net) * xp.sqrt(m.chi_net)
    errors = [ratio(xp, d.chi_net_stderr, d.chi_net) for d in (t, m)]
    relative = 0.5 * xp.sqrt(errors[0] ** 2 + errors[1] ** 2)
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
