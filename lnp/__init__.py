"""lnp: where in the spectrum of the neural tangent kernel a network learns.

`lnp.decompose(model, batch)` splits the speed at which the loss falls into loss scale, network scale and spectral
position, for PyTorch, JAX and NumPy models.
"""

from lnp import schedule
from lnp.backends import Options, load
from lnp.cross import CrossResponse
from lnp.decomposition import Decomposition, Layer
from lnp.history import History
from lnp.linearization import Linearization
from lnp.measure import cross_response, decompose, measured_loss_change, predicted_loss_change
from lnp.population import Population
from lnp.steps import StepTaken, snapshot, step_taken
from lnp.tracker import Tracker

__version__ = "0.1.0"

__all__ = [
    "CrossResponse",
    "Decomposition",
    "History",
    "Layer",
    "Linearization",
    "Options",
    "Population",
    "StepTaken",
    "Tracker",
    "cross_response",
    "decompose",
    "load",
    "measured_loss_change",
    "predicted_loss_change",
    "schedule",
    "snapshot",
    "step_taken",
]
