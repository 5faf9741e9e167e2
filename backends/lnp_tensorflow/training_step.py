"""A training step's loss and gradients as the user's own code computes them, and the decomposition of its batch."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import lnp
from lnp.contract.trees import map_leaves
from lnp.contract.validation import unpack
from lnp.parameter_texts import parameters_of
from lnp_tensorflow import losses
from lnp_tensorflow.model import accepts, called, first_names, is_module, named, separate
from lnp_tensorflow.outputs import parts, rebuild, wide
from lnp_tensorflow.replay import in_xla


@parameters_of(lnp.decompose, without=("batches", "group"))
def value_and_grad(
    model: Any, batch: Any, loss: Any = None, **options: Any
) -> tuple[tuple[Any, lnp.Decomposition], Any]:
    """((loss, decomposition), gradients): a training step's loss and gradients, and what was measured before it.

    Loss and gradients are bit for bit those of the plain step,

        with tf.GradientTape() as tape:
            value = loss(model(inputs), targets)
        gradients = tape.gradient(value, model.trainable_variables)

    and what that writes to, such as the statistics of a batch normalisation or the state of a generator, it writes
    once. The measurement is made first, at the parameters before the update, and leaves nothing behind.

    Parameters
    ----------
    model, batch, loss, options:
        As for `lnp.decompose`. Whatever the options say of the measurement (`microbatch=`), the step is one
        pass over the whole batch.

    Returns
    -------
    loss:
        What the loss returned: a tensor.
    decomposition:
        A `lnp.Decomposition`.
    gradients:
        What `tape.gradient` returns, with None for what the loss does not depend on. For a module a list in the order
        of `model.trainable_variables`, for `optimizer.apply_gradients`; with `parameters=`, of those that were picked.
        For (function, parameters) a structure like the parameters', with None at integers.

    Raises
    ------
    TypeError, ValueError
        For a model, batch, loss or option that cannot be used, before the step has begun. ValueError inside a function
        that XLA compiles, which would fuse the step's operations with those of the measurement.

    Examples
    --------
    >>> import tensorflow as tf
    >>> class Line(tf.Module):
    ...     def __init__(self):
    ...         self.w = tf.Variable(tf.zeros((2, 1)))
    ...     def __call__(self, x):
    ...         return x @ self.w
    >>> model = Line()
    >>> (loss, d), gradients = value_and_grad(model, (tf.eye(2), tf.ones((2, 1))))
    >>> float(loss), d.chi_pos, gradients[0].numpy().ravel().tolist()
    (1.0, 0.5, [-1.0, -1.0])
    """
    if not accepts(model):
        raise TypeError(
            f"The model is a {type(model).__name__}. Expected a tf.Module or (function, parameters). For a Keras model "
            "call lnp_keras.value_and_grad."
        )
    refuse_xla()
    from lnp_tensorflow.backend import decompose

    d = decompose(model, batch, loss, **options)
    inputs, targets = unpack(batch)
    sources, run, arrange = _step(model, options)
    with tf.GradientTape() as tape:
        tape.watch(sources)
        value = _value(loss, run(inputs), targets)
    return (value, d), arrange(tape.gradient(value, sources))


def refuse_xla() -> None:
    """Raise ValueError where XLA compiles what is traced."""
    if in_xla():
        raise ValueError(
            "value_and_grad was called inside a function that XLA compiles, where the step would be fused with the "
            "measurement, and its rounding would be another one. Expected a tf.function without jit_compile, or eager "
            "code. Call it there, and the compiled function for what follows."
        )


def _step(model: Any, options: dict[str, Any]) -> tuple[list, Any, Any]:
    """(what the step differentiates by, inputs -> outputs, gradients -> the structure that the user gets)."""
    forward, picked = options.get("forward"), options.get("parameters")
    structure, _, arrays = separate(model, forward, picked)
    if is_module(model):
        sources = _listed(model) if picked is None else []
        sources = sources or _picked(model, structure.sources(arrays))
        return sources, lambda inputs: (forward or called)(model, inputs), lambda gradients: gradients
    function, tree = model
    given = named(tree)
    names = list(structure.sources(arrays))

    def run(inputs: Any) -> Any:
        return function(inputs) if structure.kind == "variables" else function(tree, inputs)

    def arrange(gradients: list) -> Any:
        found, each = dict(zip(names, gradients, strict=True)), iter(first_names(given).values())
        return map_leaves(lambda _: found.get(next(each)), tree)

    return [given[name] for name in names], run, arrange


def _listed(model: Any) -> list[tf.Variable]:
    """What a module says that it trains; nothing from a loaded one, which does not say."""
    return list(getattr(model, "trainable_variables", ()))


def _picked(model: Any, sources: dict[str, tf.Variable]) -> list[tf.Variable]:
    """First those that the module trains, in its order."""
    chosen = {v.ref(): v for v in sources.values()}
    first = [v for v in _listed(model) if v.ref() in chosen]
    known = {v.ref() for v in first}
    return [*first, *(v for ref, v in chosen.items() if ref not in known)]


def _value(loss: Any, outputs: Any, targets: Any) -> Any:
    """The user's loss as it is; one of lnp's own in float32 or better."""
    if callable(loss):
        ordered = losses.in_order(loss)
        return loss(outputs, targets) if ordered is loss else ordered.value(outputs, targets)
    targets = map_leaves(tf.convert_to_tensor, targets)
    made = rebuild(outputs, [tf.cast(part, wide([part])) for part in parts(outputs)])
    return losses.prepare(loss, made, targets, None).function(made, targets)
