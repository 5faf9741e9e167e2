"""What taps say during one backward pass, added up to squared norms of the gradients of single samples."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field

import torch
from array_api_compat import torch as xp
from torch import Tensor
from torch.nn import functional as F

from lnp.per_sample import norms
from lnp_torch.outputs import dot, widened
from lnp_torch.taps.rules import Layout, Unread, Use


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


@dataclass(frozen=True)
class Lookup:
    """Rows of an embedding that were looked up once for all samples; what was looked up is watched as a table of its
    own.

    Attributes
    ----------
    name, frame:
        The embedding's.
    rows:
        Which.
    """

    name: str
    frame: tuple
    rows: Tensor


@dataclass(frozen=True)
class Kept:
    """What one use of a parameter says about some samples, to be multiplied with the parameter's gradient."""

    name: str
    frame: tuple
    kind: str
    factors: tuple


@dataclass(frozen=True)
class Pulled:
    """What the taps have said during one backward pass.

    Attributes
    ----------
    square_norms:
        {name: (N,) array of ||J_nl^T v_n||^2}.
    missing:
        {name of any other parameter: why}.
    gradient_norms:
        {name: ||J_l^T v||^2, shape ()}, where that was asked for.
    along:
        <J_m^T v_m, J^T v> for some of the samples m, shape (M,); None where it was not asked for.
    """

    square_norms: dict[str, Tensor]
    missing: dict[str, str]
    gradient_norms: dict[str, Tensor]
    along: Tensor | None


@dataclass(frozen=True)
class Reading:
    """How taps are to be read.

    Attributes
    ----------
    general:
        Parameters that are left out.
    layouts:
        Where the samples of the others are, where not along the first axis.
    gradient:
        Whether the squared norms of the batch's gradient are taken on its way.
    along:
        Samples whose gradients are then multiplied with that of the batch, as indices, or None.
    """

    general: frozenset[str] = frozenset()
    layouts: Layouts = field(default_factory=dict)
    gradient: bool = False
    along: Tensor | None = None


class Reader:
    """Adds up, during one backward pass, what the taps say; single uses at once, others when all are seen."""

    def __init__(
        self,
        sites: list[list[Site]],
        lookups: dict[str, Lookup],
        reading: Reading,
        unrecognised: set[str],
        samples: int,
    ) -> None:
        self._sites, self._lookups, self._samples = sites, lookups, samples
        self._layouts, self._some, general = reading.layouts, reading.along, {*reading.general, *unrecognised}
        self._kept: dict[str, list[Kept]] = {}
        self.gradient_norms: dict[str, Tensor] = {}
        self.along: Tensor | None = None
        self._uses: dict[str, list[Site]] = {}
        for site in (site for row in sites for site in row):
            self._uses.setdefault(site.name, []).append(site)
        self.unread = {name: "overlapping views" for name, uses in self._uses.items() if not _combine(uses)}
        self._tables = {own for own, it in lookups.items() if self._layout(it.name) == "looked up once"}
        for own in self._tables:
            if own in general or own in self.unread or own not in self._uses:
                self.unread[lookups[own].name] = "what was looked up is used in another way"
        self._skip = {*general, *self.unread, *(lookups.keys() - self._tables)}
        self._waiting: dict[tuple, list[tuple[Site, tuple]]] = {}
        self._found: dict[str, Tensor] = {}

    def _layout(self, name: str) -> str:
        return self._layouts.get(name, "")

    def read(self, index: int, d: Tensor) -> None:
        with torch.no_grad(), as_it_is(d.device.type):
            for site in self._sites[index]:
                if site.name not in self._skip and self._layout(site.name) != "looked up once":
                    self._read(site, d)

    def _read(self, site: Site, d: Tensor) -> None:
        layout = Layout(self._samples, self._layout(site.name) == "second axis")
        try:
            factors = _comparable(site.use.factors(d, layout))
        except Unread:
            self._skip.add(site.name)
            name = self._lookups[site.name].name if site.name in self._tables else site.name
            self.unread[name] = "the samples are not along the first axis"
            return
        if self._some is not None:
            kept = self._of_some(site, factors, self._some)
            self._kept.setdefault(kept.name, []).append(kept)
        waiting = self._waiting.setdefault((site.name, site.frame), [])
        waiting.append((site, factors))
        if len(waiting) == sum(other.frame == site.frame for other in self._uses[site.name]):
            self._add(site.name, site.frame)

    def _add(self, name: str, frame: tuple) -> None:
        uses = self._waiting.pop((name, frame))
        if name in self._tables:
            gradient, name = _sum(uses), self._lookups[name].name
            value = norms.rows(xp, *self._looked_up(uses[0][0].name, gradient))
        else:
            value = _square_norm(uses)
        self._found[name] = self._found[name] + value if name in self._found else value

    def _looked_up(self, table: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, values) of a table whose gradient (N, ...) is there."""
        rows = self._lookups[table].rows
        return rows.reshape(1, -1).expand(len(gradient), -1), gradient.reshape(len(gradient), rows.numel(), -1)

    def met(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Called with the gradient of a parameter, which comes right after the last of its uses: neither the gradient
        nor what was kept of the uses has to stay.
        """
        with torch.no_grad(), as_it_is(gradient.device.type):
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            self.gradient_norms[name] = dot(gradient, gradient)
            for kept in self._kept.pop(name, ()):
                product = along(kept, parameter, gradient)
                self.along = product if self.along is None else self.along + product

    def _of_some(self, site: Site, factors: tuple, index: Tensor) -> Kept:
        """The rows of these samples, with left along the frame's rows."""
        some = [f[index] if isinstance(f, Tensor) else f for f in factors]
        if site.name in self._tables:
            lookup = self._lookups[site.name]
            return Kept(lookup.name, lookup.frame, "rows", self._looked_up(site.name, some[0]))
        return Kept(site.name, site.frame, site.use.kind, tuple(some[::-1] if site.flipped else some))

    def result(self) -> dict[str, Tensor]:
        """{name: (N,)}. A use that no cotangent reached has contributed nothing."""
        for name, frame in list(self._waiting):
            if name not in self._skip:
                self._add(name, frame)
        return {name: value for name, value in self._found.items() if name not in self.unread}


