"""Probing to a tolerance: as many probes as the standard error asks for, and no more."""

from __future__ import annotations

from lnp.contract.linearization import Linearization
from lnp.estimators.independent import Independent
from lnp.estimators.probe import Probe, ProbeAverage
from lnp.estimators.signs import Signs
from lnp.estimators.swapped import Swapped


def probe_to_tolerance(
    lin: Linearization, probe: Probe, rtol: float, max_probes: int, start: ProbeAverage | None = None
) -> ProbeAverage:
    """Average probes until the standard error of the first row is below `rtol` times its estimate, or `max_probes` are
    spent.

    Where the signs are balanced over samples, and groups are single samples, probes come in pairs that swap vectors
    between neighbours; else they are independent. The first one may be enough: if a pilot of some samples that are
    probed once more says so, or the spread across groups. An error stops the probing once its effective degrees of
    freedom are enough to trust it. With `start`, an average of two probes or more, it goes on from there.
    """
    balanced = isinstance(lin.signs, Signs) and lin.signs.balanced and probe.groups == lin.outputs.shape[0]
    scheme = (Swapped if balanced else Independent)(lin, probe, rtol, max_probes)
    if start is None:
        state, error, enough = scheme.first()
    else:
        state, error = (start.probes, start.mean, start.squares, start.own), start.error
        enough = lin.xp.zeros_like(error.freedom, dtype=lin.xp.bool)
    state = lin.while_loop(lambda state: scheme.unfinished(state, enough), scheme.turn, state)
    return scheme.finished(state, error, enough)
