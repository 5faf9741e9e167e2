"""Figures of training runs: `ax=` in, Axes out.

A run is a `History`, a `Tracker`, or the path of a tracker's file; several are a list, a dictionary {name: run}, or a
folder of files. Matplotlib is imported when a figure is drawn (`pip install 'lnp[plot]'`).

Curves are averages over the windows of the schedule, with bands of one standard error: of the window's measurements, or
of the single measurement. Steps are on a scale that is linear up to 1 and logarithmic above. Runs with the tag
`frozen` are dashed. What each kind of marks means is said below a figure that lnp has made; `explain(figure)` writes it
below one of your own.
"""

from lnp.plot.dashboard import dashboard
from lnp.plot.laws import power_law
from lnp.plot.layers import layers
from lnp.plot.lines import chi_loss, chi_net, chi_pos, curve, loss, noise_scale, over_seeds
from lnp.plot.nested import nested_batches, nested_sizes
from lnp.plot.runs import against_compute, position_against_loss, reach_against_compute, reach_against_size
from lnp.plot.spectral import density, kernel, spectrum
from lnp.plot.style import explain

__all__ = [
    "against_compute",
    "chi_loss",
    "chi_net",
    "chi_pos",
    "curve",
    "dashboard",
    "density",
    "explain",
    "kernel",
    "layers",
    "loss",
    "nested_batches",
    "nested_sizes",
    "noise_scale",
    "over_seeds",
    "position_against_loss",
    "power_law",
    "reach_against_compute",
    "reach_against_size",
    "spectrum",
]
