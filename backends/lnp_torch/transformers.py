"""Watches a Hugging Face Trainer.

    tracker = attach(trainer, "run.jsonl")
    trainer.train()

The Trainer's callbacks see neither inputs nor outputs. `attach` therefore wraps `training_step` on this one trainer,
which stays what it is: accumulation, label smoothing, `compute_loss_func`, mixed precision and resuming are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lnp.losses import kinds
from lnp.tracking.tracker import Tracker

try:
    import transformers
    from transformers.modeling_outputs import SequenceClassifierOutput
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        "lnp_torch.transformers needs Hugging Face Transformers. Run: pip install 'lnp[transformers]'"
    ) from error

LABELS = "labels"
ZERO_3 = 3
"""The stage from which DeepSpeed shards parameters."""
CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
"""Names of the classes whose labels are shifted by one."""


def attach(trainer: Any, path: Any = None, schedule: Any = None, *, log: bool = True, **options: Any) -> Tracker:
    """Measure the trainer's model while it trains, and return the tracker.

    Measured are the parameters before an update, on the batch that it trains on: with accumulated gradients on the
    first of its batches, as a mean over that batch's own labels. The loss is the one that the trainer minimises. What
    fails on the way is told once, and training goes on (`on_error` of the tracker). A trainer that shards parameters
    (FSDP, ZeRO-3), of which the tracker warns here, is left as it is.

    Parameters
    ----------
    path, schedule, options:
        Of `lnp.Tracker`; or a Tracker in the place of the path. `loss=` replaces the trainer's.
    log:
        Also hand the values to `trainer.log`, and with it to everything that the trainer reports to.

    Raises
    ------
    TypeError
        If a tracker and options of another one are given.
    ValueError
        If a tracker is attached already, or if the trainer's class computes a loss of its own and `loss=` is not given;
        with `on_error="raise"` also, in every process, if the trainer shards parameters.
    """
    if isinstance(path, Tracker) and (schedule is not None or options):
        raise TypeError(
            "attach() received a tracker, and options beside it. Expected one of the two: give the options to the "
            "tracker."
        )
    if isinstance(vars(trainer).get("training_step"), _Watched):
        raise ValueError("This trainer has a tracker already. Expected one: call detach(trainer) first.")
    tracker = path if isinstance(path, Tracker) else Tracker(path, schedule, **options)
    own = type(trainer).compute_loss is not transformers.Trainer.compute_loss
    if own and tracker.option("loss") is None:
        raise ValueError(
            f"{type(trainer).__name__} overrides compute_loss, and what it computes cannot be seen from outside. "
            "Expected loss=, a function (outputs, labels) -> scalar; or compute_loss_func= of the Trainer, which is "
            "understood."
        )
    reason = _refusal(trainer)
    if reason is None:
        trainer.training_step = _Watched(
            trainer, tracker, log, trainer.training_step, vars(trainer).get("training_step")
        )
    elif trainer.is_world_process_zero() or tracker.on_error == "raise":
        tracker.check(trainer.model, reason)
    return tracker


def detach(trainer: Any) -> None:
    """Stop watching; the trainer is as it was.

    Raises
    ------
    ValueError
        If its `training_step` has been replaced or wrapped since.
    """
    watched = vars(trainer).get("training_step")
    if watched is None:
        return
    if not isinstance(watched, _Watched):
        raise ValueError(
            f"This trainer's training_step is a {type(watched).__name__} that attach() has not put there. Expected "
            "attach()'s own. Take away first what has been put around it since."
        )
    if watched.before is None:
        del trainer.training_step
    else:
        trainer.training_step = watched.before


@dataclass(eq=False)
class _Watched:
    """A trainer's training step, with a measurement before it where one is due.

    Attributes
    ----------
    original:
        The training step itself.
    before:
        What the trainer, and not its class, had under this name; None without.
    """

    trainer: Any
    tracker: Tracker
    log: bool
    original: Callable
    before: Callable | None
    checked: bool = False

    def __call__(self, model: Any, inputs: Mapping[str, Any], *rest: Any, **more: Any) -> Any:
        self._check(model)
        step = self.trainer.state.global_step
        if self.trainer.is_world_process_zero() and self.tracker.due(step):
            with self.tracker.attempt(step):
                self._measure(step, model, inputs)
        return self.original(model, inputs, *rest, **more)

    def _check(self, model: Any) -> None:
        """At the first step, which all processes take: the model is wrapped and sharded only then."""
        if not self.checked and (self.trainer.is_world_process_zero() or self.tracker.on_error == "raise"):
            self.tracker.check(model)
        self.checked = True

    def _measure(self, step: int, model: Any, inputs: Mapping[str, Any]) -> None:
        """What `training_step` is about to do with the batch, measured."""
        trainer, tracker = self.trainer, self.tracker
        model.train()  # as it does itself, at once
        options: dict[str, Any] = {}
        batch, loss = _batch(trainer, trainer._prepare_inputs(dict(inputs)), tracker.option("loss"))
        if loss is not None:
            options["loss"] = loss
        unwrapped = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        if "_original_forward" in vars(unwrapped) and tracker.option("forward") is None:
            options["forward"] = _Forward(trainer.accelerator)
        tracker.tags.setdefault("parameters", sum(p.numel() for p in unwrapped.parameters() if p.requires_grad))
        with trainer.compute_loss_context_manager():
            measured = tracker.observe(step, unwrapped, batch, options=options)
        if measured is not None and self.log:
            with tracker.attempt(None, f"the values of step {step} in the trainer's log"):
                trainer.log(dict(tracker.latest))


def _refusal(trainer: Any) -> str | None:
    """Why the trainer's model cannot be measured, as far as the trainer says so itself."""
    sharded = None
    if trainer.is_fsdp_enabled:
        sharded = "FSDP"
    elif trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == ZERO_3:
        sharded = "DeepSpeed's ZeRO-3"
    if sharded is None:
        return None
    return (
        f"This trainer shards the parameters over its processes ({sharded}), and a measurement needs them whole. "
        "Expected whole parameters in each process. Train with data parallelism or ZeRO up to stage 2, or measure a "
        "checkpoint with lnp.decompose in a process of its own."
    )


