r"""The loss-network-position (LNP) decomposition of the speed at which a loss falls.

    rate     = -dL/dt = ||J^T g||^2 = chi_loss * chi_net * chi_pos
    chi_loss = n ||g||^2                             loss scale
    chi_net  = tr(Theta) / n                         network scale
    chi_pos  = g^T Theta g / (||g||^2 tr Theta)      spectral position

with outputs f of shape (N, K), g = dL/df, J = df/dtheta, the empirical neural tangent kernel Theta = J J^T, and n
the number of terms that the loss's mean reduction averages.

Source: Nikolaou, Scheunemann, Krippendorf, Tovey, Holm, "Spectral Reach", arXiv 2605.31244.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lnp.contract.gradient_pass import gradient_pass
from lnp.contract.linearization import (
    Array,
    GradientPass,
    Linearization,
    accumulation_dtype,
    device_of,
    ratio,
    square_norm,
    unit,
    valid,
)
from lnp.estimators.population import LEAST_SAMPLES, Contributions, Population, jackknife_size, why_none
from lnp.estimators.population import population as population_of
from lnp.estimators.trace import TraceEstimate
from lnp.estimators.weighing import choose, estimate_chosen
from lnp.losses.sample_losses import SampleLosses, sample_losses_of
from lnp.results import display
from lnp.results.finished import finished
from lnp.results.tables import Page, Shown

ByLayer = bool | Callable[[str], str]
APART = ("exact", "per_sample")
"""Estimators that may take samples one at a time."""


@dataclass(frozen=True)
class Layer:
    """One layer's part: Theta = sum_l Theta_l, so that rates and network scales add up over layers.

    chi_pos_l = rate_l / (||g||^2 tr Theta_l), and the whole is chi_pos = sum_l (chi_net_l / chi_net) chi_pos_l.
    """

    rate: float
    chi_net: float
    chi_pos: float
    chi_net_stderr: float
    chi_pos_stderr: float


@dataclass(frozen=True)
class Total:
    """The loss with terms that do not come from the outputs (regularisation), and the rate at which it falls."""

    loss: float
    rate: float


@dataclass(frozen=True)
class Decomposition(Shown):
    """The three factors of -dL/dt, with standard errors: floats, or 0-d arrays inside a compiled function.

    Attributes
    ----------
    loss:
        L.
    rate:
        -dL/dt = ||J^T g||^2 under gradient flow, exact. Loss per unit of (learning rate x step).
    chi_loss, chi_net, chi_pos:
        Loss scale (>= 0), network scale (>= 0), spectral position (in [0, 1]). Their product is the rate.
        chi_pos is nan (0/0) where g = 0 or J = 0.
    chi_net_stderr, chi_pos_stderr:
        Standard errors: 0 where the trace is exact, nan where a single probe cannot tell.
    loss_terms:
        n, the number of terms that the loss's mean reduction averages.
    probes:
        Cotangents spent on the trace.
    degrees_of_freedom:
        Of the standard errors, effectively: the truth is within them as often as Student's t with so many says. Below
        about 10 single errors are rough themselves. A million where nothing is estimated.
    samples, outputs:
        N and K.
    estimator:
        How the trace was obtained: "exact", "per_sample", "grouped" or "joint".
    layers:
        {layer: Layer}, or None unless asked for.
    population:
        Position and rate without the floor of a finite batch, or None unless asked for.
    notes:
        What the user should know.
    loss_name:
        Which loss was measured, in words: "cross-entropy of logits, inferred from the targets", or the name of the
        function that was given.
    total:
        The whole loss, where it has terms that do not come from the outputs and a backend can measure them: its loss,
        and its rate ||J^T g + dR/dtheta||^2 with R the sum of these terms, which all other values leave out. None
        elsewhere.
    sample_losses:
        What each sample adds to the loss, where it was asked for and the loss is a sum over samples; else None.
    magnitude, least, rtol, evidence, contributions:
        Of the computation; 1, 0, 0, empty and None in what is returned. See `lnp.results.finished` and
        `lnp.results.merged`.
    """

    loss: float
    rate: float
    chi_loss: float
    chi_net: float
    chi_pos: float
    chi_net_stderr: float
    chi_pos_stderr: float
    loss_terms: float
    probes: float
    degrees_of_freedom: float
    layers: Mapping[str, Layer] | None
    population: Population | None
    samples: int
    outputs: int
    estimator: str
    notes: tuple[str, ...] = ()
    loss_name: str = ""
    total: Total | None = None
    sample_losses: SampleLosses | None = field(default=None, repr=False, compare=False)
    magnitude: Any = field(default=1.0, repr=False)
    least: Any = field(default=0.0, repr=False)
    rtol: Any = field(default=0.0, repr=False)
    way: Any = field(default=0, repr=False)
    evidence: Mapping[str, tuple[Array, ...]] = field(default_factory=dict, repr=False, compare=False)
    contributions: Contributions | None = field(default=None, repr=False, compare=False)

    @property
    def preference(self) -> float:
        """chi_pos N K: how much faster the loss gradient decays than a direction without preference among the modes.

            chi_pos N K = (g^T Theta g / ||g||^2) / (tr Theta / (N K))

        the Rayleigh quotient of g in units of the kernel's mean eigenvalue, in [0, N K]: 1 is the mean of all
        directions, more is the head, less the tail. It has the relative error of chi_pos. It grows with N, for chi_pos
        does not go as 1/N: compare it within one size of batch (docs/theory.md, "A scale for the position").

        Examples
        --------
        >>> import numpy, lnp, lnp_numpy
        >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
        >>> d = lnp.decompose(model, (numpy.array([[2.0, 0.0], [0.0, 1.0]]), numpy.ones((2, 1))))
        >>> round(d.chi_pos, 6), round(d.preference, 6)  # as much on the eigenvalue 4 as on 1
        (0.5, 1.0)
        """
        return self.chi_pos * (self.samples * self.outputs)

    def predicted_loss_change(self, learning_rate: float) -> float:
        """Loss change of one step of gradient descent to first order: -learning_rate * rate."""
        return -learning_rate * self.rate

    def to_dict(self) -> dict[str, Any]:
        """The values by name, without notes; layers as "layer/<name>/<value>"."""
        return display.to_dict(self)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row for the whole and one for each layer. Needs pandas."""
        return display.to_pandas(self)

    def _page(self) -> Page:
        return display.page(self)


