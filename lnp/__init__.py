"""lnp: where in the spectrum of the neural tangent kernel a network learns.

`lnp.decompose(model, batch)` splits the speed at which the loss falls into loss scale, network scale and spectral
position, for PyTorch, JAX, TensorFlow, Keras and NumPy models.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lnp import schedule
from lnp.api import cross_response, decompose, measured_loss_change, predicted_loss_change
from lnp.batches.gram import GradientGram, gradient_gram
from lnp.batches.nested import NestedBatches, decompose_nested
from lnp.checkpoints.folder import Checkpoints, open_checkpoints
from lnp.checkpoints.measure import MeasuredCheckpoints, measure_checkpoints
from lnp.contract.linearization import Linearization
from lnp.contract.options import Options
from lnp.contract.registry import load
from lnp.estimators.population import Population
from lnp.results.cross_response import CrossResponse
from lnp.results.decomposition import Decomposition, Layer, Total
from lnp.results.step_taken import StepTaken, snapshot, step_taken
from lnp.runs.power_law import PowerLaw, power_law
from lnp.runs.spectral_reach import Reach, reach, reach_of_runs
from lnp.spectral.deflation import hutch_plus_plus, xtrace
from lnp.spectral.density import Density
from lnp.spectral.kernel import Kernel, kernel
from lnp.spectral.operators import linear_operator
from lnp.spectral.similarity import KernelVelocity, alignment, kernel_velocity, target_alignment
from lnp.spectral.spectrum import Spectrum, spectrum
from lnp.tracking.history import History
from lnp.tracking.tracker import Tracker

if TYPE_CHECKING:
    from lnp import plot as plot
else:  # checkers would take any name for one of lnp's

    def __getattr__(name: str) -> Any:
        """`lnp.plot`, imported when it is used."""
        if name == "plot":
            return importlib.import_module("lnp.plot")
        raise AttributeError(f"module 'lnp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "CrossResponse",
    "Decomposition",
    "Density",
    "GradientGram",
    "History",
    "Kernel",
    "KernelVelocity",
    "Layer",
    "Linearization",
    "MeasuredCheckpoints",
    "NestedBatches",
    "Options",
    "Population",
    "PowerLaw",
    "Reach",
    "Spectrum",
    "StepTaken",
    "Total",
    "Tracker",
    "alignment",
    "cross_response",
    "decompose",
    "decompose_nested",
    "gradient_gram",
    "hutch_plus_plus",
    "kernel",
    "kernel_velocity",
    "linear_operator",
    "load",
    "measure_checkpoints",
    "measured_loss_change",
    "open_checkpoints",
    "plot",
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
