"""One forward pass with a tap on every operation that uses a parameter, and pull-backs that read the taps.

A tap is the identity. Its backward pass hands the cotangent on and, while squared norms are wanted, adds to those of
the gradients of single samples: nothing of size samples x parameters, and no pass through the weights.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode

from lnp_torch.constants import Beginning, Constants
from lnp_torch.draws import HOOKS
from lnp_torch.met import dropped
from lnp_torch.model import Parameters, own_memory
from lnp_torch.taps.derived import Derived, Frame, Lookup
from lnp_torch.taps.reader import Pullback, Reader, Reading, Site
from lnp_torch.taps.routed import Routes
from lnp_torch.taps.rules import Use, looks_up, recognised, spreads, unspread
from lnp_torch.taps.sequence import Sequence
from lnp_torch.writes import DESCRIBES, tensors


class Taps(TorchFunctionMode):
    """Watches one forward pass. Afterwards `pull` reads what its operations yield.

    Parameters
    ----------
    samples:
        As the attribute.

    Attributes
    ----------
    parameters:
        {name: leaf} that are watched.
    derived:
        {name of its own: what was computed from parameters alone}.
    general:
        {name of a parameter whose use was not recognised: the operation}.
    watching:
        Whether operations are tapped; can be switched.
    products:
        Multiplications of the forward pass, about.
    sequence:
        Of the operations: their names and settings, and the shapes at the sites.
    hooked:
        Whether hooks were put on activations: they run in the backward pass.
    samples:
        How many there seem to be, if that is known before the pass: as many rows are taken for the samples' own.
    """

    def __init__(self, parameters: Parameters, beginning: Beginning | None = None, samples: int | None = None) -> None:
        super().__init__()
        self.parameters = parameters
        self.watching, self.samples = True, samples
        self._names = {id(p): name for name, p in parameters.items()}
        self._sites: list[list[Site]] = []
        self._reader: Reader | None = None
        self._anchor: Tensor | None = None
        self.general: dict[str, str] = {}
        self._tables: dict[str, Tensor] = {}  # what was looked up for all samples at once
        self._lookups: dict[str, Lookup] = {}
        self.derived: dict[str, Derived] = {}
        self.begin_with(beginning or SimpleNamespace(given=set(map(id, parameters.values())), begun=True))
        self._copies: list[Tensor] = []
        self._began: int | None = None
        self.sequence, self.products, self.hooked = Sequence(), 0, False
        self._routes = Routes()

    def begin_with(self, beginning: Beginning) -> None:
        """The pass begins with these tensors that do not come from the samples."""
        self._constants = Constants(beginning)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is own_memory and self._name(args[0]) is not None:  # stands for the parameter in this pass
            self._names[id(out)], self._copies = self._names[id(args[0])], [*self._copies, out]
            return out
        if not self.watching or not self._constants.begun:
            return out
        if torch.compiler.is_compiling() or func in DESCRIBES:  # what the user's compiler follows stays as it is
            return out
        name = getattr(func, "__name__", "") or str(func)
        given, made = tensors((args, kwargs)), tensors(out)
        constant = self._constants.follow(given, made)
        self.sequence.follow(name, args, kwargs, out, constant)
        self.hooked |= func in HOOKS
        self._routes.follow(name, args, kwargs, out, self.samples, self._constants)
        used = [tensor for tensor in given if self._name(tensor) is not None]
        if not used or not any(tensor.requires_grad for tensor in made) or self._only_views(made):
            return out
        if constant and not self._begins_rows(func, args, given) and self._derives(func, args, made, used):
            return out
        return self._tapped(func, name, args, kwargs, out, used, constant)

    def _begins_rows(self, func: Callable, args: tuple, given: list[Tensor]) -> bool:
        """Whether a parameter meets a row of constants for each sample, such as a recurrent layer's first state."""
        made = [t for t in given if t.ndim > 1 and self._name(t) is None and self._constants.made_here(t)]
        return any(tensor.shape[0] == self.samples for tensor in made) and bool(recognised(func, args, {}))

    def _derives(self, func: Callable, args: tuple, made: list[Tensor], used: list[Tensor]) -> bool:
        """Watch what is computed from parameters alone, unless copies of it, or rows, go to the samples at once."""
        looked_up = looks_up(func, args) and self._name(used[0]) in self.parameters
        if looked_up or not all(map(_plain, made)) or any(spreads(func, args, used, tensor) for tensor in made):
            return False
        sources: dict[str, Tensor] = {}
        for tensor in used:
            name = self._name(tensor) or ""
            known = self.derived.get(name)
            sources |= known.sources if known is not None else {name: self._whole(name)}
        for tensor in made:
            own = f"derived {len(self.derived)}"
            self.derived[own], self._names[id(tensor)] = Derived(tensor, sources), own
        return True

    def _whole(self, name: str) -> Tensor:
        """The parameter, table or derived tensor of a name."""
        if name in self.derived:
            return self.derived[name].tensor
        return self._tables[name] if name in self._tables else self.parameters[name]

    def __exit__(self, *exception):
        self._tables.clear()  # they hold the graph, which holds this
        self._copies.clear()
        return super().__exit__(*exception)

    def _tapped(
        self, func: Callable, name: str, args: tuple, kwargs: dict, out: Any, used: list[Tensor], constant: bool
    ) -> Any:
        """The output with a tap on it, if it is known how the parameters in it were used."""
        single = isinstance(out, Tensor) and _plain(out)
        # without their graph, which would otherwise hold itself in memory by way of the taps
        bare = _mapped(lambda t: t if self._name(t) is not None else t.detach(), (args, kwargs))
        uses = recognised(func, *bare) if single else []
        sites = self._sites_of([use for use in uses if self._name(use.tensor) is not None], used, name)
        if not sites:
            return out
        self.sequence.add(tuple(out.shape), *((s.name, s.frame, s.flipped) for s in sites))
        self.products += sum(site.use.products(out) for site in sites)
        self._sites.append(sites)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=out.device, requires_grad=True)
        tapped = Tap.apply(out, self._anchor, self, len(self._sites) - 1)
        self._routes.remember(tapped)
        if self._began is None and tapped.grad_fn is not None:
            self._began = tapped.grad_fn._sequence_nr()
        for site in sites:
            index = site.use.index
            shared = index is not None and (index.ndim < 2 or (len(index) == 1 and self.samples != 1))
            if index is not None and site.name in self.parameters and (constant or shared):
                self._watch(tapped, Lookup(site.name, site.frame, index, constant and shared))
                self._constants.follow((), (tapped,))
        return tapped

    def _sites_of(self, uses: list[Use], used: list[Tensor], operation: str) -> list[Site]:
        """The sites of an operation; parameters that it uses in a way without a rule are noted down."""
        known = Counter(id(use.tensor) for use in uses)
        counts = Counter(id(tensor) for tensor in used)
        missed = [tensor for tensor in used if known[id(tensor)] != counts[id(tensor)]]
        for tensor in missed:
            self.general.setdefault(self._name(tensor) or "", operation)
        uses = [use for use in uses if not any(use.tensor is tensor for tensor in missed)]
        return [site for use in uses if (site := self._site(use)) is not None]

    def _watch(self, table: Tensor, lookup: Lookup) -> None:
        """Treat what was looked up as a parameter of its own."""
        own = f"{lookup.name} {len(self._lookups)}"
        self._tables[own], self._lookups[own] = table, lookup
        self._names[id(table)] = own

    def _name(self, tensor: Tensor) -> str | None:
        """Of the parameter that a tensor is, or is a view of."""
        own = self._names.get(id(tensor))
        if own is not None:
            return own
        base = tensor._base
        return None if base is None else self._names.get(id(base))

    def _only_views(self, made: list[Tensor]) -> bool:
        """Whether what an operation has made is nothing but views of parameters."""
        return bool(made) and all(self._name(tensor) is not None for tensor in made)

    def _site(self, use: Use) -> Site | None:
        """Where in the parameter the tensor lies; None if that cannot be said."""
        name, tensor = self._name(use.tensor) or "", use.seen
        strides = tensor.stride()
        shape = unspread(tensor)
        if shape != tensor.shape and use.kind != "dense":
            self.general.setdefault(name, "expand")
            return None
        turned = tensor.ndim == 2 and strides[0] < strides[1] and use.kind != "dense"
        if turned and use.kind == "rows":
            self.general.setdefault(name, "embedding of a transposed weight")
            return None
        order = -1 if turned else 1
        start = tensor.storage_offset() - self._whole(name).storage_offset()
        frame: Frame = (start, tuple(shape)[::order], tuple(strides)[::order])
        rerouted = self.sequence.rerouting or self._routes.lost
        return Site(name, use, frame, use.transposed != turned, rerouted, self._routes.rows)

    def recorded(self, outputs: list[Tensor]) -> int:
        """Operations of autograd between the first tap and the outputs: some come from functions that no mode sees."""
        ends = [out.grad_fn._sequence_nr() for out in outputs if out.grad_fn is not None]
        return max(ends, default=0) - (self._began or 0) if self._began is not None else 0

    def pull(
        self,
        outputs: list[Tensor],
        cotangents: list[Tensor],
        reading: Reading,
        names: Collection[str],
        meeting: contextlib.AbstractContextManager | None = None,
    ) -> tuple[Pullback, tuple[Tensor | None, ...]]:
        """What the taps yield, and J^T v of the parameters of these names, by one backward pass.

        Without names, the gradient of one parameter is in memory at a time; what comes of them with `meeting`, which is
        around the pass, is not to be used.
        """
        # a parameter whose gradient is met on its way has to be asked for
        leaves = list(self.parameters if reading.gradient_norms else names)
        inputs = [self.parameters[name] for name in leaves]
        anchor = [] if self._anchor is None else [self._anchor]
        grads: tuple[Tensor | None, ...] = ()
        with self.read(reading, len(cotangents[0])) as pulled:
            if reading.gradient_norms and not names:
                with dropped(inputs):
                    torch.autograd.backward(outputs, cotangents, retain_graph=True, inputs=[*inputs, *anchor])
            elif inputs or anchor:
                with meeting or contextlib.nullcontext():
                    grads = torch.autograd.grad(
                        outputs, [*inputs, *anchor], cotangents, retain_graph=True, allow_unused=True
                    )
        found = dict(zip(leaves, grads, strict=False))
        return pulled(outputs[0].device), tuple(found[name] for name in names)

    @contextlib.contextmanager
    def read(self, reading: Reading, samples: int) -> Iterator[Callable[[torch.device], Pullback]]:
        """During the backward pass inside, the taps are read; afterwards what is yielded returns what was found."""
        reader = Reader(self._sites, self._lookups, self.derived, reading, set(self.general), samples)
        self._reader = reader
        met = self.parameters.items() if reading.gradient_norms else []
        hooks = [p.register_hook(functools.partial(reader.meet, name, p.detach())) for name, p in met]
        try:
            yield lambda device: self._pulled(reader, reading, samples, device)
        finally:
            self._reader = None
            for hook in hooks:
                hook.remove()

    def _pulled(self, reader: Reader, reading: Reading, samples: int, device: torch.device) -> Pullback:
        """What a reader has found, zero for what no cotangent reached."""
        found, unread = reader.result(), {**reader.unread, **self.general}
        zeros = torch.zeros(samples, device=device)
        missing = {n: unread.get(n, "") for n in self.parameters if n in unread or n in reading.general}
        norms = {name: found.get(name, zeros) for name in self.parameters if name not in missing}
        none = torch.zeros((), device=device)
        asked = self.parameters if reading.gradient_norms else ()
        of_gradient = {name: reader.gradient_norms.get(name, none) for name in asked}
        return Pullback(norms, missing, gradient_norms=of_gradient, products=reader.products)

    def receive(self, index: int, d: Tensor) -> None:
        """Called by a tap with the cotangent of its output."""
        if self._reader is not None:
            self._reader.read(index, d)


class Tap(torch.autograd.Function):
    """The identity, whose backward pass shows the cotangent to the taps."""

    @staticmethod
    def forward(ctx, y, anchor, taps, index):
        ctx.taps, ctx.index = weakref.ref(taps), index  # who holds the graph as well
        return y.data  # in the same memory, but no view, so that it may be written to as y could

    @staticmethod
    def backward(ctx, d):
        taps = ctx.taps()
        if taps is not None:
            taps.receive(ctx.index, d)
        return d, None, None, None


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A value in nested containers with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, item) for item in value)
    if type(value) is dict:
        return {key: _mapped(function, item) for key, item in value.items()}
    return value


def _plain(out: Tensor) -> bool:
    """Whether a tensor has the numbers that its operation says."""
    if not (out.is_floating_point() and out.layout == torch.strided):
        return False
    return not (out.is_nested or functorch.is_functorch_wrapped_tensor(out))
