"""From what a computation yields to what is returned: units put back, and notes on numbers that are not what they seem.

A computation measures g / m in the place of the loss gradient g, with m its largest entry, since the squares of g may
leave the range of float32 although rate and loss scale, as Python's floats, do not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lnp.estimators.trace import WAYS
from lnp.losses.doubts import doubts

Decomposition = Any
"""A `lnp.Decomposition`, whose own file imports this one."""
SCALED = ("rate", "rate_stderr", "gradient_noise")
"""Values of a layer or the population that go with the square of the loss gradient."""
MANY = 64
"""Probes from which on it is told that they were not enough: so many are spent without `max_probes`."""
ABOVE_ONE = 1e-3
"""How far a position that is 1 may come out above it by rounding."""


def finished(d: Decomposition) -> Decomposition:
    """The decomposition of g, from that of g / m: with the rates and the loss scale multiplied with m^2.

    In turn, since m^2 alone may be out of range.
    """
    m = d.magnitude

    def scaled(part: Any) -> Any:
        """With the rates of a layer or the population multiplied."""
        rates = {name: getattr(part, name) * m * m for name in SCALED if hasattr(part, name)}
        return replace(part, **rates)

    return replace(
        d,
        rate=d.rate * m * m,
        chi_loss=d.chi_loss * m * m,
        layers=None if d.layers is None else {name: scaled(part) for name, part in d.layers.items()},
        population=None if d.population is None else scaled(d.population),
        magnitude=1.0,
        least=0.0,
        rtol=0.0,
        evidence={},
        contributions=None,
    )


def explained(d: Decomposition, unscaled: bool = False) -> Decomposition:
    """The decomposition that is returned to the user, with notes on numbers that are nan or cannot be.

    `unscaled` says that the gradient was squared as it is. Arrays inside a compiled function have no value yet.
    """
    if not isinstance(d.loss, float):
        return finished(d)
    notes, done = list(doubts(d.evidence)), finished(d)
    if not all(map(math.isfinite, (d.loss, d.rate, d.chi_loss, d.chi_net))):
        notes.append("outputs, loss or gradients are not finite, or their squares overflow: what they touch is nan")
    elif not (done.rate < math.inf and done.chi_loss < math.inf) or (d.chi_loss and not done.chi_loss):
        notes.append("rate or loss scale leave the range of numbers")
    if d.chi_loss == 0:
        notes.append("the loss gradient is zero: chi_pos is 0/0, nan")
    if d.chi_net == 0:
        notes.append(
            "the outputs do not respond to the parameters (J = 0, or its squares are below all numbers): chi_pos is "
            "0/0, nan"
        )
    small = [name for name, part in _traces(d).items() if 0 < part < d.least]
    if small:
        notes.append(
            f"squares of the Jacobian have lost digits in float32: {', '.join(small)} and chi_pos are not exact"
        )
    if unscaled and 0 <= done.rate < d.least and d.chi_loss > 0:
        notes.append("squares of the step's own gradient have lost digits in float32: rate and chi_pos are not exact")
    error = d.chi_pos_stderr if math.isfinite(d.chi_pos_stderr) else 0.0
    if d.chi_pos > 1 + max(error, ABOVE_ONE):
        notes.append(
            "chi_pos is above 1 by more than its error, which cannot be: the kernel's trace is too small for the "
            "gradient, by rounding or by chance of the probes"
        )
    if d.rtol and d.probes >= MANY and d.chi_net_stderr > 2 * d.rtol * d.chi_net:
        notes.append(
            f"chi_net is less certain than rtol={d.rtol:g} asks for, after {d.probes} probes: a larger batch, or "
            "samples that do not interact, would need fewer"
        )
    used = WAYS[int(d.way)] if d.way else d.estimator
    return replace(done, estimator=used, way=0, notes=(*d.notes, *notes))


def _traces(d: Decomposition) -> dict[str, float]:
    """{name: trace of the kernel}, of the whole and of the layers."""
    layers = {f"chi_net of {name}": part.chi_net * d.loss_terms for name, part in (d.layers or {}).items()}
    return {"chi_net": d.chi_net * d.loss_terms, **layers}