def decompose(lin: Linearization, **settings: Any) -> Decomposition:
    """Decompose one linearised batch. Pure, safe to trace and compile; every number is an array of shape ().

    Where a check of the record fails (labels out of range, samples that interact although they were taken apart), the
    numbers are nan. Settings are those of `decomposed`.
    """
    return finished(decomposed(lin, **settings)[0])


def decomposed(
    lin: Linearization,
    *,
    estimator: str = "auto",
    rtol: float = 0.01,
    max_probes: int = 64,
    by_layer: ByLayer = False,
    population: bool | None = False,
    vector: bool = False,
    sample_losses: bool = False,
    part: bool = False,
) -> tuple[Decomposition, GradientPass]:
    """The decomposition, and the backward pass of the loss that it was made of: with J^T g if `vector` is true.

    Both are those of g / m, with the magnitude m of the loss gradient, whose squares stay in the range of float32.
    `finished` multiplies the decomposition with m^2, on the host in Python's floats. `part` says that the batch is a
    part of a larger one: then the decomposition holds what `lnp.results.merged` needs.
    """
    choice = choose(lin, estimator, rtol, max_probes)
    reason = why_none(lin, population, choice.estimator in APART, 1 if part else LEAST_SAMPLES)
    wanted = population is not False and not reason
    found = gradient_pass(lin, **_wish(lin, wanted, vector))
    square_norms = found.square_norms
    layers = layer_names(tuple(square_norms), by_layer)
    rows = [tuple(square_norms), *layers.values()]
    estimate = estimate_chosen(lin, rows, choice, rtol, max_probes, apart=wanted)
    g2 = square_norm(lin.xp, unit(lin.xp, lin.loss_gradient)[0])
    whole, *parts = _parts(lin, g2, [sum_of(square_norms, row) for row in rows], estimate)
    dtype = accumulation_dtype(lin.xp, lin.outputs.dtype)
    info = lin.xp.finfo(dtype)
    finite, samples = _population(lin, found, sum_of(square_norms, rows[0]), estimate) if wanted else (None, None)
    return Decomposition(
        loss=lin.loss,
        rate=whole.rate,
        chi_loss=valid(lin, _like(lin, lin.loss_terms) * g2),
        chi_net=whole.chi_net,
        chi_pos=whole.chi_pos,
        chi_net_stderr=whole.chi_net_stderr,
        chi_pos_stderr=whole.chi_pos_stderr,
        loss_terms=lin.loss_terms,
        probes=estimate.probes,
        degrees_of_freedom=estimate.freedom,
        layers=dict(zip(layers, parts, strict=True)) if layers else None,
        population=finite,
        samples=lin.outputs.shape[0],
        outputs=lin.outputs.shape[1],
        estimator=estimate.estimator,
        notes=(*lin.notes, *choice.notes, *([f"no population values: {reason}"] if reason else [])),
        loss_name=lin.loss_name,
        evidence=lin.evidence,
        sample_losses=sample_losses_of(lin) if sample_losses else None,
        contributions=samples if part else None,
        magnitude=found.magnitude,
        least=float(info.smallest_normal) / float(info.eps),
        rtol=rtol,
        way=estimate.way,
    ), found


