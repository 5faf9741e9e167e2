"""Models whose parameters `fully_shard` spreads over processes: one module's whole parameters in memory at a time.

A measurement runs a copy of the model on leaves of the whole shape, without memory. What an operation reads, forward
or backward, is gathered before it, and let go of when something else is needed. So no copy of a parameter is kept in a
graph either: what a graph holds is the leaf itself, or a view of it. Gradients are met one by one, and added up as
training does, so that each process keeps its shard.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lnp_torch.dtensors import is_sharded
from lnp_torch.refusals import parameter_groups
from lnp_torch.rounds import Rounds
from lnp_torch.writes import tensors

ALIASES = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
"""Operations that do not even look at the memory: other views ask whether there is enough of it."""


@dataclass(eq=False)
class Leaf:
    """What stands for a sharded parameter: a tensor of its whole shape.

    Attributes
    ----------
    index:
        Of the parameter among those of the model.
    tensor:
        Without memory where it is not resident.
    change:
        What its values are made by from those of the parameter, or None.
    """

    index: int
    tensor: torch.Tensor
    resident: bool = False
    change: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tensor.numel() * self.tensor.element_size()


class Gathering(TorchDispatchMode):
    """While it is on, operations find the parameters that they read.

    Attributes
    ----------
    parameters:
        The parameters of the program that was made last, by name.
    peak:
        The most bytes of whole parameters that were in memory at a time.
    gathered:
        How many bytes were gathered.
    as_it_is:
        Whether programs that are made now keep the sharded parameters and what makes DTensors of activations.
    """

    def __init__(self, model: nn.Module, rounds: Rounds, places: dict[int, int]) -> None:
        super().__init__()
        self.parameters: dict[str, torch.Tensor] = {}
        self.peak = self.gathered = 0
        self.as_it_is = False
        self._rounds, self._places, self._dtypes = rounds, places, dict(computed_in(model))
        self._leaves: dict[int, Leaf] = {}
        self._resident: list[Leaf] = []  # the one that was read last is the last
        self._room = max(map(_own_size, model.modules()))

    def standing(self, p: torch.Tensor) -> torch.Tensor:
        """A leaf without memory in the place of a sharded parameter; another parameter itself."""
        if self.as_it_is or not is_sharded(p):
            return p
        return self._without_memory(self._places[id(p)], p.shape, self._dtypes.get(id(p)) or p.dtype, p.device)

    def changed(self, tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What stands for a parameter, with other values: they are made of its own each time that it is gathered."""
        leaf = self._leaves.get(_key(tensor))
        if leaf is None:
            return change(tensor.detach())
        made = self._without_memory(leaf.index, tensor.shape, tensor.dtype, tensor.device)
        self._leaves[_key(made)].change = change
        return made

    def as_float64(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for a parameter, in float64."""
        leaf = self._leaves.get(_key(tensor))
        if leaf is None:
            return tensor.detach().double()
        return self._without_memory(leaf.index, tensor.shape, torch.float64, tensor.device)

    def let_go(self) -> None:
        """Of all whole parameters."""
        for leaf in self._resident:
            _free(leaf)
        self._resident.clear()
        self._leaves.clear()
        self.parameters = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in ALIASES:
            wanted = [leaf for t in tensors((args, kwargs)) if (leaf := self._leaves.get(_key(t))) is not None]
            if wanted:
                self._bring(wanted)
        return func(*args, **kwargs)

    def _without_memory(self, index: int, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        tensor.untyped_storage().resize_(0)
        self._leaves[_key(tensor)] = Leaf(index, tensor)
        return tensor

    def _bring(self, wanted: list[Leaf]) -> None:
        """Have these in memory, and as many others as there is room for."""
        wanted = list({id(leaf): leaf for leaf in wanted}.values())
        needed = sum(leaf.size for leaf in wanted if not leaf.resident)
        others = [leaf for leaf in self._resident if all(leaf is not one for one in wanted)]
        kept = sum(leaf.size for leaf in self._resident)
        while others and kept + needed > self._room:
            oldest = others.pop(0)
            kept -= oldest.size
            _free(oldest)
            self._resident.remove(oldest)
        for leaf in wanted:
            if leaf.resident:
                self._resident.remove(leaf)
            else:
                self._fill(leaf)
            self._resident.append(leaf)
        self.peak = max(self.peak, sum(leaf.size for leaf in self._resident))

    def _fill(self, leaf: Leaf) -> None:
        whole = self._rounds.gathered(leaf.index)
        whole = whole if leaf.change is None else leaf.change(whole.to(leaf.tensor.dtype))
        leaf.tensor.untyped_storage().resize_(leaf.size)
        leaf.tensor.data.copy_(whole)  # by .data, which leaves the version alone that graphs have noted
        leaf.resident = True
        self.gathered += leaf.size


def computed_in(model: nn.Module) -> Iterator[tuple[int, torch.dtype | None]]:
    """(id, type in which passes have it) of each parameter that `fully_shard` has sharded; None for its own type."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(fsdp, "FSDPModule", ())
    for module in model.modules():
        if isinstance(module, kind):
            state = module._get_fsdp_state()
            for group in parameter_groups(state):
                for p in group.fsdp_params:
                    yield id(p.sharded_param), state._mp_policy.param_dtype


def _free(leaf: Leaf) -> None:
    leaf.tensor.untyped_storage().resize_(0)
    leaf.resident = False


def _key(tensor: torch.Tensor) -> int:
    """What tells whether tensors have one memory, also where it has no address."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse
        return 0


def _own_size(module: nn.Module) -> int:
    """Bytes of the whole parameters that a module has itself."""
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


_ACTIVE = threading.local()


def active() -> Gathering | None:
    """That of this thread's measurement."""
    return getattr(_ACTIVE, "gathering", None)


def set_active(gathering: Gathering | None) -> None:
    """Say which one is on in this thread."""
    _ACTIVE.gathering = gathering