@dataclass(frozen=True)
class _Forward:
    """The model in its mixed precision, without the copy of its logits in float32 from which no gradient flows."""

    accelerator: Any

    def __call__(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        with self.accelerator.autocast():
            return model._original_forward(**inputs)


def _batch(trainer: Any, inputs: dict[str, Any], given: Any) -> tuple[Any, Any]:
    """(batch, loss) for `lnp.decompose`: the model's own loss from a dictionary, or a loss of the trainer's."""
    custom = given is not None or trainer.compute_loss_func is not None or trainer.label_smoother is not None
    if not custom or LABELS not in inputs:
        return inputs, given
    labels = inputs.pop(LABELS)
    if given is not None:
        return (inputs, labels), given
    shifted = type(trainer.accelerator.unwrap_model(trainer.model)).__name__ in CAUSAL
    if trainer.compute_loss_func is not None:
        return (inputs, labels), _Custom(trainer.compute_loss_func, shifted)
    return (inputs, labels), _Smoothed(trainer.label_smoother, shifted)


@dataclass(frozen=True)
class _Custom:
    """`compute_loss_func` as (outputs, labels) -> scalar, a mean over the batch's own labels."""

    function: Any
    shifted: bool

    def __call__(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return self.function(_outputs(logits), labels, num_items_in_batch=self._counted(labels))

    def loss_terms(self, outputs: Any, labels: torch.Tensor) -> tuple[Any, tuple[str, ...]]:
        """(n, notes): what the trainer counts, the labels that are not ignored."""
        return self._counted(labels), ()

    def _counted(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[..., 1:] if self.shifted else labels).ne(kinds.IGNORE_INDEX).sum()


@dataclass(frozen=True)
class _Smoothed(_Custom):
    """Label smoothing, which is a mean over labels and so over samples."""

    separable = True

    def __call__(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return self.function(_outputs(logits), labels, shift_labels=self.shifted)


def _outputs(logits: Any) -> Any:
    """As the model returns them."""
    return SequenceClassifierOutput(logits=logits) if isinstance(logits, torch.Tensor) else logits
