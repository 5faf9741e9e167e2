"""lnp: where in the spectrum of the neural tangent kernel a network learns.

`lnp.decompose(model, batch)` splits the speed at which the loss falls into loss scale, network scale and spectral
position, for PyTorch, JAX, TensorFlow, Keras and NumPy models.
"""

from lnp import schedule
from lnp.backends import Options, load
from lnp.cross import CrossResponse
from lnp.decomposition import Decomposition, Layer
from lnp.deflation import hutch_plus_plus, xtrace
from lnp.density import Density
from lnp.history import History
from lnp.kernel import Kernel, kernel
from lnp.linearization import Linearization
from lnp.measure import cross_response, decompose, measured_loss_change, predicted_loss_change
from lnp.operators import linear_operator
from lnp.population import Population
from lnp.reach import Reach, reach, reach_of_runs
from lnp.scaling import PowerLaw, power_law
from lnp.similarity import KernelVelocity, alignment, kernel_velocity, target_alignment
from lnp.spectrum import Spectrum, spectrum
from lnp.steps import StepTaken, snapshot, step_taken
from lnp.tracker import Tracker

__version__ = "0.1.0"

__all__ = [
    "CrossResponse",
    "Decomposition",
    "Density",
    "History",
    "Kernel",
    "KernelVelocity",
    "Layer",
    "Linearization",
    "Options",
    "Population",
    "PowerLaw",
    "Reach",
    "Spectrum",
    "StepTaken",
    "Tracker",
    "alignment",
    "cross_response",
    "decompose",
    "hutch_plus_plus",
    "kernel",
    "kernel_velocity",
    "linear_operator",
    "load",
    "measured_loss_change",
    "power_law",
    "predicted_loss_change",
    "reach",
    "reach_of_runs",
    "schedule",
    "snapshot",
    "spectrum",
    "step_taken",
    "target_alignment",
    "xtrace",
]
