"""One forward pass with a tap on every operation that uses a parameter, and pull-backs that read the taps.

A tap is the identity. Its backward pass hands the cotangent on and, while squared norms are wanted, adds what it says
about the gradients of single samples: nothing of size samples x parameters, and no pass through the weights.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from array_api_compat import torch as xp
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lnp import norms
from lnp_torch.models import Parameters
from lnp_torch.outputs import widened
from lnp_torch.sites import Layout, Unread, Use, recognised


@dataclass(frozen=True)
class Site:
    """One use of a parameter, as part of the uses that add before they are squared.

    Attributes
    ----------
    name:
        Of the parameter.
    use:
        What the operation makes of it.
    frame:
        Which numbers of the parameter are used, in which order: uses of the same frame can be added.
    flipped:
        Whether left runs over the frame's columns.
    """

    name: str
    use: Use
    frame: tuple
    flipped: bool


LAYOUTS = ("second axis", "looked up once")
"""Where else the samples of a parameter's operations are found: the second axis of time-major arrays; or nowhere, in an
embedding that is looked up once for all samples, such as that of positions, before it meets them."""


Layouts = dict[str, str]
"""{name of a parameter: one of LAYOUTS}."""


class Taps(TorchFunctionMode):
    """Watches one forward pass. Afterwards `square_norms` reads what its operations say.

    Attributes
    ----------
    parameters:
        {name: leaf} that are watched.
    general:
        {name of a parameter whose use was not recognised: the operation}.
    program:
        What identifies the sequence of operations: their names, and the shapes at the sites.
    """

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.parameters = parameters
        self._names = {id(p): name for name, p in parameters.items()}
        self._sites: list[list[Site]] = []
        self._reader: _Reader | None = None
        self._anchor: Tensor | None = None
        self.general: dict[str, str] = {}
        self._tables: dict[str, Tensor] = {}  # what was looked up for all samples at once
        self._rows: dict[str, tuple[str, Tensor]] = {}  # {name of a table: (the embedding's, rows)}
        self.program: int = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "") or str(func)
        if name != "__get__":
            self.program = hash((self.program, name))
        used = [tensor for tensor in _tensors((args, kwargs)) if self._name(tensor) is not None]
        if not used or not _differentiable(out) or self._only_views(out):
            return out
        return self._tapped(func, name, args, kwargs, out, used)

    def __exit__(self, *exception):
        self._tables.clear()  # they hold the graph, which holds this
        return super().__exit__(*exception)

    def _tapped(self, func: Callable, name: str, args: tuple, kwargs: dict, out: Any, used: list[Tensor]) -> Any:
        """The output with a tap on it, if it is known how the parameters in it were used."""
        single = isinstance(out, Tensor) and out.is_floating_point()
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
        self._sites.append(sites)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=out.device, requires_grad=True)
        tapped = _Tap.apply(out, self._anchor, self, len(self._sites) - 1)
        for use in uses:
            if use.index is not None:
                self._watch(tapped, self._name(use.tensor) or "", use.index)
        return tapped

    def _watch(self, table: Tensor, name: str, rows: Tensor) -> None:
        """Treat what was looked up as a parameter of its own."""
        own = f"{name} {len(self._rows)}"
        self._tables[own], self._rows[own] = table, (name, rows)
        self._names[id(table)] = own

    def _name(self, tensor: Tensor) -> str | None:
        """Of the parameter that a tensor is, or is a view of."""
        own = self._names.get(id(tensor))
        if own is not None:
            return own
        base = tensor._base
        return None if base is None else self._names.get(id(base))

    def _only_views(self, out: Any) -> bool:
        outs = list(_tensors(out))
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

    def pull(
        self, outputs: list[Tensor], cotangents: list[Tensor], also: list[Tensor], general: set[str], layouts: Layouts
    ) -> tuple[dict[str, Tensor], dict[str, str], tuple]:
        """({name: (N,) array of ||J_nl^T v_n||^2}, {other name: reason}, J^T v with respect to `also`) by one backward
        pass.

        Left out are those of `general`, and parameters whose use or samples were not recognised.
        """
        samples = len(cotangents[0])
        reader = _Reader(self._sites, self._rows, {*self.general, *general}, layouts, samples)
        inputs = [*also, *([] if self._anchor is None else [self._anchor])]
        self._reader = reader
        try:
            grads = (
                torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True) if inputs else ()
            )
        finally:
            self._reader = None
        found, unread = reader.result(), {**reader.unread, **self.general}
        zero = torch.zeros(samples, device=outputs[0].device)  # of what no cotangent reached
        missing = {name: unread.get(name, "") for name in self.parameters if name in unread or name in general}
        norms = {name: found.get(name, zero) for name in self.parameters if name not in missing}
        return norms, missing, grads[: len(also)]

    def seen(self, index: int, d: Tensor) -> None:
        """Called by a tap with the cotangent of its output."""
        if self._reader is not None:
            self._reader.read(index, d)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, anchor, taps, index):
        ctx.taps, ctx.index = taps, index
        return y.data  # in the same memory, but no view, so that it may be written to as y could

    @staticmethod
    def backward(ctx, d):
        ctx.taps.seen(ctx.index, d)
        return d, None, None, None


class _Reader:
    """Adds up, during one backward pass, what the taps say; single uses at once, others when all are seen."""

    def __init__(
        self,
        sites: list[list[Site]],
        rows: dict[str, tuple[str, Tensor]],
        general: set[str],
        layouts: Layouts,
        samples: int,
    ) -> None:
        self._sites, self._rows, self._layouts, self._samples = sites, rows, layouts, samples
        self._uses: dict[str, list[Site]] = {}
        for site in (site for row in sites for site in row):
            self._uses.setdefault(site.name, []).append(site)
        self.unread = {name: "overlapping views" for name, uses in self._uses.items() if not _combine(uses)}
        self._tables = {own for own, (name, _) in rows.items() if self._layout(name) == "looked up once"}
        for own in self._tables:
            if own in general or own in self.unread or own not in self._uses:
                self.unread[rows[own][0]] = "what was looked up is used in another way"
        self._skip = {*general, *self.unread, *(rows.keys() - self._tables)}
        self._waiting: dict[tuple, list[tuple[Site, tuple]]] = {}
        self._found: dict[str, Tensor] = {}

    def _layout(self, name: str) -> str:
        return self._layouts.get(name, "")

    def read(self, index: int, d: Tensor) -> None:
        with torch.no_grad(), torch.autocast(d.device.type, enabled=False):
            for site in self._sites[index]:
                if site.name not in self._skip and self._layout(site.name) != "looked up once":
                    self._read(site, d)

    def _read(self, site: Site, d: Tensor) -> None:
        layout = Layout(self._samples, self._layout(site.name) == "second axis")
        try:
            factors = _comparable(site.use.factors(d, layout))
        except Unread:
            self._skip.add(site.name)
            name = self._rows[site.name][0] if site.name in self._tables else site.name
            self.unread[name] = "the samples are not along the first axis"
            return
        waiting = self._waiting.setdefault((site.name, site.frame), [])
        waiting.append((site, factors))
        if len(waiting) == sum(other.frame == site.frame for other in self._uses[site.name]):
            self._add(site.name, site.frame)

    def _add(self, name: str, frame: tuple) -> None:
        uses = self._waiting.pop((name, frame))
        if name in self._tables:
            name, index = self._rows[name]
            gradient = _sum(uses).reshape(self._samples, index.numel(), -1)
            value = norms.rows(xp, index.reshape(1, -1).expand(self._samples, -1), gradient)
        else:
            value = _square_norm(uses)
        self._found[name] = self._found[name] + value if name in self._found else value

    def result(self) -> dict[str, Tensor]:
        """{name: (N,)}. A use that no cotangent reached has contributed nothing."""
        for name, frame in list(self._waiting):
            if name not in self._skip:
                self._add(name, frame)
        return {name: value for name, value in self._found.items() if name not in self.unread}


def _comparable(factors: tuple) -> tuple:
    """Floating-point factors in float32 or better; in bfloat16 where a GPU multiplies it and sums in float32."""
    floating = [f for f in factors if isinstance(f, Tensor) and f.is_floating_point()]
    if all(f.dtype == torch.bfloat16 and f.is_cuda for f in floating):
        return factors
    return tuple(widened(f) if isinstance(f, Tensor) and f.is_floating_point() else f for f in factors)


def _combine(uses: list[Site]) -> bool:
    """Whether the uses of one parameter are of the same numbers, in kinds that can be added, or of different ones."""
    frames: dict[tuple, list[Site]] = {}
    for site in uses:
        frames.setdefault(site.frame, []).append(site)
    if len(frames) > 1 and not _disjoint(list(frames)):
        return False
    kinds = [{site.use.kind for site in same} for same in frames.values() if len(same) > 1]
    return all(kind <= {"outer", "rows"} or kind == {"explicit"} for kind in kinds)


def _disjoint(frames: list[tuple]) -> bool:
    """Whether the frames fill intervals of the parameter's memory that do not overlap."""
    intervals = []
    for start, shape, strides in frames:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        intervals.append((start, start + extent))
    intervals.sort()
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(intervals))


