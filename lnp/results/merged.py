r"""One decomposition from those of a batch's parts, which were measured one after the other or by several processes.

The loss of the whole is a weighted sum of the parts' losses, L = sum_p a_p L_p: a_p = 1/R for R processes whose
gradients are averaged, a_p = n_p / n for pieces of one mean. Part p has its own g_p = dL_p/df, J_p, Theta_p and n_p. As
J holds the J_p below each other and g the a_p g_p,

    rate     = ||sum_p a_p J_p^T g_p||^2            which needs the sum of the gradients, one vector
    ||g||^2  = sum_p a_p^2 ||g_p||^2,   n = sum_p n_p,   chi_loss = n ||g||^2
    tr Theta = sum_p tr Theta_p,   SE^2 = sum_p SE_p^2,   nu = (sum_p SE_p^2)^2 / sum_p (SE_p^4 / nu_p)

where parts were probed with different seeds, so that their errors are independent (degrees of freedom: Satterthwaite,
Biometrics Bulletin 2 (1946), doi:10.2307/3002019). Everything but the gradient is a number for each part.

The population's values are those of all N samples: sample m of part p contributes a_p G_m, a_p^2 q_m and the share
a_p w_m / W_p. Their jackknife needs <G_m, sum_p a_p G_p>, products with the gradient of the whole, for a few samples of
each part. Without them the parts' own errors are averaged, SE^2 = sum_p a_p^2 SE_p^2 / (sum_p a_p)^2, an upper bound,
since pairs of samples in different parts bring their noise down as well. Many parts may be left out one by one in the
place of samples, which needs <a_p J_p^T g_p, sum_p a_p G_p> alone (docs/theory.md, "Parts of a batch").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lnp.contract.linearization import Linearization
from lnp.estimators.errors import LARGE
from lnp.estimators.population import (
    LEAST,
    LEAST_SAMPLES,
    TOO_FEW,
    Contributions,
    Population,
    Samples,
    Sums,
    assembled,
    left_out,
    values_of,
)
from lnp.estimators.trace import WAYS
from lnp.losses.doubts import CONSTANT, doubts
from lnp.losses.sample_losses import SampleLosses
from lnp.results.decomposition import ByLayer, Decomposition, Layer, decomposed, layer_names
from lnp.results.finished import explained, finished
from lnp.results.gradients import LossGradient, widened
from lnp.results.two_losses import DecomposeWithGradient

PRECISE_LAST = ("joint", "grouped", "per_sample", "exact")
"""Estimators, in the order of their noise."""
OF_THE_WHOLE = "the loss's terms that do not come from the outputs are left out: they are not known for the whole batch"


@dataclass(frozen=True)
class DecomposePart(DecomposeWithGradient):
    """The decomposition of a part of a batch, with what `merged` needs, and the gradient of its loss.

    Of population values a part may have fewer than three samples.
    """

    def __call__(self, lin: Linearization) -> LossGradient:  # type: ignore[override]
        d, found = decomposed(lin, **self._settings, vector=True, part=True)
        assert found.vector is not None, "it was asked for"
        weight = lin.loss_terms if lin.sample_terms is None else lin.xp.sum(lin.sample_terms)
        return LossGradient(d.loss, d.magnitude, widened(lin, found.vector), d, weight=weight)


def merged(
    parts: Sequence[Decomposition],
    weights: Sequence[float],
    square_norms: Mapping[str, float],
    by_layer: ByLayer = False,
    products: Sequence[Any] | None = None,
    part_products: Sequence[tuple[float, float]] | None = None,
) -> Decomposition:
    """The decomposition of L = sum_p a_p L_p, as it is returned to the user, from those of its parts.

    Parameters
    ----------
    parts:
        As `DecomposePart` leaves them: not `finished`, with numbers and NumPy arrays in the place of the framework's.
    weights:
        a_p.
    square_norms:
        {parameter name: ||sum_p a_p J_pl^T g_p||^2}, of the gradients themselves, not divided by any magnitude.
    by_layer:
        As the parts were told.
    products:
        For each part, <G_m, sum_p a_p G_p> for the samples m of its `contributions`, with G_m = J_m^T g_m of the part's
        own loss, not divided; None where they are not known.
    part_products:
        For each part, <u_p, sum_p u_p> and ||u_p||^2 with u_p = a_p J_p^T g_p. Without `products`, 12 parts or more are
        left out one by one.

    Raises
    ------
    ValueError
        For no parts, or not one weight for each.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> x, y = numpy.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), numpy.ones((3, 1))
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
    >>> parts = [lnp.decompose(model, (x[rows], y[rows])) for rows in ([0, 1], [2])]
    >>> whole = lnp.decompose(model, (x, y))
    >>> d = merged(parts, [2 / 3, 1 / 3], {"weight": whole.rate})
    >>> round(d.chi_loss / whole.chi_loss, 9), round(d.chi_net / whole.chi_net, 9), round(d.chi_pos / whole.chi_pos, 9)
    (1.0, 1.0, 1.0)
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"Received {len(parts)} parts and {len(weights)} weights. Expected one weight for each part.")
    a, whole = [float(weight) for weight in weights], [finished(part) for part in parts]
    samples, terms = sum(d.samples for d in whole), math.fsum(float(d.loss_terms) for d in whole)
    g2 = math.fsum(w * w * _ratio(d.chi_loss, d.loss_terms) for w, d in zip(a, whole, strict=True))
    factors = _factors(whole, whole, math.fsum(square_norms.values()), g2)
    layers = {}
    for name, own in layer_names(tuple(square_norms), by_layer).items():
        rate = math.fsum(square_norms[parameter] for parameter in own)
        layers[name] = _factors(whole, [(d.layers or {})[name] for d in whole], rate, g2)
    population = _population(parts, a, g2, factors, products, part_products)
    few = population is not None and samples < LEAST_SAMPLES
    ways = sorted({WAYS[int(d.way)] if d.way else d.estimator for d in parts}, key=PRECISE_LAST.index)
    whole_batch = Decomposition(
        loss=math.fsum(w * float(d.loss) for w, d in zip(a, whole, strict=True)),
        **vars(factors),
        chi_loss=terms * g2,
        loss_terms=int(terms) if terms.is_integer() else terms,
        probes=max(d.probes for d in whole),
        degrees_of_freedom=_freedom(whole),
        layers=layers or None,
        population=None if few else population,
        samples=samples,
        outputs=_outputs(whole),
        estimator=ways[0],
        notes=_notes(parts, ways, few),
        loss_name=", ".join(dict.fromkeys(d.loss_name for d in whole)),
        sample_losses=_sample_losses(whole, a),
        least=max(float(d.least) for d in parts),
    )
    return explained(whole_batch)


