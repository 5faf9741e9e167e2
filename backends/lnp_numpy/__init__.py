"""lnp for NumPy: explicit Jacobians, SciPy linear operators, linear and random-feature models. The oracle of the other backends."""

from lnp_numpy.backend import accepts, evaluate, linearize
from lnp_numpy.models import JacobianModel, LinearModel, OperatorModel, RandomFeatureModel

__all__ = [
    "JacobianModel",
    "LinearModel",
    "OperatorModel",
    "RandomFeatureModel",
    "accepts",
    "evaluate",
    "linearize",
]
