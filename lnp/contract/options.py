"""How a model is to be linearised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

BatchStatistics = Literal["frozen", "coupled"]
BATCH_STATISTICS: tuple[str, ...] = get_args(BatchStatistics)


@dataclass(frozen=True)
class Options:
    """How a model is linearised; what `lnp.decompose` was told, for the backend.

    Attributes
    ----------
    loss:
        Callable, name, or None to infer it.
    forward:
        (model, inputs) -> outputs, or None to call the model itself.
    parameters:
        Which parameters to differentiate: a predicate on names, a glob, names, or None for all trainable ones.
    seed:
        Of the random signs; in JAX also a PRNG key.
    loss_terms:
        The user's own n, or None.
    microbatch:
        Samples that are in memory at a time, or None for the whole batch.
    batch_statistics:
        "frozen" (batch normalisation in training mode keeps this batch's statistics) or "coupled".
    split:
        Whether the samples may be taken one at a time.
    population:
        Whether population values are asked for; None for where they are cheap. False spares the trial whether the loss
        is a mean over samples.

    Raises
    ------
    ValueError
        For other batch statistics, and for a micro-batch, a number of terms or a seed that cannot be.
    """

    loss: str | Callable | None = None
    forward: Callable | None = None
    parameters: Any = None
    seed: Any = 0
    loss_terms: int | None = None
    microbatch: int | None = None
    batch_statistics: str = "frozen"
    split: bool = True
    population: bool | None = None

    def __post_init__(self) -> None:
        if self.batch_statistics not in BATCH_STATISTICS:
            known = ", ".join(map(repr, BATCH_STATISTICS))
            raise ValueError(f"batch_statistics is {self.batch_statistics!r}. Expected one of {known}.")
        if self.microbatch is not None and not (isinstance(self.microbatch, int) and self.microbatch >= 1):
            raise ValueError(f"microbatch is {self.microbatch!r}. Expected a number of samples >= 1, or None.")
        if isinstance(self.loss_terms, int | float) and not self.loss_terms > 0:
            raise ValueError(f"loss_terms is {self.loss_terms!r}. Expected the number of terms that the loss averages.")
        if isinstance(self.seed, int) and self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}. Expected an integer >= 0.")
