"""One forward pass with a tap on every operation that uses a parameter, and pull-backs that read the taps.

A tap is the identity. Its backward pass hands the cotangent on and, while squared norms are wanted, adds what it says
about the gradients of single samples: nothing of size samples x parameters, and no pass through the weights.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode

from lnp_torch.fingerprint import about
from lnp_torch.model import Parameters
from lnp_torch.taps.reader import Lookup, Pulled, Reader, Reading, Site
from lnp_torch.taps.rules import Use, recognised
from lnp_torch.writes import tensors

MOVING = frozenset(
    {"randperm", "randint", "multinomial", "nonzero", "argwhere", "masked_select", "argsort", "bincount", "unique"}
)
"""Operations by which rows may move as chance or values say: in one batch as if none had moved, in another not."""


class Taps(TorchFunctionMode):
    """Watches one forward pass. Afterwards `square_norms` reads what its operations say.

    Attributes
    ----------
    parameters:
        {name: leaf} that are watched.
    general:
        {name of a parameter whose use was not recognised: the operation}.
    watching:
        Whether operations are tapped; can be switched.
    products:
        Multiplications of the forward pass, about.
    program:
        What identifies the sequence of operations: their names, and the shapes at the sites.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.parameters = parameters
        self.watching = True
        self._names = {id(p): name for name, p in parameters.items()}
        self._sites: list[list[Site]] = []
        self._reader: Reader | None = None
        self._anchor: Tensor | None = None
        self.general: dict[str, str] = {}
        self._tables: dict[str, Tensor] = {}  # what was looked up for all samples at once
        self._lookups: dict[str, Lookup] = {}
        self._began: int | None = None
        self.program: int = 0
        self.products: int = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.watching or torch.compiler.is_compiling():  # what the user's compiler follows stays as it is
            return out
        name = getattr(func, "__name__", "") or str(func)
        if name != "__get__":
            self.program = hash((self.program, name, *_said(args), *_said(kwargs.values())))
        if name in MOVING or (name == "__getitem__" and _masked(args)):
            self.program = hash((self.program, time.perf_counter_ns()))  # other rows next time: never the same program
        used = [tensor for tensor in tensors((args, kwargs)) if self._name(tensor) is not None]
        if not used or not _differentiable(out) or self._only_views(out):
            return out
        return self._tapped(func, name, args, kwargs, out, used)

    def __exit__(self, *exception):
        self._tables.clear()  # they hold the graph, which holds this
        return super().__exit__(*exception)

    def _tapped(self, func: Callable, name: str, args: tuple, kwargs: dict, out: Any, used: list[Tensor]) -> Any:
        """The output with a tap on it, if it is known how the parameters in it were used."""
        single = isinstance(out, Tensor) and out.is_floating_point() and not functorch.is_functorch_wrapped_tensor(out)
        # without their graph, which would otherwise hold itself in memory by way of the taps
        bare = _mapped(lambda t: t if self._name(t) is not None else t.detach(), (args, kwargs))
        uses = recognised(func, *bare) if single else []
        uses = [use for use in uses if self._name(use.tensor) is not None]
        known = Counter(id(use.tensor) for use in uses)
        counts = Counter(id(tensor) for tensor in used)
        missed = [tensor for tensor in used if known[id(tensor)] != counts[id(tensor)]]
        for tensor in missed:
            self.general.setdefault(self._name(tensor) or "", name)
        uses = [use for use in uses if not any(use.tensor is tensor for tensor in missed)]
        sites = [site for use in uses if (site := self._site(use)) is not None]
        if not sites:
            return out
        self.program = hash((self.program, tuple(out.shape), *((s.name, s.frame, s.flipped) for s in sites)))
        self.products += sum(site.use.products(out) for site in sites)
        self._sites.append(sites)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=out.device, requires_grad=True)
        tapped = _Tap.apply(out, self._anchor, self, len(self._sites) - 1)
        if self._began is None and tapped.grad_fn is not None:
            self._began = tapped.grad_fn._sequence_nr()
        for site in sites:
            if site.use.index is not None:
                self._watch(tapped, Lookup(site.name, site.frame, site.use.index))
        return tapped

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

    def _only_views(self, out: Any) -> bool:
        outs = list(tensors(out))
        return bool(outs) and all(self._name(tensor) is not None for tensor in outs)

    def _site(self, use: Use) -> Site | None:
        """Where in the parameter the tensor lies; None if that cannot be said."""
        name, tensor = self._name(use.tensor) or "", use.tensor
        strides = tensor.stride()
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, strides, strict=True)):
            self.general.setdefault(name, "expand")
            return None
        turned = tensor.ndim == 2 and strides[0] < strides[1]
        if turned and use.kind == "rows":
            self.general.setdefault(name, "embedding of a transposed weight")
            return None
        whole = self._tables[name] if name in self._tables else self.parameters[name]
        start = tensor.storage_offset() - whole.storage_offset()
        shape, order = tuple(tensor.shape), -1 if turned else 1
        return Site(name, use, (start, shape[::order], tuple(strides)[::order]), use.transposed != turned)

    def recorded(self, outputs: list[Tensor]) -> int:
        """Operations of autograd between the first tap and the outputs: some come from functions that are not seen."""
        ends = [out.grad_fn._sequence_nr() for out in outputs if out.grad_fn is not None]
        return max(ends, default=0) - (self._began or 0) if self._began is not None else 0

    def pull(
        self, outputs: list[Tensor], cotangents: list[Tensor], gradient: bool, reading: Reading
    ) -> tuple[Pulled, tuple]:
        """What the taps say, and J^T v if it is asked for, by one backward pass."""
        leaves = list(self.parameters.values())
        anchor = [] if self._anchor is None else [self._anchor]
        inputs = [*leaves, *anchor] if gradient or reading.gradient else anchor
        with self.read(reading, len(cotangents[0])) as pulled:
            if reading.gradient and not gradient:
                with _dropped(leaves):
                    torch.autograd.backward(outputs, cotangents, retain_graph=True, inputs=inputs)
                return pulled(outputs[0].device), ()
            if not inputs:
                return pulled(outputs[0].device), ()
            grads = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
        return pulled(outputs[0].device), grads[: len(leaves)] if gradient else ()

    @contextlib.contextmanager
    def read(self, reading: Reading, samples: int) -> Iterator[Callable[[torch.device], Pulled]]:
        """During the backward pass inside, the taps are read; afterwards what is yielded tells what they said."""
        reader = Reader(self._sites, self._lookups, reading, set(self.general), samples)
        self._reader = reader
        meeting = self.parameters.items() if reading.gradient else []
        hooks = [p.register_hook(functools.partial(reader.met, name, p.detach())) for name, p in meeting]
        try:
            yield lambda device: self._pulled(reader, reading, samples, device)
        finally:
            self._reader = None
            for hook in hooks:
                hook.remove()

    def _pulled(self, reader: Reader, reading: Reading, samples: int, device: torch.device) -> Pulled:
        found, unread = reader.result(), {**reader.unread, **self.general}
        zero = torch.zeros(samples, device=device)  # of what no cotangent reached
        missing = {n: unread.get(n, "") for n in self.parameters if n in unread or n in reading.general}
        norms = {name: found.get(name, zero) for name in self.parameters if name not in missing}
        none = torch.zeros((), device=device)
        of_gradient = {n: reader.gradient_norms.get(n, none) for n in self.parameters} if reading.gradient else {}
        return Pulled(norms, missing, of_gradient, reader.along)

    def seen(self, index: int, d: Tensor) -> None:
        """Called by a tap with the cotangent of its output."""
        if self._reader is not None:
            self._reader.read(index, d)


@contextlib.contextmanager
def _dropped(leaves: list[Tensor]) -> Iterator[None]:
    """Gradients of the leaves, which are nobody else's, are not kept."""

    def drop(leaf: Tensor) -> None:
        leaf.grad = None

    hooks = [leaf.register_post_accumulate_grad_hook(drop) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, anchor, taps, index):
        ctx.taps, ctx.index = taps, index
        return y.data  # in the same memory, but no view, so that it may be written to as y could

    @staticmethod
    def backward(ctx, d):
        ctx.taps.seen(ctx.index, d)
        return d, None, None, None


def _masked(args: tuple) -> bool:
    return any(tensor.dtype == torch.bool for tensor in tensors(args[1:]))


def _said(values: Iterable[Any]) -> Iterator[Any]:
    """The numbers and words among an operation's arguments, as far as they decide what it does."""
    for value in values:
        if type(value) in (tuple, list):
            yield from _said(value)
        elif not isinstance(value, Tensor):
            yield about(value)


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, item) for item in value)
    if type(value) is dict:
        return {key: _mapped(function, item) for key, item in value.items()}
    return value


def _differentiable(out: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors(out))
