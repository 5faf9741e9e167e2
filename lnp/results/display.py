"""A decomposition as a dictionary, a page of values in text or HTML, and a pandas data frame."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lnp.contract.linearization import Array
from lnp.optional import import_optional
from lnp.printable import printable
from lnp.results.rounding import rounded, with_error
from lnp.results.tables import Page, Row

Decomposition = Any
"""A `lnp.Decomposition`, whose own file imports this one."""
Values = Any
"""A decomposition, one of its layers, or its population values."""
WHOLE = (
    "loss",
    "rate",
    "chi_loss",
    "chi_net",
    "chi_net_stderr",
    "chi_pos",
    "chi_pos_stderr",
    "preference",
    "loss_terms",
    "probes",
    "degrees_of_freedom",
)
SHAPE = ("samples", "outputs", "estimator", "loss_name")
POPULATION = (
    *("rate", "chi_pos", "noise_scale", "rate_stderr", "chi_pos_stderr"),
    *("noise_scale_low", "noise_scale_high", "gradient_noise"),
)
LAYER = ("rate", "chi_net", "chi_net_stderr", "chi_pos", "chi_pos_stderr")
LAYER_HEAD = ("layer", "rate", "chi_net", "chi_pos")
BATCH_HEAD = ("batch", "loss", "rate", "chi_loss", "chi_net", "chi_pos")
TOTAL = ("loss", "rate")
MEANING = {
    "loss": "loss",
    "rate": "speed at which the loss falls, -dL/dt",
    "chi_loss": "loss scale",
    "chi_net": "network scale",
    "chi_pos": "spectral position: 1 dominant mode, 0 tail",
    "preference": "chi_pos N K: 1 without preference, more is the head",
}


CROSS_MEANING = {
    "rate": "speed at which the measured loss falls, -dL/dt",
    "chi_loss": "loss scale, geometric mean of the two batches",
    "chi_net": "network scale, likewise",
    "chi_pos": "spectral position in [-1, 1]: below 0 training raises the measured loss",
}


def to_dict(d: Decomposition) -> dict[str, Any]:
    """The values by name, without notes; layers as "layer/<name>/<value>"."""
    flat = {name: getattr(d, name) for name in (*WHOLE, *SHAPE)}
    if d.population is not None:
        flat |= {f"population/{name}": getattr(d.population, name) for name in POPULATION}
    if d.total is not None:
        flat |= {"total/loss": d.total.loss, "total/rate": d.total.rate}
    for layer, part in (d.layers or {}).items():
        flat |= {f"layer/{layer}/{name}": getattr(part, name) for name in LAYER}
    return flat


def to_pandas(d: Decomposition) -> Any:
    """A data frame with one row for the whole (index "") and one for each layer."""
    pandas = import_optional("pandas", "to_pandas()", install="pandas")
    rows = {"": {name: value for name, value in to_dict(d).items() if not name.startswith("layer/")}}
    rows |= {layer: {name: getattr(part, name) for name in LAYER} for layer, part in (d.layers or {}).items()}
    return pandas.DataFrame.from_dict(rows, orient="index")


def page(d: Decomposition) -> Page:
    """Values, error bars, layers, and how they were obtained."""
    return Page(_rows(d), LAYER_HEAD, _layers(d), (provenance(d), *noted(d.notes)))


def cross_page(c: Values) -> Page:
    """The same of a cross response, with a line for each of its batches."""
    rows = [row(c, name, text) for name, text in CROSS_MEANING.items()]
    batches = [[called, *_line(d, BATCH_HEAD[1:])] for called, d in (("trained", c.trained), ("measured", c.measured))]
    lines = [f"{name}: {provenance(d)}" for name, d in (("trained", c.trained), ("measured", c.measured))]
    notes = dict.fromkeys([*c.notes, *c.trained.notes, *c.measured.notes])
    return Page(rows, BATCH_HEAD, batches, (*lines, *noted(notes)))


def noted(notes: Iterable[str]) -> list[str]:
    """Notes as the lines that are printed of them."""
    return [f"note: {printable(note)}" for note in notes]


def row(values: Values, name: str, meaning: str, called: str | None = None) -> Row:
    """The row of a value, with its error where it has one."""
    value, stderr = rounded(getattr(values, name), getattr(values, f"{name}_stderr", None))
    return called or name, value, f"± {stderr}" if stderr else "", meaning


def _rows(d: Decomposition) -> list[Row]:
    """Every value with its error and its meaning; the loss is named as what was measured."""
    rows = [row(d, name, printable(d.loss_name) or text if name == "loss" else text) for name, text in MEANING.items()]
    if d.population is not None:
        rows += [
            row(d.population, "chi_pos", "chi_pos of the population, without batch noise", "population"),
            ("noise", *noise_scale(d.population), "gradient noise scale, samples"),
        ]
    if d.total is not None:
        rows += [
            row(d.total, name, f"{name} with the terms that are none of the outputs", f"total {name}") for name in TOTAL
        ]
    return rows


def _layers(d: Decomposition) -> list[list[str]]:
    """A line of texts for each layer, under `LAYER_HEAD`."""
    return [[layer, *_line(part, LAYER_HEAD[1:])] for layer, part in (d.layers or {}).items()]


def _line(values: Values, names: Iterable[str]) -> list[str]:
    """Values with their errors, as texts."""
    return [with_error(getattr(values, name), getattr(values, f"{name}_stderr", None)) for name in names]


def provenance(d: Decomposition) -> str:
    """One line on the batch and the estimator."""
    probes = "1 probe" if d.probes == 1 else f"{_count(d.probes)} probes"
    terms = _count(d.loss_terms)
    return f"{d.samples} samples x {d.outputs} outputs, {terms} loss terms; trace: {d.estimator}, {probes}"


def noise_scale(p: Values) -> tuple[str, str]:
    """The noise scale and its interval, or what it is above, from population values.

    >>> from lnp import Population
    >>> noise_scale(Population(1.0, 0.1, 40.0, 0.1, 0.01, 25.0, 90.0, 40.0))
    ('40', '(25 to 90)')
    >>> noise_scale(Population(1.0, 0.1, 40.0, 0.6, 0.06, 25.0, math.inf, 40.0))
    ('above 25', '')
    """
    low, high = p.noise_scale_low, p.noise_scale_high
    if isinstance(high, float) and math.isinf(high):
        return f"above {low:.3g}", ""
    if isinstance(high, float) and isinstance(low, float) and isinstance(p.noise_scale, float):
        return f"{p.noise_scale:.3g}", f"({low:.3g} to {high:.3g})"
    return f"{p.noise_scale}", f"({low} to {high})"


def _count(value: float | Array) -> str:
    return str(int(value)) if isinstance(value, int | float) and not math.isnan(value) else str(value)
