"""lnp for NumPy, the oracle of the other backends: explicit Jacobians, SciPy operators, linear and random features."""

from lnp_numpy.backend import accepts, evaluate, linearize
from lnp_numpy.model import JacobianModel, LinearModel, OperatorModel, RandomFeatureModel
from lnp_numpy.updates import difference, snapshot

__all__ = [
    "JacobianModel",
    "LinearModel",
    "OperatorModel",
    "RandomFeatureModel",
    "accepts",
    "difference",
    "evaluate",
    "linearize",
    "snapshot",
]
