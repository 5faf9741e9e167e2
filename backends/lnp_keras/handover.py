"""What another framework's backend gets: the model as a function of its variables, batches, and a loss of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras

from lnp.contract.options import Options
from lnp_keras import replay
from lnp_keras.compiled import (
    ADDED_ALONE,
    OWN_STEP,
    CompiledLoss,
    WholeLoss,
    build,
    compiled_loss,
    is_compute_loss,
    is_ready,
    only_output,
    overrides,
    own_step,
)
from lnp_keras.losses import HELD, KerasLoss, OwnLoss, adapted, bare
from lnp_keras.model import (
    Snapshot,
    Stateless,
    as_tensors,
    fitted,
    kept,
    named_variables,
    observed,
    selected,
    stateless,
    unpack,
)
from lnp_keras.state_guard import unchanged
from lnp_keras.strategies import placed

UNCOMPILED = "the model is not compiled: its loss is inferred from the targets, and outputs are taken as logits"


@dataclass(frozen=True)
class Handed:
    """What another backend gets.

    Attributes
    ----------
    model, batches, options:
        Its arguments.
    notes:
        On how they were made.
    whole:
        The whole loss as the only output of a function, and its batches: to be compared.
    """

    model: tuple[Any, dict]
    batches: tuple
    options: Options
    notes: tuple[str, ...]
    whole: tuple[WholeLoss, tuple]

    @property
    def function(self) -> Stateless:
        """The model's."""
        return self.whole[0].function

    @property
    def alone(self) -> bool:
        """Whether the whole loss is what is measured."""
        return self.model[0] is self.whole[0]

    @property
    def adds_terms(self) -> bool:
        """Whether there are terms of the compiled loss that do not come from the outputs."""
        if self.alone or not isinstance(self.whole[0].loss, CompiledLoss):
            return False
        model: Any = self.function.model()
        regularised = any(getattr(v, "regularizer", None) is not None for v in model.trainable_variables)
        return observed(self.function).adds_terms or regularised

    @property
    def reads_parameters(self) -> bool:
        """Whether the loss may depend on what is trained in another way than through the outputs."""
        model: Any = self.function.model()
        trained = {id(variable) for variable in model.trainable_variables}
        loss = self.whole[0].loss
        return not self.alone and loss is not None and any(id(variable) in trained for variable in loss.variables)


def handed_over(model: Any, batches: tuple, options: Options) -> Handed:
    """What the backend of the framework gets for a model, batches and options of `lnp.decompose`."""
    before = model.values if isinstance(model, Snapshot) else None
    model = model if before is None else model.model
    parts = [placed(unpack(batch)) for batch in batches]
    loss, notes = _loss(model, options.loss, parts)
    known = isinstance(loss, CompiledLoss | KerasLoss | OwnLoss)
    function = replace(stateless(model, options.forward), masks=known)
    values = before or {name: variable.value for name, variable in named_variables(model).items()}
    inputs = [as_tensors(x) for x, _, _ in parts]
    frozen: list = [[] for _ in parts]
    if options.batch_statistics == "frozen" and replay.normalisations(function):
        function, frozen, more = replay.frozen(function, values, inputs)
        notes = (*notes, *more)
    function = kept(function)
    held = _held_values(loss, model, values) if known and keras.backend.backend() == "jax" else []
    given = tuple(
        ({"inputs": x, "statistics": statistics}, _targets(loss, held, x, y, weight))
        for x, statistics, (_, y, weight) in zip(inputs, frozen, parts, strict=True)
    )
    if isinstance(loss, CompiledLoss):
        _build(function, values, given[0])
    whole = WholeLoss(function, loss if known else None)
    of_whole = tuple(({**batch, "targets": targets}, keras.ops.zeros((1, 1))) for batch, targets in given)
    names = selected(model, options.parameters)
    notes = (*notes, *(fitted(model)[1] if options.parameters is None else ()))
    options = replace(options, loss=loss, forward=None, parameters=names)
    if keras.backend.backend() == "jax":  # which statistics are held is settled, as it is on other frameworks
        options = replace(options, batch_statistics="coupled")
    handed = Handed((function, values), given, options, notes, (whole, of_whole))
    if isinstance(loss, CompiledLoss) and model._compile_loss is None and not overrides(model, "compute_loss"):
        return replace(
            handed,
            model=(whole, values),
            batches=of_whole,
            options=of_only_output(options),
            notes=(*notes, ADDED_ALONE),
        )
    return handed


def of_only_output(options: Options) -> Options:
    """The options for a model whose only output is its loss."""
    return replace(options, loss=only_output, loss_terms=1, microbatch=None, split=False, population=False)


def _held_values(loss: Any, model: Any, values: Mapping[str, Any]) -> list:
    """The values of variables that a loss reads, of a snapshot's where they are the model's."""
    own = {id(variable): values[name] for name, variable in named_variables(model).items()}
    return [own.get(id(variable), variable.value) for variable in loss.variables]


def _build(function: Stateless, values: dict, batch: tuple) -> None:
    model: Any = function.model()
    if not (overrides(model, "compute_loss") or is_ready(model)):
        with unchanged(model):
            build(model, bare(function(values, batch[0])), batch[1]["targets"], batch[1]["sample_weight"])


def _loss(model: Any, loss: Any, parts: list) -> tuple[Any, tuple[str, ...]]:
    """The loss for the other backend, and notes."""
    weights = any(weight is not None for _, _, weight in parts)
    if is_compute_loss(loss, model):
        return compiled_loss(model), ()
    if loss is not None:
        loss = adapted(loss)
        if weights and not isinstance(loss, KerasLoss):
            raise ValueError(
                "Sample weights were given with a loss that does not take them. Expected the model's compiled loss "
                "(loss=None) or one of Keras's. Multiply by the weights in the loss itself."
            )
        return loss, ()
    if not getattr(model, "compiled", False):
        if weights:
            raise ValueError(
                "Sample weights were given, but the model is not compiled. Expected model.compile(loss=...) before. "
                "Compile it, or pass loss=."
            )
        return None, (UNCOMPILED,)
    if name := own_step(model):
        raise ValueError(OWN_STEP.format(name=name))
    return compiled_loss(model), ()


def _targets(loss: Any, held: list, inputs: Any, targets: Any, weight: Any) -> Any:
    targets = as_tensors(targets)
    if isinstance(loss, CompiledLoss):
        targets = {"inputs": inputs, "targets": targets, "sample_weight": as_tensors(weight)}
    elif weight is not None or held:
        targets = {"targets": targets, "sample_weight": as_tensors(weight)}
    return {**targets, HELD: held} if held else targets
