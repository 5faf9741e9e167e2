"""Measuring on a training step's own forward and backward pass, so that a measurement costs only its probes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import lnp
from lnp.contract.linearization import GradientPass, Linearization
from lnp.contract.options import Options
from lnp.results.decomposition import ByLayer, asked, decomposed
from lnp.results.finished import explained
from lnp.state.preserve import SavedState
from lnp_torch import losses
from lnp_torch.backend import decided, to_host
from lnp_torch.collectives import with_others
from lnp_torch.graph import edge, reached
from lnp_torch.look import CannotRun
from lnp_torch.loss_gradient import LossAt
from lnp_torch.model import program
from lnp_torch.model_parts import HOSTS, unwrapped
from lnp_torch.outputs import Outputs, flatten
from lnp_torch.own_loss import shown_mean
from lnp_torch.record import Operators, graph_gradients, linearization
from lnp_torch.refusals import refuse_compiled, refuse_graph, refuse_hooks
from lnp_torch.signs import signs_of
from lnp_torch.state_guard import finished, no_gradients, undisturbed
from lnp_torch.step_loss import StepCriterion, loss_gradient, step_outputs, step_sample_terms, step_told
from lnp_torch.taken_apart import plan_and_look, tolerance_of
from lnp_torch.taps.backward_pass import Samples, Tapped
from lnp_torch.taps.reader import Reading
from lnp_torch.watched_pass import WatchedPass, call_with

OTHERS_THAN_TORCH = HOSTS - {"torch"}
CONSTANT = "what the loss asks of outputs that need no gradient is not seen: chi_loss leaves it out"


def shared(model: nn.Module, parameters: Any = None) -> SharedStep:
    """Watch the forward pass of a training step; `backward` then runs its backward pass and decomposes it.

    The parameters' `.grad` receives exactly what `loss.backward()` would give: nothing is computed differently, and the
    measured gradient is the one that training gets. Not shared is what belongs to the measurement alone: one data-only
    backward pass for each probe. Batch normalisation in training mode and dropout inside fused attention stay what they
    are in the step, so that the samples interact: it is measured jointly, with a note. What is returned can be used
    again for the next step.

    Parameters
    ----------
    model:
        The module that the step calls once inside the context; wrapped in `DataParallel` or compiled, what it wraps is
        watched.
    parameters:
        Which parameters to differentiate, as for `lnp.decompose`.

    Raises
    ------
    ValueError
        For sharded and compiled models: what a compiler has made of them can be run backward once.
    RuntimeError
        By `backward`, before it does anything: if the model was not called exactly once inside the context, for
        reentrant checkpoints, and where the forward pass called something compiled.

    Examples
    --------
    >>> import torch, lnp_torch
    >>> model = torch.nn.Linear(4, 3)
    >>> inputs, targets = torch.randn(8, 4), torch.arange(8) % 3
    >>> criterion = torch.nn.CrossEntropyLoss()
    >>> with lnp_torch.shared(model) as step:
    ...     loss = criterion(model(inputs), targets)
    >>> d = step.backward(loss, targets, criterion)  # instead of loss.backward()
    >>> rate = sum(float(p.grad.square().sum()) for p in model.parameters())
    >>> round(d.rate / rate, 4), round(d.chi_loss * d.chi_net * d.chi_pos / rate, 4)
    (1.0, 1.0)
    """
    return SharedStep(model, parameters)


class SharedStep(contextlib.AbstractContextManager):
    """A training step whose forward pass is watched; made by `shared`.

    Attributes
    ----------
    seconds:
        What the step's own last backward pass took, until it returned: the rest of `backward` is the measurement.
    stepped:
        Whether the step's own backward pass has been run: as long as it has not, nothing has happened, and
        `loss.backward()` gives the parameters the same gradients.
    """

    seconds = 0.0
    stepped = False

    def __init__(self, model: nn.Module, parameters: Any = None) -> None:
        self._module, self._selected = unwrapped(model), parameters
        refuse_compiled(model)
        prepared = program(self._module, call_with, parameters)
        prepared.replica.clear()
        own = dict(self._module.named_parameters())
        self._own, self._device = {name: own[name] for name in prepared.parameters}, prepared.device
        self._watched = WatchedPass(self._module, self._own, self._selected)

    def __enter__(self) -> SharedStep:
        self._watched = WatchedPass(self._module, self._own, self._selected)
        self._watched.__enter__()
        self.seconds, self.stepped = 0.0, False
        return self

    def __exit__(self, *exception: Any) -> None:
        self._watched.__exit__(*exception)

    def backward(
        self,
        loss: torch.Tensor,
        targets: Any = None,
        criterion: str | Callable | None = None,
        *,
        scale: float | torch.Tensor = 1.0,
        loss_terms: int | None = None,
        estimator: str = "auto",
        rtol: float = 0.01,
        max_probes: int = 64,
        by_layer: ByLayer = False,
        population: bool | None = None,
        seed: int = 0,
    ) -> lnp.Decomposition:
        """`loss.backward()`, and the decomposition of the batch.

        Parameters
        ----------
        loss:
            Computed from the model's outputs. Terms that do not come from the outputs (weight decay) are trained on,
            and left out of the decomposition with a note.
        targets, criterion:
            What the loss was computed with: they say how many terms its mean averages. Without them `loss_terms` does,
            or, where the model has computed its own loss from labels, those.
        scale:
            What the loss was multiplied with (a gradient scaler's `get_scale()`); the loss without it is decomposed.

        Other parameters as for `lnp.decompose`.
        """
        self._check(loss)
        options = Options(
            loss=criterion,
            seed=seed,
            loss_terms=loss_terms,
            split=estimator in ("auto", "exact", "per_sample"),
            population=population,
        )
        settings: dict[str, Any] = {
            "estimator": estimator,
            "rtol": rtol,
            "max_probes": max_probes,
            "population": population,
        }
        try:
            with self._measuring(criterion):
                step = self._before(loss, targets, scale, options)
                wish = asked(step.record(), **settings)
            trained = self._backward(loss, step.operators, scale, **wish)
            with self._measuring(criterion), no_gradients(dict(self._module.named_parameters())):
                return explained(_decomposed(step, trained, by_layer=by_layer, **settings), unscaled=not step.others)
        finally:
            if self.stepped:  # a loop keeps this object until its next step: the activations must not stay with it
                self._watched.let_go()
                self._watched = WatchedPass(self._module, self._own, self._selected)

    def _check(self, loss: Any) -> None:
        """Raise an error for a pass that cannot be shared, before anything has happened."""
        if self._watched.calls != 1:
            raise RuntimeError(
                f"The model was called {self._watched.calls} times inside lnp_torch.shared(model) since the last "
                "backward(). Expected one call. Compute the loss of one batch inside `with lnp_torch.shared(model) as "
                "step:`."
            )
        if self._watched.failure is not None:
            raise self._watched.failure
        refuse_hooks(self._module, self._watched.draws.hooked)
        refuse_graph(loss)

    @contextlib.contextmanager
    def _measuring(self, criterion: Any) -> Iterator[None]:
        """Around what is the measurement's alone. A backward pass may run code of the user's, as a checkpoint does that
        computes its activations again: each probe would write to the model what the step's own pass writes once.
        """
        assert self._watched.prepared is not None, "the forward pass has made it"
        left = self._watched.prepared.replica.as_now(), SavedState((self._module, criterion), OTHERS_THAN_TORCH)
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._module.buffers()]
        try:
            with undisturbed([self._device]), self._watched.autocast():
                yield
        finally:
            for saved in left:
                finished(saved.restore)
            for buffer, value in buffers:  # all of them: no version tells of what batch normalisation writes
                buffer.data.copy_(value)

    def _before(self, loss: torch.Tensor, targets: Any, scale: Any, options: Options) -> Step:
        """What is known of a step before its own backward pass."""
        watched, outputs = self._watched, step_outputs(loss, self._watched.returned)
        criterion = None if targets is None else StepCriterion(outputs, targets, options, watched.after)
        parts = outputs.parts
        flat = flatten([part.detach() for part in parts])
        g = loss_gradient(loss, outputs, scale, criterion)
        one, passes = [Tapped(slice(0, len(flat)), parts, watched.taps)], watched.passes(outputs)
        samples = Samples(passes, lambda: one, flat, apart=False)
        gradients = graph_gradients(parts, self._own)
        with no_gradients(dict(self._module.named_parameters())):
            plan, look, why = plan_and_look(samples, gradients, parts, g, options)
        terms, notes = self._terms(loss, outputs, criterion, options)
        _, others = reached([edge(loss)], {edge(leaf) for leaf in outputs.leaves})
        differs = "" if criterion is None or others else criterion.difference(loss.detach() / scale)
        separable = False
        if plan is not None and options.population is not False and not differs:
            if criterion is not None:
                separable = criterion.is_mean()
            elif outputs.own_loss is not None:
                separable = shown_mean(passes, g, terms, tolerance_of(passes.program, parts), options.seed)
        constant = not all(part.requires_grad for part in parts)
        said = [note for note, true in ((losses.OTHERS, others), (CONSTANT, constant), (differs, differs)) if true]
        weights = step_sample_terms(watched.averages, loss, outputs, criterion)
        told, value = step_told(criterion, g), loss.detach() / scale
        meant = LossAt(value, g, terms, lambda other: loss, separable, (), notes, weights, told=told)
        operators = Operators(samples, plan, look, gradients, g, options, signs_of(options.seed, flat, parts))
        return Step(operators, meant, others, (*why, *said))

    def _backward(
        self, loss: torch.Tensor, operators: Operators, scale: Any, per_sample: bool, products: int, vector: bool
    ) -> GradientPass:
        """The step's own backward pass, with what it yields of the gradient and of single samples."""
        plan, index = operators.plan, None
        if per_sample and plan is not None:
            index = operators.signs.drawn(products) if products and not plan.general else None
            reading = plan.reading(gradient_norms=True, index=index)
        else:
            reading = Reading(frozenset(self._own), gradient_norms=True)
        with self._watched.taps.read(reading, len(operators.loss_gradient)) as pulled:
            started = time.perf_counter()
            self.stepped = True
            with with_others():
                loss.backward(retain_graph=True)
            self.seconds = time.perf_counter() - started
        found = pulled(loss.device)
        found = found if isinstance(scale, float | int) and scale == 1 else found.divided(scale)
        if found.missing:  # parameters that take the general way, which adds to squared norms and products
            return GradientPass(found.gradient_norms)
        return GradientPass(found.gradient_norms, found.square_norms, found.products, index)

    def _terms(
        self, loss: torch.Tensor, outputs: Outputs, criterion: StepCriterion | None, options: Options
    ) -> tuple[Any, tuple[str, ...]]:
        """(loss_terms, notes): the user's own, or what was seen of this very loss, or of the criterion."""
        if options.loss_terms is not None:
            return options.loss_terms, ()
        if criterion is not None and hasattr(options.loss, "loss_terms"):
            return criterion.terms()
        seen = self._watched.averages.terms(loss, outputs.leaves)
        if seen is not None:
            return seen
        if criterion is None:
            raise ValueError(
                "backward() received neither targets nor loss_terms, and the loss was not seen to average anything "
                "inside the context. Expected what the loss was computed with, to know how many terms its mean "
                "averages. Compute it inside the context, or call backward(loss, targets, criterion)."
            )
        return criterion.terms()


@dataclass(frozen=True)
class Step:
    """A training step before its own backward pass.

    Attributes
    ----------
    operators, loss:
        As of a measurement with passes of its own.
    others:
        Whether the loss has terms that do not come from the outputs.
    notes:
        On the samples and the loss.
    """

    operators: Operators
    loss: LossAt
    others: bool
    notes: tuple[str, ...]

    def record(self, trained: GradientPass | None = None) -> Linearization:
        """For the core; with what the step's own backward pass has yielded.

        With other terms the step's gradient is not J^T g. Meeting gradients would pull into the user's `.grad`.
        """
        taps = next(iter(self.operators.samples.visit())).taps
        yielded = None if trained is None or self.others else lambda *wish: trained
        made = replace(linearization(self.operators, self.loss, taps), loss_along=None, gradient_pass=yielded)
        return replace(made, group_square_norms=None, notes=(*made.notes, *self.notes))

    def jointly(self, reason: str) -> Step:
        """The same with samples that are not taken apart."""
        return replace(self, operators=replace(self.operators, plan=None, look=None), notes=(reason, *self.notes))


def _decomposed(step: Step, trained: GradientPass, **settings: Any) -> lnp.Decomposition:
    """The decomposition; once more, jointly, if the samples turn out to interact."""
    look = step.operators.look
    try:
        found, _ = decided(decomposed(step.record(trained), **settings)[0], [look], [])
    except CannotRun:
        assert look is not None, "which has raised it"
    if look is None or not look.reason:
        return found
    look.remember()
    joint = GradientPass(trained.square_norms)
    return to_host(decomposed(step.jointly(look.reason).record(joint), **settings)[0], [])[0]
