"""Spectra, densities and kernels: where in the spectrum the loss falls, how its eigenvalues are spread, who learns with
whom.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.plot import style
from lnp.spectral.kernel import Kernel
from lnp.spectral.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Spectra = Spectrum | Mapping[Any, Spectrum]
"""One spectrum, or several under names, such as the steps that they are of."""
FRAME = 1.15
"""Height of a frame with the room above it, in units of a share of 1."""


def spectrum(spectra: Spectra, ax: Axes | None = None, *, decades: int = 6, bins: int = 24) -> Axes:
    """The share of the loss decrease against the eigenvalue, a frame for each spectrum, from top to bottom.

    Bars are shares of the loss decrease, the line is the share of ||g||^2 whose mean is chi_pos, the triangle, in units
    of the kernel's trace. What lies below the axis is counted in its first bin.

    Parameters
    ----------
    spectra:
        From `lnp.spectrum`; a dictionary {step or name: spectrum} for several.
    decades, bins:
        How far down the axis goes from the trace, and in how many bins.
    """
    named = _named(spectra)
    ax = style.axes(ax, height=1.3 + 0.9 * len(named))
    edges = np.logspace(-decades, 0, bins + 1)
    for frame, (label, s) in enumerate(named.items()):
        base = -FRAME * frame
        at = np.clip(s.eigenvalues / s.trace, edges[0], edges[-1])
        weights, shares = (np.histogram(at, edges, weights=part)[0] for part in (s.weights, s.shares))
        ax.bar(edges[:-1], shares, np.diff(edges), base, align="edge", color="C0", label="share of the loss decrease")
        ax.step([*edges, edges[-1]], [base, *(base + weights), base], "C1", where="pre", label=r"share of $||g||^2$")
        ax.plot(s.chi_pos, base, "k^", ms=5, clip_on=False, label=r"$\chi_{pos}$")
        words = rf"{label}:  $\chi_{{pos}}$ = {s.chi_pos:.2g}".removeprefix(":  ")
        ax.text(edges[0] * 2.2, base + 0.55, words, fontsize=8)
        ax.axhline(base, color="0.7", lw=0.6)
        if frame == 0:
            ax.legend(loc="upper right", ncols=3, **style.LEGEND)
    ax.set(xscale="log", yticks=[], ylim=(-FRAME * (len(named) - 1) - 0.05, 1.75), xlabel="eigenvalue / trace")
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def density(spectra: Spectra, ax: Axes | None = None, *, decades: int = 6) -> Axes:
    """The share of all eigenvalues per decade, with bands of one standard error over probes.

    Parameters
    ----------
    spectra:
        From `lnp.spectrum(..., probes=3)`; a dictionary {step or name: spectrum} for several.
    decades:
        How far down the axis goes from the largest eigenvalue.

    Raises
    ------
    ValueError
        For a spectrum without probes, which tells of the loss gradient alone.
    """
    named = _named(spectra)
    without = [str(label) for label, s in named.items() if s.density is None]
    if without:
        raise ValueError(
            f"density() received spectra without probes ({', '.join(without) or 'one'}). Expected lnp.spectrum(..., "
            "probes=3), which sees all eigenvalues."
        )
    ax = style.axes(ax)
    for index, (label, s) in enumerate(named.items()):
        assert s.density is not None, "it has been looked for"
        grid = s.lambda_max * np.logspace(-decades, 0.3, 100)
        share, error = s.density.per_decade(grid)
        ax.semilogx(grid, share, color=f"C{index}", label=label or None)
        band = ax.fill_between(grid, share - error, share + error, color=f"C{index}", alpha=0.3, linewidth=0)
        band.set_gid(style.ERROR)
    style.tidy(ax, "eigenvalue", "share of the eigenvalues per decade")
    style.legend(ax, len(named))
    return ax


def kernel(kernel: Kernel, ax: Axes | None = None, *, of_class: int | None = None) -> Axes:
    """The kernel as a heat map, from blue for negative to red for positive entries, with white at zero.

    Parameters
    ----------
    kernel:
        From `lnp.kernel`: full, traced, or per class.
    of_class:
        Which class's kernel is drawn, of one per class.

    Raises
    ------
    ValueError
        For a kernel per class without a class, and a class of another kernel, or beyond those that there are.
    """
    classes = len(kernel.matrix) if kernel.kind == "per_class" else 0
    if (of_class is None) != (classes == 0) or not 0 <= (of_class or 0) < max(classes, 1):
        expected = f"of_class= from 0 to {classes - 1}" if classes else "none, for there is one matrix"
        raise ValueError(f"of_class is {of_class} for a kernel of the kind {kernel.kind!r}. Expected {expected}.")
    matrix = kernel.matrix if of_class is None else kernel.matrix[of_class]
    ax = style.axes(ax)
    most = float(np.abs(matrix[np.isfinite(matrix)]).max(initial=0.0)) or 1.0
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label=r"$\Theta$" if of_class is None else rf"$\Theta_{{{of_class}}}$")
    what = "sample and output" if kernel.kind == "full" else "sample"
    ax.set(xlabel=what, ylabel=what)
    return ax


def _named(spectra: Spectra) -> Mapping[Any, Spectrum]:
    """{label: spectrum}; steps are named as such, and one alone has no label."""
    if isinstance(spectra, Spectrum):
        return {"": spectra}
    return {f"step {label:,}" if isinstance(label, int | np.integer) else label: s for label, s in spectra.items()}
