"""Figures of runs that can be zoomed and hovered, by Plotly. They are readable on light and on dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lnp.results.rounding import rounded
from lnp.runs.curves import NET_POSITION, NOISE_SCALE, POSITION, Curve, curve, is_frozen, reach, size, smooth
from lnp.runs.open_runs import Runs
from lnp.tracking.history import History

GREY = "#8a8a8a"
GRID = "rgba(128,128,128,0.22)"
ZERO = 0.5
"""Where step 0 is drawn on a logarithmic axis."""
ROOM = 0.3
"""How far below the lowest value bands go that would go below zero."""
QUALITATIVE = (
    "#3b8fd6",
    "#e8702a",
    "#2ca36b",
    "#c64a8c",
    "#8f6bd1",
    "#b59a1e",
    "#d1495b",
    "#3aa6a6",
    "#7f8c5a",
    "#a0694b",
)
"""Colours of which each is told from white and from black."""
BY_SIZE = ("#3b8fd6", "#2ca36b", "#b59a1e", "#e8702a", "#d1495b")
"""The same from the smallest run to the largest."""
Colours = dict[str, str]
"""{run: colour}."""


def colours(runs: Runs) -> Colours:
    """By size, from blue for the smallest to red for the largest, where sizes differ; otherwise distinct ones. Runs
    with frozen features, of which few parameters are trained, are grey.
    """
    from plotly.colors import sample_colorscale

    free = {name: run for name, run in runs.items() if not is_frozen(run)}
    sizes = np.array([size(run) for run in free.values()])
    given = {name: QUALITATIVE[index % len(QUALITATIVE)] for index, name in enumerate(free)}
    if np.isfinite(sizes).all() and len(set(sizes)) > 1:
        rank = np.searchsorted(np.unique(sizes), sizes) / (len(np.unique(sizes)) - 1)
        given = dict(zip(free, sample_colorscale(list(BY_SIZE), list(rank)), strict=True))
    return {name: given.get(name, GREY) for name in runs}


def along(runs: Runs, shown: Colours, title: str, column: Callable[[History], str], dashed: str = "") -> Any:
    """A column over the steps with bands of one standard error; `dashed` is another one, where a run has it."""
    figure = _figure(title, "training step")
    for name, run in runs.items():
        if column(run) in run:
            _draw(figure, name, curve(run, column(run)), shown[name], dash=_dash(run))
        if dashed in run:
            _draw(figure, name, curve(run, dashed), shown[name], dash="dash")
    last = max(int(run["step"][-1]) for run in runs.values())
    decades = int(math.log10(max(last, 1))) + 1
    ticks = [m * 10**k for k in range(decades) for m in ((1, 2, 5) if decades < 4 else (1,))]
    figure.update_xaxes(tickvals=[ZERO, *ticks], ticktext=["0", *(f"{tick:,}" for tick in ticks)])
    return figure if figure.data else None


def against_loss(runs: Runs, shown: Colours) -> Any:
    """Spectral position over loss, averaged over three windows; training goes from right to left, to the dot."""
    figure = _figure("spectral position against loss", "loss")
    for name, run in runs.items():
        at, position = smooth(curve(run, POSITION if POSITION in run else "chi_pos"))
        step, loss = smooth(curve(run, "loss"))
        if not (len(at) and len(step)):
            continue
        x, y = _positive(np.interp(at, step, loss)), _positive(position)
        text = [f"step {s:,.0f}" for s in at]
        last = np.flatnonzero(np.isfinite(x) & np.isfinite(y))[-1:]
        sizes = [9 if index in last else 0 for index in range(len(x))]
        line = {"dash": _dash(run)}
        _trace(figure, name, x, y, shown[name], text, mode="lines+markers", marker={"size": sizes}, line=line)
    figure.update_xaxes(autorange="reversed")
    return figure if figure.data else None


def against_size(runs: Runs, shown: Colours) -> Any:
    """Spectral reach over trained parameters, with standard errors; upper limits are triangles that point down."""
    figure = _figure("spectral reach against size", "trained parameters")
    for name, run in runs.items():
        found, at = reach(run), size(run)
        value = found.chi_pos if found.resolved else found.limit
        if value > 0 and at > 0:
            error = {"array": [found.stderr], "color": shown[name]} if found.resolved else None
            text = [f"± {rounded(found.chi_pos, found.stderr)[1]}" if found.resolved else "upper limit"]
            marker = {"size": 10, "symbol": "circle" if found.resolved else "triangle-down"}
            _trace(figure, name, [at], [value], shown[name], text, mode="markers", marker=marker, error_y=error)
    return figure if figure.data else None


def by_layer(run: History) -> Any:
    """The share of each layer in the rate, over the measurements."""
    if not run.layers:
        return None
    shares = np.stack([run.numbers(f"layer/{layer}/rate") for layer in run.layers])
    figure = _figure("share of each layer in the rate", "training step")
    from plotly import graph_objects

    with np.errstate(invalid="ignore", divide="ignore"):
        shares = shares / run.numbers("rate")
    shared = len({layer.partition(".")[0] for layer in run.layers}) == 1  # such as "transformer"
    named = [html.escape((layer.partition(".")[2] or layer) if shared else layer) for layer in run.layers]
    steps = [f"{step:,}" for step in run["step"].tolist()]
    hover = "%{y}<br>step %{x}<br>%{z:.1%}<extra></extra>"
    figure.add_trace(graph_objects.Heatmap(z=shares, x=steps, y=named, colorscale="Viridis", hovertemplate=hover))
    bar = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 8, "tickformat": ".0%", "nticks": 4}
    figure.update_traces(colorbar=bar)
    figure.update_xaxes(type="category", nticks=6)
    figure.update_yaxes(type="category", autorange="reversed", nticks=len(named), automargin=True)
    figure.update_layout(height=max(320, 110 + 14 * len(named)), margin_t=70)
    return figure


def all_of(runs: Runs, shown: Colours) -> list[tuple[Any, str]]:
    """[(figure, what its marks mean)] of all that the runs have something to show for."""
    bands = "Bands: one standard error." + (" Dotted: frozen features." if any(map(is_frozen, runs.values())) else "")
    position = f"{bands} The population's position where it is known, else the batch's. Dashed: by the net rate. "
    position += "What is not above zero has no place on the axis."
    figures = [
        (along(runs, shown, "loss", lambda run: "loss"), bands),
        (along(runs, shown, "loss scale", lambda run: "chi_loss"), bands),
        (along(runs, shown, "network scale", lambda run: "chi_net"), bands),
        (along(runs, shown, "spectral position", _position, NET_POSITION), position),
        (against_loss(runs, shown), "Training goes from right to left, to the dot."),
        (against_size(runs, shown) if len(runs) > 1 else None, "Triangles that point down are upper limits."),
        (
            along(runs, shown, "gradient noise scale (samples)", lambda run: NOISE_SCALE),
            f"{bands} Triangles: above that.",
        ),
        (along(runs, shown, "fall of the loss per step", lambda run: "net/rate_per_step"), bands),
    ]
    if len(runs) == 1:
        figures.append((by_layer(next(iter(runs.values()))), "Of the speed at which the loss falls."))
    return [(figure, text) for figure, text in figures if figure is not None]


def _dash(run: History) -> str:
    """The kind of a run's lines."""
    return "dot" if is_frozen(run) else "solid"


