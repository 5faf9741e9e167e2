"""Figures of training runs: `ax=` in, Axes out.

A run is a `History`, a `Tracker`, or the path of a tracker's file; several are a list, a dictionary {name: run}, or a
folder of files. Matplotlib is imported when a figure is drawn (`pip install 'lnp[plot]'`).

Curves are averages over the windows of the schedule, with bands of one standard error: of the window's measurements, or
of the single measurement. Steps are on a scale that is linear up to 1 and logarithmic above.
"""

from lnp.plot.dashboard import dashboard
from lnp.plot.layers import layers
from lnp.plot.lines import chi_loss, chi_net, chi_pos, curve, loss, noise_scale
from lnp.plot.nested import nested_batches, nested_sizes
from lnp.plot.runs import against_compute, position_against_loss, reach_against_compute, reach_against_size

__all__ = [
    "against_compute",
    "chi_loss",
    "chi_net",
    "chi_pos",
    "curve",
    "dashboard",
    "layers",
    "loss",
    "nested_batches",
    "nested_sizes",
    "noise_scale",
    "position_against_loss",
    "reach_against_compute",
    "reach_against_size",
]
