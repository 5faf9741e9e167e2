"""A decomposition as a dictionary, a table in text or HTML, and a pandas data frame."""

from __future__ import annotations

import html
import math
from typing import Any

from lnp.contract.linearization import Array
from lnp.optional import import_optional
from lnp.printable import printable

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
MEANING = {
    "loss": "loss",
    "rate": "speed at which the loss falls, -dL/dt",
    "chi_loss": "loss scale",
    "chi_net": "network scale",
    "chi_pos": "spectral position: 1 dominant mode, 0 tail",
    "preference": "chi_pos N K: 1 without preference, more is the head",
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


def to_text(d: Decomposition) -> str:
    """A small table: values, error bars, and how they were obtained."""
    lines = [f"{name:<10}{number(getattr(d, name)):>11}{error(d, name)}   {meaning}" for name, meaning in _meanings(d)]
    if d.population is not None:
        lines += [
            f"{'chi_pos':<10}{number(d.population.chi_pos):>11}{error(d.population, 'chi_pos')}   of the population",
            f"{'noise':<10}{noise_scale(d.population):>11}   gradient noise scale, samples",
        ]
    if d.total is not None:
        lines += [f"{name:<10}{number(getattr(d.total, name)):>11}   of the whole loss" for name in ("loss", "rate")]
    if d.layers:
        names = {layer: printable(layer) for layer in d.layers}
        width = max(len("layer"), *map(len, names.values()))
        lines += ["", f"{'layer':<{width}}{'rate':>11}{'chi_net':>11}{'':>11}{'chi_pos':>11}"]
        lines += [
            f"{names[layer]:<{width}}{number(part.rate):>11}{number(part.chi_net):>11}{error(part, 'chi_net'):>11}"
            f"{number(part.chi_pos):>11}{error(part, 'chi_pos'):>11}"
            for layer, part in d.layers.items()
        ]
    return "\n".join([*lines, "", provenance(d), *(f"note: {printable(note)}" for note in d.notes)])


def to_html(d: Decomposition) -> str:
    """The same table for notebooks."""
    rows = "".join(
        f"<tr><td><code>{name}</code></td>"
        f"<td style='text-align:right'>{number(getattr(d, name))}{error(d, name)}</td>"
        f"<td style='text-align:left'>{html.escape(meaning)}</td></tr>"
        for name, meaning in _meanings(d)
    )
    if d.population is not None:
        position = f"{number(d.population.chi_pos)}{error(d.population, 'chi_pos')}"
        for name, value, meaning in (
            ("chi_pos", position, "of the population"),
            ("noise", noise_scale(d.population), "gradient noise scale, samples"),
        ):
            rows += (
                f"<tr><td><code>{name}</code></td><td style='text-align:right'>{value}</td>"
                f"<td style='text-align:left'>{meaning}</td></tr>"
            )
    layers = "".join(
        f"<tr><td><code>{html.escape(printable(layer))}</code></td>"
        f"<td>rate {number(part.rate)}, chi_net {number(part.chi_net)}"
        f"{error(part, 'chi_net')}</td><td>chi_pos {number(part.chi_pos)}{error(part, 'chi_pos')}</td></tr>"
        for layer, part in (d.layers or {}).items()
    )
    notes = "".join(f"<br>{html.escape(printable(line))}" for line in (provenance(d), *d.notes))
    return f"<table>{rows}{layers}</table><small>{notes.removeprefix('<br>')}</small>"


def _meanings(d: Decomposition) -> list[tuple[str, str]]:
    """(value's name, what it means), where the loss is the one that was measured."""
    return [
        (name, printable(d.loss_name) or meaning) if name == "loss" else (name, meaning)
        for name, meaning in MEANING.items()
    ]


def provenance(d: Decomposition) -> str:
    """One line on the batch and the estimator."""
    probes = "1 probe" if d.probes == 1 else f"{_count(d.probes)} probes"
    terms = _count(d.loss_terms)
    return f"{d.samples} samples x {d.outputs} outputs, {terms} loss terms; trace: {d.estimator}, {probes}"


def noise_scale(p: Values) -> str:
    """The noise scale with its interval, or what it is above, from population values.

    >>> from lnp import Population
    >>> noise_scale(Population(1.0, 0.1, 40.0, 0.1, 0.01, 25.0, 90.0, 40.0))
    '40 (25 to 90)'
    >>> noise_scale(Population(1.0, 0.1, 40.0, 0.6, 0.06, 25.0, math.inf, 40.0))
    'above 25'
    """
    low, high = p.noise_scale_low, p.noise_scale_high
    if isinstance(high, float) and math.isinf(high):
        return f"above {low:.3g}"
    if isinstance(high, float) and isinstance(low, float) and isinstance(p.noise_scale, float):
        return f"{p.noise_scale:.3g} ({low:.3g} to {high:.3g})"
    return f"{p.noise_scale} ({low} to {high})"


def _count(value: float | Array) -> str:
    return str(int(value)) if isinstance(value, int | float) and not math.isnan(value) else str(value)


def number(value: float | Array) -> str:
    """A value as it is printed."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def error(d: Values, name: str) -> str:
    """A value's standard error as it is printed behind it; "" where there is none, or it is 0."""
    stderr = getattr(d, f"{name}_stderr", None)
    if stderr is None or stderr == 0:
        return ""
    return f" ± {stderr:.1g}" if isinstance(stderr, int | float) else f" ± {stderr}"