def _factors(whole: Sequence[Decomposition], parts: Sequence[Any], rate: float, g2: float) -> Layer:
    """The factors of some parameters, or of all, from those of each part: n_p chi_net_p is a trace."""
    n = [float(d.loss_terms) for d in whole]
    traces = [terms * float(part.chi_net) for terms, part in zip(n, parts, strict=True)]
    errors = [terms * float(part.chi_net_stderr) for terms, part in zip(n, parts, strict=True)]
    trace, error = math.fsum(traces), math.hypot(*errors)
    position = _ratio(_ratio(rate, g2), trace)  # in turn: ||g||^2 tr Theta may overflow
    return Layer(rate, trace / sum(n), position, error / sum(n), position * _ratio(error, trace))


def _freedom(whole: Sequence[Decomposition]) -> float:
    """The degrees of freedom of the sum of the parts' squared errors; 0 where a part cannot tell its own."""
    variances = [(float(d.loss_terms) * float(d.chi_net_stderr)) ** 2 for d in whole]
    total = math.fsum(variances)
    if not math.isfinite(total):
        return 0.0
    own = [max(float(d.degrees_of_freedom), 1e-3) for d in whole]
    shares = [_ratio(variance, total) for variance in variances]
    return min(LARGE, 1 / math.fsum(share**2 / nu for share, nu in zip(shares, own, strict=True))) if total else LARGE


def _population(
    parts: Sequence[Decomposition],
    a: Sequence[float],
    g2: float,
    factors: Layer,
    products: Sequence[Any] | None,
    part_products: Sequence[tuple[float, float]] | None,
) -> Population | None:
    """The population's values, or None where a part has none."""
    contributions = [part.contributions for part in parts if part.contributions is not None]
    if len(contributions) < len(parts):
        return None
    total, n = math.fsum(a), sum(part.samples for part in parts)
    terms = math.fsum(float(part.loss_terms) for part in parts)
    scaled = [
        _scaled(part, own, w, w / total * n / part.samples)
        for part, own, w in zip(parts, contributions, a, strict=True)
    ]
    spread, own = math.fsum(one.spread for one in scaled), math.fsum(one.own for one in scaled)
    sums = Sums(*map(np.float64, (spread, factors.rate, own, g2, terms * factors.chi_net)))
    with np.errstate(all="ignore"):
        if products is None and part_products is not None and len(parts) >= LEAST:
            errors = _jackknife_of_parts(sums, parts, scaled, a, part_products)
        elif products is None:
            errors = [
                math.hypot(*(w / total * one.errors[i] for w, one in zip(a, scaled, strict=True))) for i in range(3)
            ]
            errors[0] *= total * total
        else:
            known = [
                one.samples._replace(products=w * np.asarray(some, dtype=float))
                for one, w, some in zip(scaled, a, products, strict=True)
            ]
            errors = _jackknife(sums, [part.samples for part in parts], known)
        found = assembled(np, n, sums, errors, _ratio(factors.chi_net_stderr, factors.chi_net))
    return Population(**{name: float(value) for name, value in vars(found).items()})


