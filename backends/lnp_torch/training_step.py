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
from lnp.contract.options import Options
from lnp.results.decomposition import ByLayer, decompose, explained
from lnp.state.preserve import SavedState
from lnp_torch import fallback, losses
from lnp_torch.backend import to_host
from lnp_torch.collectives import with_others
from lnp_torch.draws import Watched
from lnp_torch.huggingface import own_loss_terms
from lnp_torch.loss_gradient import loss_gradient, separate_outputs
from lnp_torch.losses import OTHERS, other_terms
from lnp_torch.model import Program, program
from lnp_torch.outputs import Outputs, flatten, read
from lnp_torch.pulls import Pulls
from lnp_torch.record import Loss, assembled, repeated, taken_apart
from lnp_torch.refusals import refuse_compiled, refuse_graph, refuse_hooks
from lnp_torch.replay import Passes, copied
from lnp_torch.replica import HOSTS, Replica, unwrapped
from lnp_torch.separable import found_separable
from lnp_torch.state_guard import RandomState, finished, no_gradients, undisturbed
from lnp_torch.taps.backward_pass import Apart, Pullback, Tapped
from lnp_torch.taps.function_mode import Taps

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
        What the last backward pass of the step itself took, until it returned: the rest of `backward` is the
        measurement.
    stepped:
        Whether the step's own backward pass has been run: as long as it has not, nothing has happened, and
        `loss.backward()` gives the parameters the same gradients.
    """

    seconds = 0.0

    def __init__(self, model: nn.Module, parameters: Any = None) -> None:
        self._module, self._selected = unwrapped(model), parameters
        refuse_compiled(model)
        prepared = program(self._module, _call, parameters)
        prepared.replica.clear()
        own = dict(self._module.named_parameters())
        self._own, self._device = {name: own[name] for name in prepared.parameters}, prepared.device
        self._stack = contextlib.ExitStack()
        self._forget()

    def _forget(self) -> None:
        self._taps, self._draws = Taps(self._own), Watched(self._device, self._module.parameters())
        self._taps.watching = False
        self._given: Any = None
        self._returned: Any = None
        self._prepared: Program | None = None
        self._failure: Exception | None = None
        self._calls, self.stepped = 0, False

    def __enter__(self) -> SharedStep:
        self._forget()
        self.seconds = 0.0
        with contextlib.ExitStack() as stack:  # which takes everything away again if one of these fails
            stack.callback(self._module.register_forward_pre_hook(self._called, with_kwargs=True).remove)
            stack.callback(self._module.register_forward_hook(self._answered).remove)
            stack.enter_context(self._taps)
            stack.enter_context(self._draws)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._calls, self._taps.watching = self._calls + 1, True
        self._before = RandomState([self._device])
        device = self._device.type
        on = torch.is_autocast_enabled(device)
        self._autocast = torch.autocast(device, torch.get_autocast_dtype(device), enabled=on)
        try:  # of the model as it is before the step's own pass; a failure is told by `backward`: the pass goes on
            self._given = copied((args, kwargs))
            self._prepared = program(self._module, _call, self._selected)
        except Exception as error:
            self._failure = error

    def _answered(self, module: nn.Module, args: tuple, returned: Any) -> Any:
        self._taps.watching = False  # what the loss does with the parameters is not the model's
        self._after, self._explained = RandomState([self._device]), self._draws.explained and not self._draws.wrote
        try:
            returned = separate_outputs(returned)
        except Exception as error:
            self._failure = error
        self._returned = returned
        return returned

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
        if self._calls != 1:
            raise RuntimeError(
                f"The model was called {self._calls} times inside lnp_torch.shared(model) since the last backward(). "
                "Expected one call. Compute the loss of one batch inside `with lnp_torch.shared(model) as step:`."
            )
        if self._failure is not None:
            raise self._failure
        refuse_hooks(self._module, self._draws.hooked)
        refuse_graph(loss)
        options = Options(
            loss=criterion,
            seed=seed,
            loss_terms=loss_terms,
            split=estimator in ("auto", "exact", "per_sample"),
            population=population,
        )
        try:
            with self._measuring(criterion):
                seen = self._looked_at(loss, targets, scale, options)
            trained = self._backward(loss, seen, scale)
            with self._measuring(criterion), self._no_gradients():
                found = decompose(
                    self._assembled(seen, trained, options), estimator=estimator, rtol=rtol, max_probes=max_probes,
                    by_layer=by_layer, population=population,
                )  # fmt: skip
                result, _ = to_host(found, [])
        finally:
            if self.stepped:
                self._let_go()
        return explained(result)

    @contextlib.contextmanager
    def _measuring(self, criterion: Any) -> Iterator[None]:
        """Around what is the measurement's alone. The step's own backward pass runs as the user runs it, in between.

        A backward pass may run code of the user's: a function with a backward of its own, a checkpoint that computes
        its activations again. Each probe would write to the model what the step's own pass writes once.
        """
        assert self._prepared is not None, "the forward pass has made it"
        left = self._prepared.replica.as_now(), SavedState((self._module, criterion), OTHERS_THAN_TORCH)
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._module.buffers()]
        try:
            with undisturbed([self._device]), self._autocast:
                yield
        finally:
            for saved in left:
                finished(saved.restore)
            for buffer, value in buffers:  # all of them: no version tells of what batch normalisation writes
                buffer.data.copy_(value)

    def _let_go(self) -> None:
        """A loop keeps this object until its next step: the activations must not stay with it."""
        if self._prepared is not None:
            self._prepared.replica.clear()
        stepped = self.stepped
        self._forget()
        self.stepped = stepped

    def _no_gradients(self) -> contextlib.AbstractContextManager:
        return no_gradients(dict(self._module.named_parameters()))

    def _looked_at(self, loss: torch.Tensor, targets: Any, scale: Any, options: Options) -> _Seen:
        """What is known of a step before its own backward pass."""
        outputs, own = read(self._returned), list(self._own.values())
        parts = outputs.parts
        criterion = None if targets is None else lambda tree: self._criterion(outputs, targets, options)(tree, targets)
        flat = flatten([part.detach() for part in parts])
        g = loss_gradient(loss, outputs, scale, criterion)
        assert self._prepared is not None, "the forward pass has made it"
        passes = Passes(
            self._prepared, self._given, len(flat), self._draws.record, self._before, self._after, False,
            attention=False, explained=self._explained,
        )  # fmt: skip
        apart = Apart(passes, lambda: [Tapped(slice(0, flat.shape[0]), parts, self._taps)], flat)
        with self._no_gradients():
            verdict, why = taken_apart(apart, [part.dtype for part in parts], options)
        cheap = verdict is not None and not verdict.general
        terms, separable, notes = self._terms(outputs, targets, options)
        others = other_terms(loss, parts)
        said = [note for note, true in ((OTHERS, others), (CONSTANT, not all(p.requires_grad for p in parts))) if true]
        both = cheap and (separable if options.population is None else options.population)
        pulls = Pulls(apart, verdict, lambda v: fallback.gradients(parts, own, v), g, both, cheap, options.seed)
        meant = Loss(loss.detach() / scale, g, terms, lambda other: loss, separable, notes=notes)
        return _Seen(pulls, meant, others, (*why, *said))

    def _backward(self, loss: torch.Tensor, seen: _Seen, scale: Any) -> Pullback:
        """The step's own backward pass, with what it says of the gradient and of single samples."""
        with self._taps.read(seen.pulls.reading(), len(seen.pulls.loss_gradient)) as pulled:
            started = time.perf_counter()
            self.stepped = True
            with with_others():
                loss.backward(retain_graph=True)
            self.seconds = time.perf_counter() - started
        said = pulled(loss.device)
        found = Pullback(said.square_norms, said.missing, [], said.gradient_norms, said.along)
        return found if isinstance(scale, float | int) and scale == 1 else found.scaled(scale)

    def _assembled(self, seen: _Seen, trained: Pullback, options: Options) -> lnp.Linearization:
        if not seen.others:
            seen.pulls.found = trained
        made = replace(assembled(seen.pulls, seen.loss, options, self._taps), loss_along=None)
        if seen.others:  # the step's gradient is not J^T g, and another pass would pull into the user's `.grad`
            made = replace(made, gradient_square_norms=None)
        return replace(made, notes=(*made.notes, *seen.notes))

    def _terms(self, outputs: Outputs, targets: Any, options: Options) -> tuple[Any, bool, tuple[str, ...]]:
        """(loss_terms, whether the loss is a mean over samples, notes)."""
        if targets is not None:
            tree = outputs.with_parts([part.detach() for part in outputs.parts])
            meant = losses.prepare(options.loss, tree, targets, options.loss_terms)
            wanted = options.split and options.population is not False
            separable = meant.separable or (wanted and self._separable(meant.function, outputs, targets))
            return meant.terms, separable, meant.notes
        if options.loss_terms is not None:
            return options.loss_terms, False, ()
        _, kwargs = self._given
        if "labels" not in kwargs:
            raise ValueError(
                "backward() received neither targets nor loss_terms, and the model no labels. Expected what the loss "
                "was computed with, to know how many terms its mean averages. Call backward(loss, targets, criterion)."
            )
        return own_loss_terms(self._module.modules(), kwargs, outputs)

    def _criterion(self, outputs: Outputs, targets: Any, options: Options) -> Callable[[Any, Any], torch.Tensor]:
        detached = outputs.with_parts([part.detach() for part in outputs.parts])
        return self._repeated(losses.prepare(options.loss, detached, targets, options.loss_terms).function)

    def _separable(self, function: Callable, outputs: Outputs, targets: Any) -> bool:
        """Whether the loss is a mean over samples."""
        return found_separable(function, self._repeated(function), outputs, targets)

    def _repeated(self, function: Callable) -> Callable[[Any, Any], torch.Tensor]:
        """The user's loss as it was after the forward pass, on a copy of it at each call."""

        def run(outputs: Any, targets: Any) -> torch.Tensor:
            replica = Replica((function,))
            replica.rewind({})
            try:
                return repeated(replica.roots[0], self._after)(outputs, targets)
            finally:
                replica.restore()
                replica.clear()

        return run


@dataclass(frozen=True)
class _Seen:
    """A step before its own backward pass.

    Attributes
    ----------
    pulls, loss:
        As of a measurement with passes of its own.
    others:
        Whether the loss has terms that do not come from the outputs.
    notes:
        On the samples and the loss.
    """

    pulls: Pulls
    loss: Loss
    others: bool
    notes: tuple[str, ...]


def _call(model: nn.Module, given: tuple) -> Any:
    args, kwargs = given
    return model(*args, **kwargs)
