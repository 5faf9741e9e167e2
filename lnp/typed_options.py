"""The options of `lnp.decompose` and `lnp.Tracker` as types, so that a checker sees a misspelt one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict

from lnp.arguments import Batch, Forward, Group, Loss, Parameters, Seed, Update
from lnp.contract.options import BatchStatistics
from lnp.estimators.trace import Estimator
from lnp.loggers import LoggerSources
from lnp.results.decomposition import ByLayer


class MeasureOptions(TypedDict, total=False):
    """What `lnp.decompose` takes besides model, batch, loss and how many batches of a loader; see there."""

    forward: Forward
    parameters: Parameters
    by_layer: ByLayer
    population: bool | None
    estimator: Estimator
    rtol: float
    max_probes: int
    seed: Seed
    loss_terms: int | None
    microbatch: int | None
    batch_statistics: BatchStatistics
    preconditioner: Update
    group: Group
    sample_losses: bool


class LossOptions(MeasureOptions, total=False):
    """The same with the loss."""

    loss: Loss


class DecomposeOptions(LossOptions, total=False):
    """What `lnp.decompose` takes besides model and batch; see there."""

    batches: float | None


class WatchOptions(DecomposeOptions, total=False):
    """What `lnp.Tracker` takes besides path, schedule and batch; see there."""

    learning_rate: Any
    tags: Mapping[str, Any] | None
    loggers: LoggerSources
    rank: int | Callable[[], int] | None
    fsync: bool
    on_error: Literal["warn", "raise"]


class TrackerOptions(WatchOptions, total=False):
    """The same with a batch."""

    batch: Batch | Iterable[Batch]