def _square_norm(uses: list[tuple[Site, tuple]]) -> Tensor:
    """||sum of the uses||^2 for each sample, (N,)."""
    kind = uses[0][0].use.kind
    if kind == "window":
        return norms.convolution(xp, *uses[0][1])
    if kind == "explicit":
        return norms.explicit(xp, _sum(uses))
    outer = [factors[::-1] if site.flipped else factors for site, factors in uses if site.use.kind == "outer"]
    rows = [factors for site, factors in uses if site.use.kind == "rows"]
    left, right = (torch.cat(parts, 1) for parts in zip(*outer, strict=True)) if outer else (None, None)
    index, values = (torch.cat(parts, 1) for parts in zip(*rows, strict=True)) if rows else (None, None)
    total = norms.outer(xp, left, right) if outer else 0
    if rows:
        total = total + norms.rows(xp, index, values)
    return total + 2 * norms.rows_and_outer(xp, index, values, left, right) if outer and rows else total


def _sum(uses: list[tuple[Site, tuple]]) -> Tensor:
    """Explicit gradients of one frame."""
    total = uses[0][1][0]
    for _, (gradient,) in uses[1:]:
        total = total + gradient.reshape(total.shape)
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, item) for item in value)
    if type(value) is dict:
        return {key: _mapped(function, item) for key, item in value.items()}
    return value


def _differentiable(out: Any) -> bool:
    return any(tensor.requires_grad for tensor in _tensors(out))
