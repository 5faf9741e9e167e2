r"""Where in the spectrum of the kernel the loss gradient sits, and how the eigenvalues are distributed.

With Theta = J J^T = sum_i lambda_i u_i u_i^T and g = dL/df, the loss falls at the rate

    g^T Theta g = ||g||^2 sum_i w_i lambda_i,    w_i = <u_i, g>^2 / ||g||^2,    chi_pos = sum_i w_i lambda_i / tr Theta

chi_pos is the mean of the measure sum_i w_i delta(lambda_i). Lanczos started at g gives its Gauss quadrature, and
started at random signs that of all eigenvalues, sum_i delta(lambda_i) / (N K). Neither needs the kernel as a matrix.

Source: Golub and Meurant, "Matrices, Moments and Quadrature", 2010; Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 38
(2017), doi:10.1137/16M1104974; the decomposition: Nikolaou et al., arXiv 2605.31244.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lnp.api import decompose
from lnp.arguments import Batch, Forward, Loss, Model, Parameters, Seed, Update
from lnp.contract.linearization import Linearization, Vector, accumulation_dtype, device_of, unit
from lnp.contract.options import BatchStatistics, Options
from lnp.contract.registry import evaluate
from lnp.estimators.trace import Estimator, Settings, takes_samples_apart
from lnp.parameter_texts import parameters_of
from lnp.results.decomposition import Decomposition, decomposed
from lnp.results.finished import explained
from lnp.results.preconditioner import joint_options, precondition
from lnp.results.tables import Page, Shown
from lnp.spectral.density import Density, density
from lnp.spectral.lanczos import Quadrature, Tridiagonal, quadrature, tridiagonalize
from lnp.spectral.pages import spectrum_page

TOLERATED = 1e-3
"""Relative error of the first moment above which a note is made; rounding in float32 stays below."""


@dataclass(frozen=True)
class Spectrum(Shown):
    """The spectral measure of the loss gradient: nodes from the largest eigenvalue to the smallest.

    Attributes
    ----------
    eigenvalues:
        Ritz values theta_j, shape (m,); in units of the kernel's entries.
    weights:
        Share of ||g||^2 at each of them, shape (m,), of sum 1.
    shares:
        Share of the loss decrease that each carries, w_j theta_j / sum_i w_i theta_i, shape (m,), of sum 1.
    residuals:
        Each Ritz value lies within this distance of an eigenvalue, shape (m,).
    exhausted:
        Whether the gradient's Krylov space was spanned: the measure is then exact, its nodes are eigenvalues.
    first_moment:
        sum_j w_j theta_j = g^T Theta g / ||g||^2, exact for any number of steps.
    moment_error:
        |first_moment ||g||^2 / rate - 1|, where the rate comes from the gradient alone: what rounding, and a backend's
        Jacobian-vector products, contribute.
    decomposition:
        The batch's decomposition; its trace makes first_moment the position.
    density:
        The density of all eigenvalues, or None without probes.
    notes:
        What the user should know.
    """

    eigenvalues: np.ndarray
    weights: np.ndarray
    shares: np.ndarray
    residuals: np.ndarray
    exhausted: bool
    first_moment: float
    moment_error: float
    decomposition: Decomposition
    density: Density | None = None
    notes: tuple[str, ...] = ()

    @property
    def lambda_max(self) -> float:
        """The largest Ritz value seen; the kernel's largest eigenvalue is not smaller, and rarely larger."""
        nodes = [self.eigenvalues] if self.density is None else [self.eigenvalues, self.density.nodes]
        return float(max(np.max(part, initial=-math.inf) for part in nodes))

    @property
    def trace(self) -> float:
        """tr Theta, by the decomposition's estimator."""
        return self.decomposition.chi_net * self.decomposition.loss_terms

    @property
    def chi_pos(self) -> float:
        """The measure's mean in units of the trace: the spectral position."""
        return self.first_moment / self.trace if self.trace else math.nan

    @property
    def preference(self) -> float:
        """chi_pos N K, see `Decomposition.preference`: 1 for a loss gradient without preference among the modes."""
        return self.chi_pos * (self.decomposition.samples * self.decomposition.outputs)

    @property
    def participation_ratio(self) -> float:
        """(tr Theta)^2 / tr(Theta^2), how many modes share the kernel, between 1 and N K; nan without probes.

        The trace is the decomposition's, tr(Theta^2) / (N K) the second moment of `density`, with its relative error.
        """
        second = math.nan if self.density is None else self.density.dimension * self.density.moment(2)[0]
        return self.trace**2 / second if second else math.nan

    def share_above(self, eigenvalue: float) -> float:
        """Share of the loss decrease on nodes at or above an eigenvalue, in [0, 1]."""
        return float(np.sum(self.shares[self.eigenvalues >= eigenvalue]))

    def weight_above(self, eigenvalue: float) -> float:
        """Share of ||g||^2 on nodes at or above an eigenvalue, in [0, 1]."""
        return float(np.sum(self.weights[self.eigenvalues >= eigenvalue]))

    def _page(self) -> Page:
        return spectrum_page(self)