def as_it_is(device: str) -> contextlib.AbstractContextManager:
    """Nothing is cast: autocast is off, and left alone where it already is, for entering it takes a while."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


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
    return all(kind <= {"outer", "rows"} or kind == {"dense"} for kind in kinds)


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
    if kind == "convolution":
        return norms.convolution(xp, *uses[0][1])
    if kind == "dense":
        return norms.dense(xp, _sum(uses))
    outer = [factors[::-1] if site.flipped else factors for site, factors in uses if site.use.kind == "outer"]
    rows = [factors for site, factors in uses if site.use.kind == "rows"]
    left, right = map(_joined, zip(*outer, strict=True)) if outer else (None, None)
    index, values = map(_joined, zip(*rows, strict=True)) if rows else (None, None)
    total = norms.outer(xp, left, right) if outer else 0
    if rows:
        total = total + norms.rows(xp, index, values)
    return total + 2 * norms.rows_and_outer(xp, index, values, left, right) if outer and rows else total


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _sum(uses: list[tuple[Site, tuple]]) -> Tensor:
    """Explicit gradients of one frame."""
    total = uses[0][1][0]
    for _, (gradient,) in uses[1:]:
        total = total + gradient.reshape(total.shape)
    return total


def along(kept: Kept, parameter: Tensor, u: Tensor) -> Tensor:
    """<gradient of sample m, u> for what is kept of it, with u of the parameter's shape. (M,)."""
    start, shape, strides = kept.frame
    if (start, shape, strides) != (0, parameter.shape, parameter.stride()):
        same = torch.empty_strided(parameter.shape, parameter.stride(), dtype=u.dtype, device=u.device)
        u = same.copy_(u).as_strided(shape, strides, start)
    if kept.kind == "outer":
        left, right = kept.factors
        product = (left @ u.to(left.dtype)) * right
    elif kept.kind == "rows":
        index, values = kept.factors
        product = F.embedding(index.clamp(min=0), u.to(values.dtype)) * values * (index >= 0)[:, :, None]
    elif kept.kind == "convolution":
        x, d, window = kept.factors
        convolve = (F.conv1d, F.conv2d, F.conv3d)[d.ndim - 3]
        made = convolve(x, u.to(x.dtype), None, window.stride, 0, window.dilation, window.groups)
        product = made[(..., *(slice(size) for size in d.shape[2:]))] * d
    else:
        (gradient,) = kept.factors
        product = gradient * u.to(gradient.dtype).reshape(gradient.shape[1:])
    return product.reshape(len(product), -1).sum(1)
