"""Watches a Hugging Face Trainer.

    tracker = attach(trainer, "run.jsonl")
    trainer.train()

The Trainer's callbacks see neither inputs nor outputs. `attach` therefore wraps `training_step` on this one trainer,
which stays what it is: accumulation, label smoothing, `compute_loss_func`, mixed precision and resuming are its own.
The loss is what the trainer's own `compute_loss` makes of the batch, run once more on a copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack

import torch

from lnp.losses import kinds
from lnp.tracking.tracker import Tracker
from lnp.typed_options import TrackerOptions
from lnp_torch.group import needs_all
from lnp_torch.host_steps import HostStep, check_same
from lnp_torch.update_batches import HandedOut

try:
    from accelerate.utils import convert_to_fp32
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "lnp_torch.transformers needs Hugging Face Transformers. Run: pip install 'lnp[transformers]'"
    ) from error

LABELS, ZERO_3 = "labels", 3
"""The latter is the stage from which DeepSpeed shards parameters."""
APART = frozenset(
    {
        *("train_dataset", "eval_dataset", "optimizer", "lr_scheduler", "callback_handler", "data_collator"),
        *("processing_class", "tokenizer", "training_step", "_train_batch_size", "hp_search_backend"),
        "get_batch_samples",
    }
)
"""What a trainer has that is no part of how it computes a loss."""


Log = bool | Literal["factors"]
"""What goes to the trainer's log: everything, nothing, or the three factors."""
FACTORS = ("lnp/rate", "lnp/chi_loss", "lnp/chi_net", "lnp/chi_pos", "lnp/population/chi_pos")


def attach(
    trainer: Any,
    path: Any = None,
    schedule: Any = None,
    *,
    log: Log = "factors",
    accumulated: bool = False,
    **options: Unpack[TrackerOptions],
) -> Tracker:
    """Measure the trainer's model while it trains, and return the tracker.

    Measured are the parameters before an update, on the batch that it trains on: with accumulated gradients on the
    first of its batches, as a mean over that batch's own labels, unless `accumulated` is true; with
    `group=lnp_torch.Group()` on the batches of all processes, as the mean of their means. The loss is the one that the
    trainer minimises. What fails on the way is told once, and training goes on (`on_error` of the tracker). A trainer
    that shards parameters by FSDP in version 2 is measured by all of its processes; one that does so in another way
    (FSDP in version 1, ZeRO-3), of which the tracker warns here, is left as it is.

    Parameters
    ----------
    path, schedule, options:
        Of `lnp.Tracker`; or a Tracker in the place of the path. `loss=` replaces the trainer's.
    accumulated:
        Measure all batches whose gradients an update adds up, one after the other, as the mean over all their labels
        (`batches=` of `lnp.decompose`), in the place of the first one. In this process.
    log:
        What goes to `trainer.log` as well, and with it to everything that the trainer reports to, the console too: the
        rate, its factors and the population's position; True for every value of the row, False for nothing.

    Raises
    ------
    TypeError
        If a tracker and options of another one are given.
    ValueError
        For another `log`, and if a tracker is attached already; with `on_error="raise"` also, in every process, if the
        trainer shards parameters.
    """
    if not isinstance(log, bool) and log != "factors":
        raise ValueError(f"log is {log!r}. Expected True for every value, 'factors' for the factors, or False.")
    if isinstance(path, Tracker) and (schedule is not None or options):
        raise TypeError(
            "attach() received a tracker, and options beside it. Expected one of the two: give the options to the "
            "tracker."
        )
    if isinstance(vars(trainer).get("training_step"), _Watched):
        raise ValueError("This trainer has a tracker already. Expected one: call detach(trainer) first.")
    tracker = path if isinstance(path, Tracker) else Tracker(path, schedule, **options)
    reason = _refusal(trainer)
    if reason is None:
        own = vars(trainer).get("get_batch_samples")
        handed = HandedOut(trainer.get_batch_samples, own) if accumulated else None
        trainer.training_step = _Watched(
            trainer, tracker, log, trainer.training_step, vars(trainer).get("training_step"), handed
        )
        if handed is not None:
            trainer.get_batch_samples = handed
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
    if watched.handed is not None and vars(trainer).get("get_batch_samples") is watched.handed:
        _put_back(trainer, "get_batch_samples", watched.handed.before)
    _put_back(trainer, "training_step", watched.before)