@parameters_of(decompose)
def spectrum(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    steps: int = 32,
    probes: int = 0,
    forward: Forward = None,
    parameters: Parameters = None,
    estimator: Estimator = "auto",
    rtol: float = 0.01,
    max_probes: int = 64,
    seed: Seed = 0,
    loss_terms: int | None = None,
    microbatch: int | None = None,
    batch_statistics: BatchStatistics = "frozen",
    preconditioner: Update = None,
) -> Spectrum:
    r"""The distribution of which chi_pos is the mean: where in the kernel's spectrum the loss gradient sits.

        sum_i w_i delta(lambda_i),   w_i = <u_i, g>^2 / ||g||^2,   chi_pos = sum_i w_i lambda_i / tr Theta

    by `steps` Lanczos steps on v -> J (J^T v) from g / ||g||, never forming the kernel. A step costs a vector-Jacobian
    and a Jacobian-vector product; memory is that of `steps` outputs (N, K). In a batch that is small for how far
    training has come, g is mostly sampling noise, and so are its weights (docs/theory.md, "Finite batches").

    Parameters
    ----------
    steps:
        Nodes of the quadrature. Fewer come out where the gradient's Krylov space is spanned before.
    probes:
        Random starts for the density of all eigenvalues, `Spectrum.density`; 0 for none, 2 or more for error bars. Each
        costs as much as the measure itself.
    seed:
        Seed of the probes, and of the trace's signs.
    model, batch, loss, forward, parameters, estimator, rtol, max_probes, loss_terms, microbatch, batch_statistics:
        As for `lnp.decompose`.
    preconditioner:
        As for `lnp.decompose`. The spectrum is then that of J M J^T.

    Raises
    ------
    TypeError
        If the backend has no Jacobian-vector products, and inside a compiled function: the last, small eigenproblem is
        solved by NumPy.
    ValueError
        For a number of steps or probes that cannot be, and for a model, batch, loss or option that cannot be used.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
    >>> s = lnp.spectrum(model, (numpy.array([[2.0, 0.0], [0.0, 1.0]]), numpy.array([[1.0], [1.0]])))
    >>> s.eigenvalues.round(9).tolist(), s.weights.round(9).tolist(), s.shares.round(9).tolist()
    ([4.0, 1.0], [0.5, 0.5], [0.8, 0.2])
    >>> round(s.chi_pos, 9), s.exhausted
    (0.5, True)
    """
    options = Options(
        loss=loss,
        forward=forward,
        parameters=parameters,
        seed=seed,
        loss_terms=loss_terms,
        microbatch=microbatch,
        batch_statistics=batch_statistics,
        split=takes_samples_apart(estimator, microbatch),
        population=False,
    )
    computation = RunLanczos(estimator, rtol, max_probes, steps, probes)
    if preconditioner is None:
        return from_lanczos(evaluate(computation, model, (batch,), options))
    return from_lanczos(evaluate(computation, model, (batch,), joint_options(options), update=preconditioner))


