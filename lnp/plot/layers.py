"""What the layers do over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lnp.optional import import_optional
from lnp.plot import style
from lnp.runs.curves import curve
from lnp.runs.open_runs import RunSources, open_runs
from lnp.tracking.history import LAYER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Literal["chi_pos", "chi_net", "rate", "rate_share", "chi_net_share"]
VALUES: dict[str, str] = {
    "chi_pos": r"$\chi_\mathrm{pos}$ of the layer",
    "chi_net": r"$\chi_\mathrm{net}$ of the layer",
    "rate": "rate of the layer",
    "rate_share": "share of the rate",
    "chi_net_share": r"share of $\chi_\mathrm{net}$",
}
ROW = 0.145
"""Height in inches of a row with a name beside it; where there is less room, not all have one."""
MOST_LETTERS = 20
"""Letters of a name."""


def layers(run: RunSources, value: Value = "chi_pos", ax: Axes | None = None, *, names: bool = True) -> Axes:
    """A heat map: one row for each layer, in the network's order, over the steps.

    Parameters
    ----------
    run:
        One run, tracked with `by_layer=`.
    value:
        "chi_pos", "chi_net", "rate" (colours are logarithmic), "rate_share" or "chi_net_share" (of the whole, from 0).
    names:
        Write the layers' names beside the rows, without what they share, and long ones cut at their beginning.

    Raises
    ------
    ValueError
        For several runs, a run without layers, or a value that layers do not have.
    """
    named = open_runs(run)
    if len(named) != 1 or not (history := next(iter(named.values()))).layers:
        what = f"{len(named)} runs" if len(named) != 1 else "a run without layers"
        raise ValueError(f"layers() received {what}. Expected one run, tracked with by_layer=True.")
    if value not in VALUES:
        raise ValueError(f"value is {value!r}. Expected one of {', '.join(VALUES)}.")
    import_optional("matplotlib", "lnp.plot", install="'lnp[plot]'")
    from matplotlib.colors import LogNorm, Normalize

    share = value.endswith("_share")
    curves = [curve(history, f"{LAYER}{layer}/{value.removesuffix('_share')}") for layer in history.layers]
    steps = max((line.step for line in curves), key=len)
    ax = style.axes(ax, height=max(4.0, ROW * len(curves) / 0.75))
    if not len(steps):
        ax.set_axis_off()
        ax.text(0.5, 0.5, f"no values: {VALUES[value]}", transform=ax.transAxes, ha="center", va="center")
        return ax
    table = np.array([np.interp(steps, line.step, line.mean) if len(line.step) else np.nan * steps for line in curves])
    if share:
        total = table.sum(axis=0)
        table = table / np.where(total > 0, total, np.nan)
    else:
        table = style.positive(table)
    norm = Normalize(0, _limits(table)[1]) if share else LogNorm(*_limits(table))
    mesh = ax.pcolormesh(_edges(steps), np.arange(len(table) + 1), table, norm=norm, cmap="viridis", rasterized=True)
    ax.invert_yaxis()
    room = ax.get_position().height * ax.figure.get_size_inches()[1]
    every = -(-len(table) // max(int(room / ROW), 1))
    labels = shorten(history.layers)[::every] if names else []
    places = np.arange(0, len(table), every) + 0.5
    ax.set_yticks(places[: len(labels)], labels, fontsize="small")
    style.step_axis(ax)
    ax.set(xlabel="training step", ylabel="layer" if names else "", xlim=_edges(steps)[[0, -1]])
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    _colorbar(ax, mesh, VALUES[value])
    return ax


def shorten(names: Sequence[str]) -> list[str]:
    """Names without the part before a dot that all of them share, of at most 20 letters.

    >>> shorten(["model.layers.0.attention.query.weight", "model.head"])
    ['…ention.query.weight', 'head']
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    joined = [".".join(p[shared:]) for p in parts]
    return [name if len(name) <= MOST_LETTERS else f"…{name[1 - MOST_LETTERS :]}" for name in joined]


def _colorbar(ax: Axes, mesh: Any, label: str) -> None:
    """A colour bar above the axes, so that their width stays that of their neighbours."""
    bar = ax.figure.colorbar(mesh, cax=ax.inset_axes((0.55, 1.04, 0.45, 0.05)), orientation="horizontal")
    bar.ax.xaxis.set_ticks_position("top")
    bar.ax.tick_params(labelsize="x-small", pad=1)
    bar.ax.minorticks_off()
    low, high = mesh.norm.vmin, mesh.norm.vmax
    bar.set_ticks([low, high], labels=[f"{low:.2g}", f"{high:.2g}"])
    ax.text(0.53, 1.065, label, transform=ax.transAxes, ha="right", va="center", fontsize="small")


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell boundaries: halfway between neighbouring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[:-1] + steps[1:]) / 2
    return np.r_[max(2 * steps[0] - middle[0], -0.15), middle, 2 * steps[-1] - middle[-1]]


def _limits(table: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest finite value of a table, apart where they are equal."""
    finite = table[np.isfinite(table)]
    if not len(finite):
        return 0.1, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low / 2, high * 2)