def _scaled(part: Decomposition, own: Contributions, a: float, weight: float) -> Contributions:
    """What a part's samples contribute to the whole: of a g in the place of g / m, and with weights that add up to N.

    The errors stay those of the part's own loss.
    """
    m = float(part.magnitude)
    w, products, q, g2, traces = (np.asarray(values, dtype=float) for values in own.samples)
    rate, *others = map(float, own.errors)
    return Contributions(
        spread=float(own.spread) * weight**2,
        own=float(own.own) * m * m * a * a,
        samples=Samples(w * weight, products, q * m * m * a * a, g2 * m * m * a * a, traces),
        errors=(rate * m * m, *others),
    )


def _jackknife(sums: Sums, sizes: Sequence[int], some: Sequence[Samples]) -> list[float]:
    """The jackknife's errors of rate, position and share of the rate, from M_p of the N_p samples of each part.

    The sum of squares over all samples is that within the parts and that between them, less what the latter has from
    the parts' means being those of M_p samples.
    """
    n, errors = sum(sizes), []
    without = [left_out(np, n, sums, samples) for samples in some]
    for values in zip(*without, strict=True):
        means = [float(np.mean(v)) for v in values]
        variances = [float(np.var(v, ddof=1)) if v.size > 1 else 0.0 for v in values]
        mean = math.fsum(size * x for size, x in zip(sizes, means, strict=True)) / n
        squares = 0.0
        for size, v, x, variance in zip(sizes, values, means, variances, strict=True):
            of_the_mean = variance * (1 / v.size - 1 / size)
            squares += (size - 1) * variance + size * ((x - mean) ** 2 - of_the_mean * (1 - size / n))
        errors.append(math.sqrt((n - 1) / n * max(squares, 0.0)) if squares == squares else math.nan)
    return errors


def _jackknife_of_parts(
    sums: Sums,
    parts: Sequence[Decomposition],
    scaled: Sequence[Contributions],
    a: Sequence[float],
    part_products: Sequence[tuple[float, float]],
) -> list[float]:
    """The jackknife's errors of rate, position and share of the rate, which leaves out whole parts."""
    n, total = sum(part.samples for part in parts), math.fsum(a)
    without = []
    for part, own, weight, (product, square) in zip(parts, scaled, a, part_products, strict=True):
        d = finished(part)
        norm, trace = weight**2 * _ratio(d.chi_loss, d.loss_terms), d.loss_terms * float(d.chi_net)
        rest = Sums(
            sums.spread - own.spread,
            sums.square - 2 * product + square,
            sums.own - own.own,
            sums.norm - norm,
            sums.trace - trace,
        )
        without.append(values_of(np, n, n - part.samples, n * (1 - weight / total), rest))
    count = len(without)
    return [math.sqrt((count - 1) * float(np.var(values))) for values in zip(*without, strict=True)]


def _outputs(whole: Sequence[Decomposition]) -> Any:
    """K; the mean over samples, such that N K is their number, where parts have different ones."""
    mean = math.fsum(d.samples * d.outputs for d in whole) / sum(d.samples for d in whole)
    return int(mean) if mean.is_integer() else mean


def _notes(parts: Sequence[Decomposition], ways: Sequence[str], few: bool) -> tuple[str, ...]:
    """The parts' notes, each once, and what is to be said of the whole."""
    found = [[*part.notes, *doubts(part.evidence)] for part in parts]
    alike = all(CONSTANT in notes for notes in found)  # targets of one part alone say little
    notes = [note for own in found for note in own if alike or note != CONSTANT]
    if len(ways) > 1:
        notes.append(f"parts of the batch took different estimators: {', '.join(ways)}")
    if any(part.total is not None for part in parts):
        notes.append(OF_THE_WHOLE)
    if few:
        notes.append(f"no population values: {TOO_FEW}")
    return tuple(dict.fromkeys(notes))


def _sample_losses(whole: Sequence[Decomposition], a: Sequence[float]) -> SampleLosses | None:
    """What each sample adds to the loss of the whole, part by part; None where a part does not tell."""
    found = [d.sample_losses for d in whole if d.sample_losses is not None]
    if len(found) < len(whole):
        return None
    total = math.fsum(a)
    added = [w * np.asarray(one.parts) for w, one in zip(a, found, strict=True)]
    shares = [w / total * np.asarray(one.shares) for w, one in zip(a, found, strict=True)]
    return SampleLosses(np.concatenate(added), np.concatenate(shares))


def _ratio(numerator: Any, denominator: Any) -> float:
    """numerator / denominator, and nan where that is none."""
    return float(numerator) / float(denominator) if denominator else math.nan
