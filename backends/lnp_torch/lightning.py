"""A PyTorch Lightning callback. Works with `lightning.pytorch` and with `pytorch_lightning`, whichever is in use.

    trainer = Trainer(callbacks=[LNPCallback("run.jsonl")])

Measured are the parameters before an update, on the batch that it trains on: with accumulated gradients on the first of
its batches. The forward pass runs in the precision plugin's context. Nothing is subclassed, and gradient clipping,
accumulation, strategies and resuming stay as they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lnp.tracking.tracker import Tracker


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
        Of `lnp.Tracker`; or a Tracker in the place of the path. Loss and forward are found as `lnp.decompose` finds
        them: the module is called with the inputs of a batch (inputs, targets). Where that is not so, pass `loss=`,
        `forward=` or `prepare=`.
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
        self, path: Any = None, schedule: Any = None, *, prepare: Prepare | None = None, **options: Any
    ) -> None:
        if isinstance(path, Tracker) and (schedule is not None or options):
            raise TypeError(
                "LNPCallback received a tracker, and options beside it. Expected one of the two: give the options to "
                "the tracker."
            )
        self.tracker = path if isinstance(path, Tracker) else Tracker(path, schedule, **{"rank": 0, **options})
        self._prepare = prepare

    @property
    def state_key(self) -> str:
        """Tells the states of several callbacks apart."""
        return f"LNPCallback({self.tracker.path!r})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say now if the module cannot be measured; where failures raise, in all processes."""
        if trainer.is_global_zero or self.tracker.on_error == "raise":
            self.tracker.check(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure if this update is due; the later batches of an accumulated update are none."""
        step = trainer.global_step
        if trainer.is_global_zero and self.tracker.due(step):
            with self.tracker.attempt(step):
                self._measure(trainer, pl_module, batch, step)

    def _measure(self, trainer: Any, pl_module: Any, batch: Any, step: int) -> None:
        model, prepared = (pl_module, batch) if self._prepare is None else self._prepare(pl_module, batch)
        self.tracker.tags.setdefault("parameters", trained(pl_module))
        with trainer.precision_plugin.train_step_context():
            measured = self.tracker.observe(step, model, prepared)
        if measured is None:
            return
        for logger in trainer.loggers:
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


def trained(module: torch.nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