@dataclass(frozen=True)
class LanczosResult:
    """The numbers that the device computes: the decomposition, and T for the loss gradient and for each probe.

    Attributes
    ----------
    decomposition:
        The batch's decomposition.
    gradient:
        T from the loss gradient, its entries as tuples of arrays of shape ().
    probes:
        T from each probe.
    notes:
        What the backends have to say.
    """

    decomposition: Decomposition
    gradient: Tridiagonal
    probes: tuple[Tridiagonal, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunLanczos(Settings):
    """The computation of `spectrum`; equal settings are equal, so that compiled code is found again."""

    steps: int
    probes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"steps is {self.steps!r}. Expected a number of Lanczos steps >= 1, such as 32.")
        if not (isinstance(self.probes, int) and self.probes >= 0):
            raise ValueError(f"probes is {self.probes!r}. Expected a number of random starts >= 0, such as 8.")

    def __call__(self, lin: Linearization, update: Vector | None = None) -> LanczosResult:
        lin = lin if update is None else precondition(lin, update)
        if lin.jvp is None:
            raise TypeError(
                "This model's backend has no Jacobian-vector products, which the spectrum needs beside vector-Jacobian "
                "ones. Expected a record with jvp. lnp.decompose does without."
            )
        decomposition, _ = decomposed(lin, estimator=self.estimator, rtol=self.rtol, max_probes=self.max_probes)
        steps = min(self.steps, math.prod(lin.outputs.shape))
        start, _ = unit(lin.xp, lin.loss_gradient)
        gradient = _entries(tridiagonalize(lin, start, steps), steps)
        return LanczosResult(decomposition, gradient, _probe_tridiagonals(lin, steps, self.probes))


def _probe_tridiagonals(lin: Linearization, steps: int, probes: int) -> tuple[Tridiagonal, ...]:
    """T from each probe, in one loop over them: compiled once for any number."""
    if probes == 0:
        return ()
    xp = lin.xp
    device = device_of(lin.outputs)
    index = xp.arange(probes, device=device)[:, None]

    def body(state: tuple) -> tuple:
        p, diagonals, off_diagonals = state
        t = tridiagonalize(lin, lin.signs(p), steps)
        diagonals = xp.where(index == p, t.diagonal[None, :], diagonals)
        off_diagonals = xp.where(index == p, t.off_diagonal[None, :], off_diagonals)
        return p + 1, diagonals, off_diagonals

    empty = xp.zeros((probes, steps), dtype=accumulation_dtype(xp, lin.outputs.dtype), device=device)
    _, diagonals, off_diagonals = lin.while_loop(lambda state: state[0] < probes, body, (0, empty, empty))
    # entries beyond a probe's own size are zero: nodes 0 of weight 0
    return tuple(_entries(Tridiagonal(diagonals[p, :], off_diagonals[p, :], steps), steps) for p in range(probes))


def _entries(t: Tridiagonal, steps: int) -> Tridiagonal:
    """T with tuples of arrays of shape (), which every backend brings to the host in its one transfer."""
    return Tridiagonal(
        tuple(t.diagonal[j] for j in range(steps)), tuple(t.off_diagonal[j] for j in range(steps)), t.size
    )


def from_lanczos(result: LanczosResult) -> Spectrum:
    """The spectrum from what was computed on the device, brought to the host."""
    d = explained(result.decomposition)
    notes = list(result.notes)
    if not isinstance(d.loss, float):
        raise TypeError(
            "lnp.spectrum was called inside a compiled function, where arrays have no values yet. Expected a call "
            "outside of it: its own loops are compiled already."
        )
    measure = quadrature(*result.gradient)
    rayleigh = d.rate * d.loss_terms / d.chi_loss if d.chi_loss else math.nan  # g^T Theta g / ||g||^2
    if d.chi_loss == 0:
        measure = Quadrature(*(np.full(1, math.nan) for _ in range(3)))
        notes.append("the loss gradient is zero: it sits nowhere in the spectrum, the measure is nan")
    decrease = measure.weights * measure.nodes
    moment = float(np.sum(decrease))
    error = abs(moment / rayleigh - 1) if rayleigh else moment
    if error > TOLERATED:
        notes.append(
            f"the measure's mean is off by {error:.1g} from the gradient's own: the backend's Jacobian-vector products "
            "do not belong to its vector-Jacobian products, or lose digits"
        )
    return Spectrum(
        eigenvalues=measure.nodes,
        weights=measure.weights,
        shares=decrease / moment if moment else decrease * math.nan,
        residuals=measure.residuals,
        exhausted=bool(np.all(measure.residuals == 0)),
        first_moment=moment,
        moment_error=error,
        decomposition=d,
        density=density([quadrature(*t) for t in result.probes], d.samples * d.outputs),
        notes=tuple(notes),
    )
