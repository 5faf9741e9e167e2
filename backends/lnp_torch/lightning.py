"""A PyTorch Lightning callback. Works with `lightning.pytorch` and with `pytorch_lightning`, whichever is in use.

    trainer = Trainer(callbacks=[LNPCallback("run.jsonl")])

Measured are the parameters before an update, on the batch that it trains on: with accumulated gradients on the first of
its batches. The loss is what the module's own `training_step` makes of it, run once more on a copy of the module, in
the precision plugin's context. Nothing is subclassed, and gradient clipping, accumulation, strategies and resuming stay
as they are.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from lnp.tracking.tracker import Tracker
from lnp.typed_options import TrackerOptions
from lnp_torch.group import needs_all, process_number
from lnp_torch.host_steps import HostStep, check_same


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
        **options: Unpack[TrackerOptions],
    ) -> None:
        if isinstance(path, Tracker) and (schedule is not None or options):
            raise TypeError(
                "LNPCallback received a tracker, and options beside it. Expected one of the two: give the options to "
                "the tracker."
            )
        options.setdefault("rank", _rank)
        self.tracker = path if isinstance(path, Tracker) else Tracker(path, schedule, **options)
        self._prepare = prepare
        self._refused = self._together = False
        self._reached: int | None = None
        self._measured: tuple[int, float] | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of several callbacks apart."""
        return f"LNPCallback({self.tracker.path!r})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say now if the module cannot be measured; where failures raise, in all processes."""
        self._refused, self._reached = False, None
        if trainer.is_global_zero or self.tracker.on_error == "raise":
            by_hand = self._follows and not pl_module.automatic_optimization
            self._refused = not self.tracker.check(pl_module, BY_HAND if by_hand else None) and by_hand

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure if this update is due; the later batches of an accumulated update are none."""
        step, self._measured = trainer.global_step, None
        since, self._reached = self._reached, step
        if since is None:  # the strategy has wrapped and sharded the module by now
            self._together = self.tracker.option("group") is not None or needs_all(pl_module)
        if not (trainer.is_global_zero or self._together) or self._refused or step == since:
            return
        # several optimizers advance the step by more than one: what is due in between is measured here
        passed = range(step if since is None or since > step else since + 1, step)
        if self.tracker.due(step) or any(self.tracker.due(one) for one in passed):
            with self.tracker.attempt(step):
                self._measure(trainer, pl_module, batch, batch_idx, step)
        self.tracker.count(step, trainer.optimizers[0] if len(trainer.optimizers) == 1 else None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See whether what was measured is the loss of the training step."""
        measured, self._measured = self._measured, None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if measured is not None and isinstance(loss, torch.Tensor):
            with self.tracker.attempt(None, f"assurance that row {measured[0]} is of what the module minimises"):
                check_same(loss * trainer.accumulate_grad_batches, measured[1], ADVICE)  # by which it was divided

    @property
    def _follows(self) -> bool:
        """Whether the module's own training step is what is measured."""
        return self._prepare is None and self.tracker.option("loss") is None and self.tracker.option("forward") is None

    def _measure(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, step: int) -> None:
        model, prepared, options = pl_module, batch, {}
        if self._prepare is not None:
            model, prepared = self._prepare(pl_module, batch)
        elif self._follows:
            options["forward"] = HostStep(_TrainingStep(_Quiet(trainer), batch_idx), id(trainer))
            prepared = {"batch": batch}
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