def _put_back(trainer: Any, name: str, before: Callable | None) -> None:
    """What the trainer itself had under a name, or its class's."""
    if before is None:
        delattr(trainer, name)
    else:
        setattr(trainer, name, before)


@dataclass(eq=False)
class _Watched:
    """A trainer's training step, with a measurement before it where one is due.

    Attributes
    ----------
    original:
        The training step itself.
    before:
        What the trainer, and not its class, had under this name; None without.
    handed:
        What knows the batches of an update, where all of them are measured; else None.
    """

    trainer: Any
    tracker: Tracker
    log: Log
    original: Callable
    before: Callable | None
    handed: HandedOut | None
    checked: bool = False

    def __call__(self, model: Any, inputs: Mapping[str, Any], *rest: Any, **more: Any) -> Any:
        self._check(model)
        step, measured = self.trainer.state.global_step, None
        items = more.get("num_items_in_batch", rest[0] if rest else None)
        together = self.tracker.option("group") is not None or needs_all(model)
        takes_part = self.trainer.is_world_process_zero() or together
        if takes_part and self.tracker.due(step):
            with self.tracker.attempt(step):
                measured = self._measure(step, model, inputs, items)
        self.tracker.count(step, self.trainer.optimizer)
        loss = self.original(model, inputs, *rest, **more)
        if measured is not None:
            with self.tracker.attempt(None, f"assurance that the row of step {step} is of what the trainer minimises"):
                check_same(loss, *measured, ADVICE)
        return loss

    def _check(self, model: Any) -> None:
        """At the first step, which all processes take: the model is wrapped and sharded only then."""
        if not self.checked and (self.trainer.is_world_process_zero() or self.tracker.on_error == "raise"):
            self.tracker.check(model)
        self.checked = True

    def _measure(self, step: int, model: Any, inputs: Mapping[str, Any], items: Any) -> tuple[float] | None:
        """What `training_step` is about to do with the batch, measured; and the loss that it is expected to return."""
        trainer, tracker = self.trainer, self.tracker
        model.train()  # as it does itself, at once
        unwrapped = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        every = [inputs] if self.handed is None else self.handed.beginning_with(inputs)
        prepared: list[Any] = [trainer._prepare_inputs(dict(one)) for one in every]
        options: dict[str, Any] = {}
        given = tracker.option("loss") is not None and LABELS in prepared[0]
        if given:
            prepared = [(one, one.pop(LABELS)) for one in prepared]
        if not given and tracker.option("loss") is None and tracker.option("forward") is None:
            if self.handed is not None:
                items = partial(_items, trainer, items=items)  # of each batch, which are weighted by their labels
            elif not self._alone:
                items = _items(trainer, prepared[0], items)
            options["forward"] = HostStep(_Computed(_stand_in(trainer), trainer.accelerator, items), id(trainer))
            prepared = [{"batch": one} for one in prepared]
        elif "_original_forward" in vars(unwrapped) and tracker.option("forward") is None:
            options["forward"] = _Forward(trainer.accelerator)
        options |= {} if self.handed is None else {"batches": len(prepared)}
        tracker.tags.setdefault("parameters", sum(p.numel() for p in unwrapped.parameters() if p.requires_grad))
        with trainer.compute_loss_context_manager():
            batch = prepared[0] if self.handed is None else prepared
            measured = tracker.observe(step, unwrapped, batch, options=options)
        if measured is None:
            return None
        if self.log and trainer.is_world_process_zero():
            with tracker.attempt(None, f"the values of step {step} in the trainer's log"):
                wanted = tracker.latest if self.log is True else FACTORS
                trainer.log({name: tracker.latest[name] for name in wanted if name in tracker.latest})
        # a tracker's own batch is another one, and its own loss may be
        return (measured.loss,) if "forward" in options and self._alone else None

    @property
    def _alone(self) -> bool:
        """Whether a batch is all of its update: not one of several, in several processes or on several devices."""
        arguments = self.trainer.args
        return arguments.gradient_accumulation_steps == arguments.world_size == 1 and arguments.n_gpu <= 1


