"""What users call: decompose a model's batch, respond across batches, and the loss change of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lnp.arguments import Batch, Forward, Group, Loss, Model, Parameters, Seed, Update
from lnp.contract.options import BatchStatistics, Options
from lnp.contract.registry import evaluate
from lnp.estimators.trace import Estimator, takes_samples_apart
from lnp.parameter_texts import parameters_of
from lnp.results.computations import Decompose, Respond, measured_change, predicted_change
from lnp.results.cross_response import CrossResponse, finished
from lnp.results.decomposition import ByLayer, Decomposition
from lnp.results.finished import explained
from lnp.results.in_group import AUTO, DecomposeTogether, decompose_together, group_of
from lnp.results.merged import DecomposePart
from lnp.results.preconditioner import DecomposePreconditioned, joint_options
from lnp.results.streamed import decompose_stream
from lnp.results.two_losses import respond_to


def decompose(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    forward: Forward = None,
    parameters: Parameters = None,
    by_layer: ByLayer = False,
    population: bool | None = None,
    estimator: Estimator = "auto",
    rtol: float = 0.01,
    max_probes: int = 64,
    seed: Seed = 0,
    loss_terms: int | None = None,
    microbatch: int | None = None,
    batches: float | None = None,
    batch_statistics: BatchStatistics = "frozen",
    preconditioner: Update = None,
    sample_losses: bool = False,
    group: Group = AUTO,
) -> Decomposition:
    r"""Split the speed at which the loss falls into loss scale, network scale and spectral position.

        rate = -dL/dt = ||J^T g||^2 = chi_loss * chi_net * chi_pos
        chi_loss = n ||g||^2,   chi_net = tr(Theta) / n,   chi_pos = g^T Theta g / (||g||^2 tr Theta)

    Nothing the caller has is changed: parameters, gradients, buffers, modes, random state.

    Parameters
    ----------
    model:
        torch.nn.Module, tf.Module, Keras model, Flax NNX or Equinox module, bound Flax Linen module, a model of
        `lnp_numpy`, or `(apply, parameters)` with `apply(parameters, inputs) -> outputs`.
    batch:
        `(inputs, targets)`; inputs may be an array, tuple or dict. For a Hugging Face model a dict with labels.
        N samples along the first axis of outputs of any structure, K numbers each. With `batches`, a loader.
    loss:
        `loss(outputs, targets) -> scalar`, or a name: "cross_entropy", "mse", "binary_cross_entropy" (of logits) or
        "huber" (delta = 1). None takes the model's own (Hugging Face, compiled Keras models), else cross-entropy for
        integer targets and mean squared error for float targets of the outputs' shape; `Decomposition.loss_name` tells
        which it was, and a note if it was probably not meant. Population values need a mean over samples: a callable of
        your own is called on some of the samples to find out, once, or says so by an attribute `separable = True`.
    forward:
        `forward(model, inputs) -> outputs`, for models that are not called as `model(inputs)`.
    parameters:
        Which parameters to differentiate: a predicate on names, a glob, or a list of names. Default: every trainable
        one.
    by_layer:
        True for one entry per module in `Decomposition.layers`, or a function parameter name -> layer name.
    population:
        For `Decomposition.population`: rate, position and noise scale of the population that the batch was drawn from.
        None computes them where that is cheap (the squared norms of single samples come with the gradient) and the
        loss is a mean over samples; True also where it is not cheap, False never.
    estimator:
        How tr Theta is estimated: "exact", "per_sample", "grouped", "joint", or "auto": exact for few outputs, per
        sample otherwise, joint (or grouped, with `microbatch`) where the samples interact in the network. See
        `lnp.estimators.trace`.
    rtol:
        Relative standard error of chi_net at which the probing stops; 0 spends all of `max_probes`.
    max_probes:
        The most random probes to spend, also when `rtol` is not reached.
    seed:
        Seed of the random signs. The caller's own random state is not used up.
    loss_terms:
        n, if the loss's mean is over something that lnp cannot know.
    microbatch:
        Samples held in memory at a time, in forward passes of so many. The samples must not interact.
    batches:
        For a data set, or the accumulated batch of one update: `batch` is a loader, a list, or anything else that gives
        batches, and the first so many of them (`math.inf`: all) are measured as one, one in memory at a time. The loss
        is the mean over all their terms; a loss that couples samples couples those of one batch. Batches that differ in
        size, labels and padding count as they do in one mean. See `lnp.results.streamed`.
    batch_statistics:
        "frozen": batch normalisation in training mode keeps this batch's statistics. "coupled": they depend on the
        parameters, as in the training step itself.
    preconditioner:
        The diagonal of M for an optimizer whose update is -eta M grad L, such as Adam's 1 / (sqrt(v) + eps); in the
        form of `measured_loss_change`'s update. Rate, network scale and position are then those of J M J^T, with the
        trace estimated jointly, on the whole batch. See `lnp.results.preconditioner`.
    sample_losses:
        Also what each sample adds to the loss, in `Decomposition.sample_losses`: each sample's loss is computed by
        itself, from the outputs of the same forward pass.
    group:
        PyTorch: the processes that measure together. Each calls this line with its own part of the batch, and all get
        the decomposition of the mean of their losses, which is what data-parallel training minimises. "auto" takes
        those of DistributedDataParallel, or over which parameters are sharded, and otherwise this process alone; None
        always this process alone; else a ProcessGroup, a DeviceMesh or `lnp_torch.Group`, which also sets how long to
        wait for a process that does not come. See docs/distributed.md.

    Returns
    -------
    Decomposition
        Its numbers are floats, or arrays of shape () when called inside a compiled function.

    Raises
    ------
    TypeError, ValueError
        For a model, batch, loss or option that cannot be used. The message says what was received, what was expected
        and what to do.
    RuntimeError
        Where several processes measure and one of them does not come, fails, or is killed.

    References
    ----------
    Nikolaou, Scheunemann, Krippendorf, Tovey, Holm, "Spectral Reach", arXiv 2605.31244.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> x = numpy.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((2, 1)))
    >>> d = lnp.decompose(model, (x, numpy.ones((3, 1))))
    >>> round(d.rate, 6), round(d.chi_loss * d.chi_net * d.chi_pos, 6)
    (3.555556, 3.555556)
    """
    options = Options(
        loss=loss,
        forward=forward,
        parameters=parameters,
        seed=seed,
        loss_terms=loss_terms,
        microbatch=microbatch,
        batch_statistics=batch_statistics,
        split=takes_samples_apart(estimator, microbatch),
        population=population,
    )
    together = group_of(model, group, preconditioner, batches)
    if together is not None:
        settings = (estimator, rtol, max_probes, by_layer, population, sample_losses)
        return decompose_together(DecomposeTogether(*settings, group=together), model, batch, options)
    if batches is not None:
        if preconditioner is not None:
            raise ValueError(
                "Received both batches= and preconditioner=. Expected one of them: the preconditioned trace is "
                "estimated on whole batches. Measure one batch, or leave preconditioner= out."
            )
        streamed = DecomposePart(estimator, rtol, max_probes, by_layer, population, sample_losses)
        return decompose_stream(model, batch, batches, streamed, options)
    if preconditioner is None:
        computation = Decompose(estimator, rtol, max_probes, by_layer, population, sample_losses)
        return explained(evaluate(computation, model, (batch,), options))
    preconditioned = DecomposePreconditioned(estimator, rtol, max_probes, by_layer, population, sample_losses)
    return explained(evaluate(preconditioned, model, (batch,), joint_options(options), update=preconditioner))


@parameters_of(decompose)
def cross_response(
    model: Model,
    train_batch: Batch,
    measured_batch: Batch,
    loss: Loss = None,
    *,
    measured_loss: Loss = None,
    forward: Forward = None,
    parameters: Parameters = None,
    by_layer: ByLayer = False,
    population: bool | None = False,
    estimator: Estimator = "auto",
    rtol: float = 0.01,
    max_probes: int = 64,
    seed: Seed = 0,
    loss_terms: int | None = None,
    microbatch: int | None = None,
    batch_statistics: BatchStatistics = "frozen",
    sample_losses: bool = False,
) -> CrossResponse:
    r"""How fast the loss on one batch falls while gradient descent trains on another.

        -dL_m/dt = <grad L_m, grad L_t> = chi_loss * chi_net * chi_pos

    with the geometric means of the two batches' loss and network scales. The position is what is left, in [-1, 1];
    where it is negative, a step on `train_batch` raises the loss on `measured_batch`. Layers and population values are
    those of the two decompositions.

    Parameters
    ----------
    loss:
        What is trained, on `train_batch`.
    measured_loss:
        What is measured, on `measured_batch`, where it is another loss of the outputs: an auxiliary loss, say, or a
        smooth stand-in for the accuracy. Its n is found as that of any loss; `loss_terms` is that of `loss`. Not
        inside of a compiled function. None for the same loss.
    others:
        As for `decompose`.

    Raises
    ------
    TypeError, ValueError
        For a model, batch, loss or option that cannot be used, and for `measured_loss` inside of a compiled function.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((1, 1)))
    >>> up, down = (numpy.ones((1, 1)), numpy.ones((1, 1))), (numpy.ones((1, 1)), -numpy.ones((1, 1)))
    >>> round(lnp.cross_response(model, up, down).chi_pos, 6)
    -1.0
    >>> x, y = numpy.ones((1, 1)), numpy.ones((1, 1))
    >>> round(lnp.cross_response(model, (x, y), (x, 3 * y), "mse", measured_loss="huber").rate, 6)  # <-2, -1>
    2.0
    """
    options = Options(
        loss=loss,
        forward=forward,
        parameters=parameters,
        seed=seed,
        loss_terms=loss_terms,
        microbatch=microbatch,
        batch_statistics=batch_statistics,
        split=takes_samples_apart(estimator, microbatch),
        population=population,
    )
    computation = Respond(estimator, rtol, max_probes, by_layer, population, sample_losses)
    if measured_loss is None:
        return finished(evaluate(computation, model, (train_batch, measured_batch), options))
    other = replace(options, loss=measured_loss, loss_terms=None)
    return respond_to(computation, model, (train_batch, options), (measured_batch, other))


@parameters_of(decompose)
def measured_loss_change(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    learning_rate: float | None = None,
    update: Update = None,
    forward: Forward = None,
    parameters: Parameters = None,
    batch_statistics: BatchStatistics = "frozen",
) -> float:
    """L(theta + Delta) - L(theta) on the batch: the loss at moved parameters, while the model stays where it is.

    Parameters
    ----------
    learning_rate:
        For Delta = -learning_rate * grad L, a step of gradient descent.
    update:
        Delta itself: {parameter name: array} or a list in PyTorch, a pytree of the parameters' structure in JAX, a
        vector in NumPy. One of the two must be given.
    others:
        As for `decompose`.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((1, 1)))
    >>> round(lnp.measured_loss_change(model, (numpy.ones((1, 1)), numpy.ones((1, 1))), learning_rate=0.1), 6)
    -0.36
    """
    options = Options(loss, forward, parameters, batch_statistics=batch_statistics, split=False)
    return _loss_change(measured_change, model, batch, options, learning_rate, update)


@parameters_of(measured_loss_change)
def predicted_loss_change(
    model: Model,
    batch: Batch,
    loss: Loss = None,
    *,
    learning_rate: float | None = None,
    update: Update = None,
    forward: Forward = None,
    parameters: Parameters = None,
    batch_statistics: BatchStatistics = "frozen",
) -> float:
    """<grad L, Delta>, the loss change of a step to first order.

    Parameters
    ----------
    others:
        As for `measured_loss_change`.

    Examples
    --------
    >>> import numpy, lnp, lnp_numpy
    >>> model = lnp_numpy.LinearModel(weight=numpy.zeros((1, 1)))
    >>> round(lnp.predicted_loss_change(model, (numpy.ones((1, 1)), numpy.ones((1, 1))), learning_rate=0.1), 6)
    -0.4
    """
    options = Options(loss, forward, parameters, batch_statistics=batch_statistics, split=False)
    return _loss_change(predicted_change, model, batch, options, learning_rate, update)


def _loss_change(
    computation: Callable, model: Model, batch: Batch, options: Options, learning_rate: float | None, update: Update
) -> float:
    """The loss change of a step of gradient descent, or of an update that is given."""
    if (learning_rate is None) == (update is None):
        given = "neither" if update is None else "both"
        raise ValueError(f"Received {given} of learning_rate= and update=. Expected one: the step that is taken.")
    if isinstance(learning_rate, bool | str) or callable(learning_rate) or hasattr(learning_rate, "param_groups"):
        raise TypeError(f"learning_rate is {learning_rate!r}. Expected the number that the gradient is multiplied by.")
    operands = {"learning_rate": learning_rate} if update is None else {"update": update}
    return evaluate(computation, model, (batch,), options, **operands)
