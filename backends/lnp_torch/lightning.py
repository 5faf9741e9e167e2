"""A PyTorch Lightning callback. Works with `lightning.pytorch` and with `pytorch_lightning`, whichever is in use.

    trainer = Trainer(callbacks=[LNPCallback("run.jsonl")])

Measured are the parameters before an update, on the batch that it trains on: with accumulated gradients on the first of
its batches, or on all of them. The loss is what the module's own `training_step` makes of it, run once more on a copy
of the module, in the precision plugin's context. Nothing is subclassed, and gradient clipping, accumulation, strategies
and resuming stay as they are.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch

from lnp.results.streamed import Alike
from lnp.tracking.tracker import Tracker
from lnp.typed_options import TrackerOptions
from lnp_torch.group import needs_all, process_number
from lnp_torch.host_steps import HostStep, check_same
from lnp_torch.replay import copied


def _library() -> Any:
    """The library that is in use, or else the one that is installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("lnp_torch.lightning needs PyTorch Lightning. Run: pip install 'lnp[lightning]'")


Prepare = Callable[[Any, Any], tuple[Any, Any]]


class LNPCallback(_library().Callback):  # type: ignore[misc]
    """Measures a LightningModule while it trains.

    Parameters
    ----------
    path, schedule, options:
        Of `lnp.Tracker`; or a Tracker in the place of the path. With `loss=` or `forward=` the module is called with
        the inputs of a batch (inputs, targets) in the place of its `training_step`, as `lnp.decompose` calls it. A
        module that optimizes by hand (several optimizers) needs one of them, or `prepare=`.
    accumulated:
        With `accumulate_grad_batches`: measure all batches whose gradients an update adds up, as the mean of their
        losses that the trainer minimises, in the place of the first one. They are kept until the last one comes, before
        which the measurement is made. In one process.
    prepare:
        (module, batch) -> (model, batch) as `lnp.decompose` takes them, for modules that hold the model or batches of
        another form: `prepare=lambda module, batch: (module.net, (batch["image"], batch["label"]))`.

    The values also go to the trainer's loggers, directly: `self.log` would drop all steps off `log_every_n_steps`. Only
    the first process measures. The callback's state is part of the checkpoint, so that a resumed run goes on. What
    fails on the way is told once, and the fit goes on (`on_error` of the tracker).

    Raises
    ------
    TypeError
        If a tracker and options of another one are given.
    """

    def __init__(
        self,
        path: Any = None,
        schedule: Any = None,
        *,
        prepare: Prepare | None = None,
        accumulated: bool = False,
        **options: Unpack[TrackerOptions],
    ) -> None:
        if isinstance(path, Tracker) and (schedule is not None or options):
            raise TypeError(
                "LNPCallback received a tracker, and options beside it. Expected one of the two: give the options to "
                "the tracker."
            )
        options.setdefault("rank", _rank)
        self.tracker = path if isinstance(path, Tracker) else Tracker(path, schedule, **options)
        self._prepare, self._accumulated = prepare, accumulated
        self._update: _Update | None = None
        self._refused = self._together = self._uncounted = False
        self._reached: int | None = None
        self._measured: tuple[int, float] | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of several callbacks apart."""
        return f"LNPCallback({self.tracker.path!r})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say now if the module cannot be measured; where failures raise, in all processes."""
        self._refused = self._uncounted = False
        self._reached = self._update = None
        if trainer.is_global_zero or self.tracker.on_error == "raise":
            by_hand = self._follows and not pl_module.automatic_optimization
            self._refused = not self.tracker.check(pl_module, BY_HAND if by_hand else None) and by_hand

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure if this update is due, at its first batch; all batches of an accumulated one at its last."""
        step, self._measured = trainer.global_step, None
        self._begin_update(trainer, pl_module, step)
        if self._update is not None and self._update.takes(trainer, batch, batch_idx):
            with self.tracker.attempt(step):
                self._measure(trainer, pl_module, self._update.batches, self._update.index, step)
            if self._measured is None:
                self._update = None
        if self._uncounted and (self._update is None or self._update.complete):  # a measurement sees updates before it
            self._uncounted = False
            self.tracker.count(step, trainer.optimizers[0] if len(trainer.optimizers) == 1 else None)

    def _begin_update(self, trainer: Any, pl_module: Any, step: int) -> None:
        """See whether an update begins, and is to be measured."""
        since, self._reached = self._reached, step
        if since is None:  # the strategy has wrapped and sharded the module by now
            self._together = self.tracker.option("group") is not None or needs_all(pl_module)
        if not (trainer.is_global_zero or self._together) or self._refused or step == since:
            return
        self._update, self._uncounted = None, True
        # several optimizers advance the step by more than one: what is due in between is measured here
        passed = range(step if since is None or since > step else since + 1, step)
        if self.tracker.due(step) or any(self.tracker.due(one) for one in passed):
            self._update = _Update(trainer.accumulate_grad_batches if self._accumulated else 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See whether what was measured is the loss of the training step."""
        measured, self._measured, update = self._measured, None, self._update
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if update is None or not isinstance(loss, torch.Tensor):
            return
        update.trained += float(loss) * trainer.accumulate_grad_batches / update.size  # by which it was divided
        if measured is not None:
            self._update = None
            with self.tracker.attempt(None, f"assurance that row {measured[0]} is of what the module minimises"):
                check_same(update.trained, measured[1], ADVICE)

    @property
    def _follows(self) -> bool:
        """Whether the module's own training step is what is measured."""
        return self._prepare is None and self.tracker.option("loss") is None and self.tracker.option("forward") is None

    def _measure(self, trainer: Any, pl_module: Any, batches: list[Any], batch_idx: int, step: int) -> None:
        model, every, options = pl_module, batches, dict[str, Any]()
        if self._prepare is not None:
            pairs = [self._prepare(pl_module, batch) for batch in batches]
            model, every = pairs[0][0], [batch for _, batch in pairs]
        elif self._follows:
            options["forward"] = HostStep(_TrainingStep(_Quiet(trainer), batch_idx), id(trainer))
            every = [{"batch": batch} for batch in batches]
        prepared: Any = every[0]
        if self._update is not None and self._update.size > 1:
            prepared, options["batches"] = Alike(every, self._update.size), len(every)
        self.tracker.tags.setdefault("parameters", trained(pl_module))
        with trainer.precision_plugin.train_step_context():
            measured = self.tracker.measure(step, model, prepared, options=options)
        if measured is None:
            return
        self._measured = None if self._together else (step, measured.loss)  # a step has the loss of this process
        for logger in trainer.loggers if trainer.is_global_zero else ():
            with self.tracker.attempt(None, f"the values of step {step} in {type(logger).__name__}"):
                logger.log_metrics(self.tracker.latest, step=step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let others write to the file."""
        self.tracker.close()

    def state_dict(self) -> dict[str, Any]:
        """The tracker's."""
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The tracker's."""
        with self.tracker.attempt(None, "the tracker's state in this checkpoint"):
            self.tracker.load_state_dict(state_dict)


@dataclass
class _Update:
    """An update that is measured, and the batches that it has seen so far.

    Attributes
    ----------
    size:
        The number that the trainer divides each batch's loss by; 1 where the first batch alone is measured.
    index:
        Of the first batch.
    trained:
        The loss of the batches that have been trained on.
    """

    size: int
    batches: list[Any] = field(default_factory=list)
    index: int = 0
    trained: float = 0.0
    complete: bool = False

    def takes(self, trainer: Any, batch: Any, index: int) -> bool:
        """Whether this batch, which is kept, is the last one of the update."""
        if self.complete:
            return False
        last = trainer.is_last_batch or index + 1 >= trainer.num_training_batches
        self.complete = self.size == 1 or last or (index + 1) % self.size == 0
        self.index = index if not self.batches else self.index
        self.batches.append(batch if self.size == 1 else copied(batch))  # the training step may write to it
        return self.complete


def _rank() -> int:
    """This process among all; also before they know each other, and where each machine counts its own."""
    return process_number() or 0


def trained(module: torch.nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


BY_HAND = (
    "This module optimizes by hand (automatic_optimization is False), as with several optimizers, and its "
    "training_step updates it: what it minimises cannot be seen. Expected loss=, forward= or prepare= for LNPCallback, "
    "which say what to measure."
)
ADVICE = "Pass loss=, forward= or prepare= to LNPCallback, which say what the training_step makes of a batch."


@dataclass(frozen=True)
class _TrainingStep:
    """The module's own `training_step` on a copy of it, which logs nothing.

    Attributes
    ----------
    trainer:
        Stands for the trainer.
    index:
        Of the batch.
    """

    trainer: Any
    index: int

    def __call__(self, model: Any, batch: Any, outputs: list[Any], own: bool) -> Any:
        vars(model).update(_trainer=self.trainer, log=_nothing, log_dict=_nothing)
        takes = inspect.signature(model.training_step).parameters
        index = [self.index] if len(takes) > 1 or "batch_idx" in takes else []
        loss = model.training_step(batch, *index)
        return loss.get("loss") if isinstance(loss, Mapping) else loss


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a copy logs."""


class _Quiet:
    """A trainer to look at, whose loggers take everything and keep nothing."""

    def __init__(self, trainer: Any) -> None:
        self._of = trainer
        self.loggers = [importlib.import_module(f"{_library().__name__}.loggers.logger").DummyLogger()]
        self.logger = self.loggers[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)
