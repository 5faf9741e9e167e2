r"""The empirical neural tangent kernel of a small batch as a matrix, and its eigenmodes.

    Theta[(n, k), (m, l)] = sum_p J[n, k, p] J[m, l, p]      N K rows, positive semi-definite
    per class  Theta_k[n, m] = Theta[(n, k), (m, k)]         K kernels of N rows
    traced     sum_k Theta[(n, k), (m, k)]                   N rows

The loss falls at the rate g^T Theta g = ||g||^2 sum_i w_i lambda_i, to which mode i contributes w_i lambda_i.

Source: Jacot, Gabriel, Hongler, arXiv 1806.07572; the modes' contributions: Nikolaou et al., arXiv 2605.31244; entropy
of the kernel's spectrum as a collective variable of training: Tovey, Krippendorf, Nikolaou, Holm, arXiv 2305.00995.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from lnp.api import decompose
from lnp.arguments import Batch, Forward, Loss, Model, Parameters
from lnp.contract.linearization import Linearization
from lnp.contract.options import BatchStatistics, Options
from lnp.optional import import_optional
from lnp.parameter_texts import parameters_of
from lnp.results.tables import Page, Shown
from lnp.spectral import eager
from lnp.spectral.pages import kernel_page
from lnp.spectral.similarity import effective_rank, entropy, participation_ratio

Kind = Literal["full", "per_class", "traced"]
KINDS: tuple[str, ...] = get_args(Kind)
Item = TypeVar("Item")
BLOCK_BYTES = 2**26
"""Memory of the rows that are formed between two steps of the progress bar."""


@dataclass(frozen=True)
class Kernel(Shown):
    """The kernel of a batch of N samples with K outputs.

    Attributes
    ----------
    matrix:
        Shape (N K, N K), samples outermost; (K, N, N) per class; (N, N) traced over outputs. Symmetric, float64.
    kind:
        "full", "per_class" or "traced".
    loss_gradient:
        g = dL/df, shape (N, K).
    asymmetry:
        Largest |Theta - Theta^T| in units of the largest entry, before both were averaged: rounding of the backend.
    notes:
        What the user should know.
    """

    matrix: np.ndarray
    kind: Kind
    loss_gradient: np.ndarray
    asymmetry: float
    notes: tuple[str, ...] = ()

    @cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(self.matrix)
        return values[..., ::-1], vectors[..., ::-1]

    @property
    def eigenvalues(self) -> np.ndarray:
        """lambda_i from the largest down, shape (N K,), (K, N) or (N,)."""
        return self._eigen[0]

    @property
    def eigenvectors(self) -> np.ndarray:
        """u_i as columns, in the eigenvalues' order."""
        return self._eigen[1]

    @property
    def weights(self) -> np.ndarray:
        """w_i = <u_i, g>^2 / ||g||^2, shape (N K,), of sum 1: the share of the loss gradient on each mode."""
        g = self._flat_gradient()
        square = g @ g
        return (self.eigenvectors.T @ g) ** 2 / (square if square else math.nan)

    @property
    def contributions(self) -> np.ndarray:
        """w_i lambda_i / sum_j w_j lambda_j, shape (N K,), of sum 1: each mode's share of the loss decrease."""
        decrease = self.weights * self.eigenvalues
        total = np.sum(decrease)
        return decrease / (total if total else math.nan)

    @property
    def rate(self) -> float:
        """-dL/dt = g^T Theta g."""
        g = self._flat_gradient()
        return float(g @ self.matrix @ g)

    @property
    def trace(self) -> float:
        """tr Theta, whatever the kind."""
        return float(np.sum(np.trace(self.matrix, axis1=-2, axis2=-1)))

    @property
    def chi_pos(self) -> float:
        """g^T Theta g / (||g||^2 tr Theta), the spectral position; nan for 0/0."""
        g = self._flat_gradient()
        scale = float(g @ g) * self.trace
        return self.rate / scale if scale else math.nan

    @property
    def preference(self) -> float:
        """chi_pos N K, see `Decomposition.preference`: 1 for a loss gradient without preference among the modes."""
        return self.chi_pos * self.loss_gradient.size

    @property
    def entropy(self) -> Any:
        """Von Neumann entropy of the spectrum in nats, see `lnp.spectral.similarity.entropy`; shape (K,) per class."""
        return entropy(self.matrix)

    @property
    def effective_rank(self) -> Any:
        """exp(entropy), between 1 and the number of rows."""
        return effective_rank(self.matrix)

    @property
    def participation_ratio(self) -> Any:
        """(tr Theta)^2 / ||Theta||_F^2, between 1 and the number of rows: 1 / chi_pos of a mistake that comes from
        parameters off in random directions.
        """
        return participation_ratio(self.matrix)

    def _page(self) -> Page:
        return kernel_page(self)

    def _flat_gradient(self) -> np.ndarray:
        """g in the order of the kernel's rows, shape (N K,); an error for kernels that are not of all outputs."""
        if self.matrix.shape != (self.loss_gradient.size,) * 2:
            raise ValueError(
                f"The kernel is {self.kind}, {self.matrix.shape}, while the loss gradient has "
                f"{self.loss_gradient.size} entries. Expected the kernel of all outputs for rate, position and modes. "
                'Ask for kind="full".'
            )
        return self.loss_gradient.reshape(-1).astype(np.float64)  # whose squares may leave the range of float32