ADVICE = "Pass loss=, a function (outputs, labels) -> scalar, to say what the trainer's training_step makes of a batch."


def _fsdp_version(trainer: Any) -> int:
    return getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "fsdp_version", 1)


def _refusal(trainer: Any) -> str | None:
    """Why the trainer's model cannot be measured, as far as the trainer says so itself."""
    sharded = None
    if trainer.is_fsdp_enabled and _fsdp_version(trainer) != 2:
        sharded = "FSDP in version 1"
    elif trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == ZERO_3:
        sharded = "DeepSpeed's ZeRO-3"
    if sharded is None:
        return None
    return (
        f"This trainer shards the parameters over its processes ({sharded}), and a measurement needs them whole. "
        "Expected whole parameters in each process, or FSDP in version 2. Set fsdp_version: 2 in fsdp_config, train "
        "with data parallelism or ZeRO up to stage 2, or measure a checkpoint with lnp.decompose in its own process."
    )


@dataclass(frozen=True)
class _Forward:
    """The model in its mixed precision, without the copy of its logits in float32 from which no gradient flows."""

    accelerator: Any

    def __call__(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        with self.accelerator.autocast():
            return model._original_forward(**inputs)


@dataclass(frozen=True)
class _Computed:
    """The trainer's own `compute_loss`.

    Attributes
    ----------
    trainer:
        A stand-in for it.
    accelerator:
        Its accelerator.
    items:
        `num_items_in_batch`, or what counts them in a batch.
    """

    trainer: Any
    accelerator: Any
    items: Any

    def __call__(self, model: Any, batch: dict[str, Any], outputs: list[Any], own: bool) -> torch.Tensor:
        if own:  # the mean over its own labels
            batch = self.trainer._prepare_inputs(dict(batch))
        original = vars(model).get("_original_forward")
        if original is not None:  # the model in its mixed precision, with its outputs as the model's own loss has them

            def forward(*args: Any, **kwargs: Any) -> Any:
                with self.accelerator.autocast():
                    outputs.append(original(*args, **kwargs))
                return convert_to_fp32(outputs[-1])

            model.forward = forward
        items = self.items(batch) if callable(self.items) else self.items
        more = {} if items is None or own else {"num_items_in_batch": items}
        return self.trainer.compute_loss(model, batch, **more)


def _stand_in(trainer: Any) -> Any:
    """The trainer, as far as it computes losses, alone in its process and with one device."""
    made = object.__new__(type(trainer))
    vars(made).update({name: value for name, value in vars(trainer).items() if name not in APART})
    made.args, made.state = copy.copy(trainer.args), copy.copy(trainer.state)
    made.args._n_gpu, made.args.average_tokens_across_devices, made.state.log_history = 1, False, []
    return made


def _items(trainer: Any, batch: Mapping[str, Any], items: Any) -> Any:
    """`num_items_in_batch` of one batch alone, as the trainer counts them, where it counts them."""
    if items is None:
        return None
    count: Callable | None = getattr(Trainer, "_get_num_items_in_batch", None)
    if count is not None:
        return count(_stand_in(trainer), [batch], trainer.args.device)
    return batch[LABELS].ne(kinds.IGNORE_INDEX).sum()