def asked(
    lin: Linearization, *, estimator: str, rtol: float, max_probes: int, population: bool | None, **others: Any
) -> dict[str, Any]:
    """What `decompose` with these settings asks of the backward pass of the loss: keywords of `gradient_pass`.

    For a backend that makes this pass beforehand, as part of a training step.
    """
    choice = choose(lin, estimator, rtol, max_probes)
    wanted = population is not False and not why_none(lin, population, choice.estimator in APART)
    return _wish(lin, wanted, vector=False)


def _wish(lin: Linearization, population: bool, vector: bool) -> dict[str, Any]:
    """The keywords of `gradient_pass` with the population's values or without them, with J^T g or without it."""
    products = jackknife_size(lin.outputs.shape[0]) if population else 0
    return {"per_sample": population, "products": products, "vector": vector}


def sum_of(values: Mapping[str, Array], names: Iterable[str]) -> Array:
    """The sum of the values of these parameters."""
    first, *others = (values[name] for name in names)
    return sum(others, start=first)


def _population(
    lin: Linearization, found: GradientPass, rate: Array, estimate: TraceEstimate
) -> tuple[Population, Contributions]:
    """The population's values, nan where a check of the record failed, and what the samples contribute."""
    assert estimate.samples is not None, "the estimator has taken the samples apart"
    values, samples = population_of(lin, found, rate, estimate.samples, estimate.standard_error[0])
    return Population(**{field.name: valid(lin, getattr(values, field.name)) for field in fields(values)}), samples


def layer_names(parameters: tuple[str, ...], by_layer: ByLayer) -> dict[str, tuple[str, ...]]:
    """{layer: its parameters}. By default a layer is the module that owns the parameter: the name up to its last dot.

    >>> layer_names(("head.weight", "head.bias", "scale"), True)
    {'head': ('head.weight', 'head.bias'), 'scale': ('scale',)}
    """
    if by_layer is False:
        return {}
    owner = by_layer if callable(by_layer) else lambda name: name.rpartition(".")[0] or name
    layers: dict[str, tuple[str, ...]] = {}
    for name in parameters:
        layer = owner(name)
        layers[layer] = (*layers.get(layer, ()), name)
    return layers


def _parts(lin: Linearization, g2: Array, rates: list[Array], estimate: TraceEstimate) -> list[Layer]:
    """The factors of each row of parameters, nan where a check of the record failed."""
    terms = _like(lin, lin.loss_terms)
    return [
        _factors(lin.xp, valid(lin, rate), g2, valid(lin, estimate.trace[i]), estimate.standard_error[i], terms)
        for i, rate in enumerate(rates)
    ]


def _factors(xp: Any, rate: Array, g2: Array, trace: Array, stderr: Array, terms: Array) -> Layer:
    position = ratio(xp, ratio(xp, rate, g2), trace)  # in turn: ||g||^2 tr Theta may overflow
    relative = ratio(xp, stderr, trace)
    return Layer(rate, trace / terms, position, stderr / terms, position * relative)


def _like(lin: Linearization, value: Any) -> Array:
    """A number or an integer array as an array in the accumulation dtype, on the outputs' device."""
    dtype = accumulation_dtype(lin.xp, lin.outputs.dtype)
    if isinstance(value, int | float):
        return lin.xp.asarray(value, dtype=dtype, device=device_of(lin.outputs))
    return lin.xp.astype(value, dtype)