@parameters_of(decompose)
def kernel(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    kind: Kind = "full",
    forward: Forward = None,
    parameters: Parameters = None,
    loss_terms: int | None = None,
    batch_statistics: BatchStatistics = "frozen",
    max_bytes: int = 2**31,
    progress: bool | None = None,
) -> Kernel:
    r"""The empirical neural tangent kernel Theta = J J^T of a small batch as a NumPy array.

    Row by row J (J^T e), in blocks: N K vector-Jacobian and as many Jacobian-vector products, for any network, whether
    its samples interact or not. For larger batches `lnp.spectrum` and `lnp.linear_operator` never form it.

    Parameters
    ----------
    kind:
        "full": all outputs of all samples, (N K, N K). "per_class": K kernels of one output each, (K, N, N). "traced":
        their sum, (N, N). All cost the same products; what differs is the memory.
    max_bytes:
        Memory that matrix and block may take.
    progress:
        Whether to show a progress bar (needs tqdm: pip install 'lnp[spectrum]'). None: on a terminal, where tqdm is
        installed.
    model, batch, loss, forward, parameters, loss_terms, batch_statistics:
        As for `lnp.decompose`. The loss gives the loss gradient, and no more.

    Raises
    ------
    TypeError
        If the backend has no Jacobian-vector products.
    ValueError
        For an unknown kind, a matrix beyond `max_bytes`, and a model, batch, loss or option that cannot be used.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
    >>> k = lnp.kernel(model, (numpy.array([[2.0, 0.0], [0.0, 1.0]]), numpy.array([[1.0], [1.0]])))
    >>> k.matrix.tolist(), k.contributions.round(9).tolist()
    ([[4.0, 0.0], [0.0, 1.0]], [0.8, 0.2])
    >>> round(k.chi_pos, 9)
    0.5
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of kernel {kind!r}. Expected one of {', '.join(map(repr, KINDS))}.")
    options = Options(
        loss=loss,
        forward=forward,
        parameters=parameters,
        loss_terms=loss_terms,
        batch_statistics=batch_statistics,
        split=False,
        population=False,
    )
    lin = eager.linearize(model, batch, options)
    matrix = _fill_matrix(lin, kind, max_bytes, progress)
    transposed = np.swapaxes(matrix, -1, -2)
    largest = np.max(np.abs(matrix), initial=0.0)
    asymmetry = float(np.max(np.abs(matrix - transposed), initial=0.0) / largest) if largest else 0.0
    return Kernel((matrix + transposed) / 2, kind, eager.to_numpy(lin.loss_gradient), asymmetry, lin.notes)


def _fill_matrix(lin: Linearization, kind: Kind, max_bytes: int, progress: bool | None) -> np.ndarray:
    """The kernel's matrix, block by block, before it is symmetrised; a ValueError where it takes too much memory."""
    samples, outputs = lin.outputs.shape
    size = samples * outputs
    shape = {"full": (size, size), "per_class": (outputs, samples, samples), "traced": (samples, samples)}[kind]
    block = max(1, min(size, 64, BLOCK_BYTES // (8 * size)))
    needed = 8 * (2 * math.prod(shape) + 2 * block * size)  # the matrix is symmetrised in a copy
    if needed > max_bytes:
        raise ValueError(
            f"The {kind} kernel of {samples} samples x {outputs} outputs takes {needed / 2**30:.2g} GiB. Expected at "
            f"most max_bytes, {max_bytes / 2**30:.2g} GiB. Take fewer samples, another kind (per_class, traced), raise "
            "max_bytes, or use lnp.spectrum, which forms no matrix."
        )
    matrix = np.zeros(shape)
    for start, rows in with_progress(eager.kernel_rows(lin, block), math.ceil(size / block), progress):
        for index, row in enumerate(rows, start=start):
            n, k = divmod(index, outputs)
            if kind == "full":
                matrix[index] = row.reshape(-1)
            elif kind == "per_class":
                matrix[k, n] = row[:, k]
            else:
                matrix[n] += row[:, k]
    return matrix


def with_progress(items: Iterable[Item], total: int, progress: bool | None) -> Iterable[Item]:
    """The items, with a progress bar where it was asked for or somebody is looking.

    Raises
    ------
    ImportError
        If it was asked for and tqdm is not installed.
    """
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return items
    try:
        tqdm = import_optional("tqdm", "progress=True", install="'lnp[spectrum]'").tqdm
    except ImportError:
        if progress is None:
            return items
        raise
    return tqdm(items, total=total, desc="kernel", leave=False)
