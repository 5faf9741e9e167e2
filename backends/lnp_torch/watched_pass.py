"""A forward pass of the user's own training step, watched: with taps, what was drawn, and what the model was given."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lnp_torch.averages import Averages
from lnp_torch.draws import Watched
from lnp_torch.in_pieces import length_of
from lnp_torch.model import Parameters, Program, program
from lnp_torch.outputs import Outputs
from lnp_torch.replay import Passes, copied
from lnp_torch.state_guard import RandomState
from lnp_torch.step_loss import separate_outputs
from lnp_torch.taps.function_mode import Taps


class WatchedPass(contextlib.AbstractContextManager):
    """Watches the calls of a module inside the context. Nothing is computed differently, in no bit.

    Parameters
    ----------
    module:
        Whose forward pass it is.
    parameters:
        {name: the user's own parameter} of those that are differentiated.
    selected:
        Which these are, as the user has said.

    Attributes
    ----------
    taps, draws, averages:
        What watches.
    calls:
        How many times the module was called.
    failure:
        What kept the pass from being watched: it goes on all the same.
    returned:
        What the module returned.
    prepared:
        A copy of the model as it was before the pass.
    given:
        (args, kwargs) of the call.
    """

    def __init__(self, module: nn.Module, parameters: Parameters, selected: Any) -> None:
        self._module, self._selected = module, selected
        self._device = next(iter(parameters.values())).device
        own = SimpleNamespace(given=set(map(id, [*module.parameters(), *module.buffers()])), begun=True)
        self.taps, self.draws = Taps(parameters, own), Watched(self._device, module.parameters())
        self.taps.watching = False
        self.averages = Averages()
        self.calls = 0
        self.failure: Exception | None = None
        self.returned: Any = None
        self.prepared: Program | None = None
        self.given: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> WatchedPass:
        with contextlib.ExitStack() as stack:  # which takes everything away again if one of these fails
            stack.callback(self._module.register_forward_pre_hook(self._called, with_kwargs=True).remove)
            stack.callback(self._module.register_forward_hook(self._answered).remove)
            stack.enter_context(self.averages)
            stack.enter_context(self.taps)
            stack.enter_context(self.draws)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def _called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the forward pass: keep what it begins with."""
        self.calls, self.taps.watching, self.taps.samples = self.calls + 1, True, length_of((args, kwargs))
        self._before = RandomState([self._device])
        device = self._device.type
        self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        try:  # of the model as it is before the step's own pass; a failure is told by `backward`: the pass goes on
            self.given = copied((args, kwargs))
            self.prepared = program(self._module, call_with, self._selected)
        except Exception as error:
            self.failure = error

    def _answered(self, module: nn.Module, args: tuple, returned: Any) -> Any:
        """After the forward pass: keep what it ends with."""
        self.taps.watching = False  # what the loss does with the parameters is not the model's
        self.after, self._explained = RandomState([self._device]), self.draws.explained and not self.draws.wrote
        try:
            returned = separate_outputs(returned)
        except Exception as error:
            self.failure = error
        self.returned = returned
        return returned

    def autocast(self) -> torch.autocast:
        """The automatic casts that the pass ran with."""
        enabled, dtype = self._autocast
        return torch.autocast(self._device.type, dtype, enabled=enabled)

    def passes(self, outputs: Outputs) -> Passes:
        """The same pass, to be run again on the copy. Nothing is frozen: statistics and attention are the step's."""
        assert self.prepared is not None, "the forward pass has made it"
        return Passes(
            self.prepared, self.given, len(outputs.leaves[0]), self.draws.record, self._before, self.after, False,
            attention=False, explained=self._explained, measured=outputs.measured,
        )  # fmt: skip

    def let_go(self) -> None:
        """Forget the copy of the model, without waiting for the garbage collector."""
        if self.prepared is not None:
            self.prepared.replica.clear()


def call_with(model: nn.Module, given: tuple[tuple, dict[str, Any]]) -> Any:
    """Call a module with (args, kwargs)."""
    args, kwargs = given
    return model(*args, **kwargs)
