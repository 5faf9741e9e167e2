r"""The decomposition for preconditioned gradient descent, as Adam-like optimizers take it.

An optimizer whose update is -eta M grad L, with a positive diagonal M (Adam: 1 / (sqrt(v) + eps)), lowers the loss at
the speed

    rate = (grad L)^T M grad L = g^T Theta_M g,   Theta_M = J M J^T

and the same three factors hold with Theta_M in the place of Theta. With R = M^{1/2} it is the decomposition of the
record whose Jacobian is J R: its pull-backs are R J^T v, its Jacobian-vector products J R u. The squared norms of
single samples do not carry over, so that the trace is estimated jointly or exactly.

Source: docs/theory.md, "A step that was really taken".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lnp.contract.linearization import Linearization, Vector
from lnp.contract.options import Options
from lnp.estimators.trace import Settings
from lnp.results.decomposition import ByLayer, Decomposition, decomposed


def precondition(lin: Linearization, diagonal: Vector) -> Linearization:
    """The record of the Jacobian J M^{1/2}, for M with this diagonal, a vector in parameter space with entries >= 0.

    Where an entry is negative, the core's numbers are nan. Pure, safe to trace and compile.
    """
    jvp = lin.jvp
    root = {name: lin.xp.sqrt(entries) for name, entries in diagonal.items()}

    def scale(u: Vector) -> Vector:
        return {name: u[name] * root[name] for name in u}

    return replace(
        lin,
        vjp=lambda v: scale(lin.vjp(v)),
        jvp=None if jvp is None else lambda u: jvp(scale(u)),
        loss_along=None,
        gradient_pass=None,
        coupled=None,
        sample_square_norms=None,
        group_square_norms=None,
        subset=None,
        notes=(*lin.notes, "preconditioned: the kernel is J M J^T"),
    )


def joint_options(options: Options) -> Options:
    """The options of a record that is to be preconditioned: its samples are not taken apart.

    Raises
    ------
    ValueError
        For micro-batches, which are made of samples that are.
    """
    if options.microbatch is not None:
        raise ValueError(
            f"Received microbatch={options.microbatch} beside preconditioner=. Expected one of them, since the kernel "
            "J M J^T is measured on the whole batch. Take fewer samples."
        )
    return replace(options, split=False, population=False)


@dataclass(frozen=True)
class DecomposePreconditioned(Settings):
    """The computation of `lnp.decompose(preconditioner=)`.

    The diagonal arrives as `update`, a vector of the backend's.
    """

    by_layer: ByLayer
    population: bool | None
    sample_losses: bool

    def __call__(self, lin: Linearization, update: Vector) -> Decomposition:
        estimator = "joint" if self.estimator == "per_sample" else self.estimator
        return decomposed(
            precondition(lin, update), estimator=estimator, rtol=self.rtol, max_probes=self.max_probes,
            by_layer=self.by_layer, population=self.population is True, sample_losses=self.sample_losses,
        )[0]  # fmt: skip