def _position(run: History) -> str:
    return POSITION if POSITION in run else "chi_pos"


def _figure(title: str, xlabel: str) -> Any:
    """Logarithmic axes without a background of their own."""
    from plotly import graph_objects

    axis = {"type": "log", "gridcolor": GRID, "linecolor": GREY, "zeroline": False, "exponentformat": "power"}
    axis |= {"nticks": 6, "tickangle": 0}
    return graph_objects.Figure(
        layout={
            "title": {"text": title, "x": 0.02, "font": {"size": 15}},
            "xaxis": {**axis, "title": {"text": xlabel}},
            "yaxis": {**axis},
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": GREY, "family": "system-ui, sans-serif", "size": 12},
            "margin": {"l": 62, "r": 12, "t": 40, "b": 44},
            "height": 320,
            "showlegend": False,
            "hovermode": "closest",
        }
    )


def _draw(figure: Any, name: str, found: Curve, colour: str, dash: str = "solid") -> None:
    """A curve and its band, which is left out where it has no place on a logarithmic axis."""
    x, y = np.maximum(found.step, ZERO), _positive(found.mean)
    high = _positive(found.high)
    with np.errstate(invalid="ignore"):  # a band that goes below zero ends where the figure does
        low = np.maximum(found.low, ROOM * np.nanmin(np.r_[y, np.inf]))
    known = np.flatnonzero(np.isfinite(found.mean) & np.isfinite(low) & np.isfinite(high))
    for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if dash != "dash" else ():
        if len(part) > 1:
            around, edge = [*x[part], *x[part][::-1]], [*high[part], *np.minimum(low, high)[part][::-1]]
            _trace(figure, name, around, edge, colour, None, fill="toself", line={"width": 0}, opacity=0.2)
    above = np.isinf(found.mean) & (found.low > 0)
    if above.any():
        marker = {"symbol": "triangle-up", "size": 7}
        text = [f"step {step:,.0f}<br>above" for step in found.step[above]]
        _trace(figure, name, x[above], found.low[above], colour, text, mode="markers", marker=marker)
    text = [
        f"step {s:,.0f}" + (f"<br>± {rounded(float(v), float(e))[1]}" if e > 0 else "")
        for s, v, e in zip(found.step, found.mean, found.stderr, strict=True)
    ]
    if np.isfinite(y).any():
        mode = "lines" if np.isfinite(y).sum() > 40 else "lines+markers"
        _trace(figure, name, x, y, colour, text, mode=mode, line={"dash": dash, "width": 2}, marker={"size": 4})


def _trace(figure: Any, name: str, x: Any, y: Any, colour: str, text: list[str] | None, **options: Any) -> None:
    """A trace of a run, which the page finds by `meta` to hide it."""
    from plotly import graph_objects

    hover = (
        {"hoverinfo": "skip"} if text is None else {"hovertemplate": "%{meta}<br>%{text}<br>%{y:.4g}<extra></extra>"}
    )
    if text is None:
        options |= {"mode": "lines", "fillcolor": colour}
    options["line"] = {"color": colour, **options.get("line", {})}
    options["marker"] = {"color": colour, **options.get("marker", {})}
    figure.add_trace(graph_objects.Scatter(x=x, y=y, text=text, meta=html.escape(name), **hover, **options))


def _positive(values: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis: nan where they have no place on it."""
    with np.errstate(invalid="ignore"):
        return np.where((values > 0) & np.isfinite(values), values, np.nan)
