"""What taps yield during one backward pass, added up to squared norms of the gradients of single samples."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from array_api_compat import torch as xp
from torch import Tensor

from lnp.per_sample import uses
from lnp.per_sample.uses import Factors, Kind
from lnp_torch.outputs import square_norm, widened
from lnp_torch.taps.derived import Derived, Frame, Lookup, disjoint, square_norms, totals
from lnp_torch.taps.layout import Layout, Unread
from lnp_torch.taps.products import inner_products
from lnp_torch.taps.routed import Rows
from lnp_torch.taps.rules import Use


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
    rerouted:
        Whether rows have moved before as chance or values decide.
    rows:
        Whose the rows are that go in and come out, if they were followed.
    """

    name: str
    use: Use
    frame: Frame
    flipped: bool
    rerouted: bool = False
    rows: Rows | None = None

    def layout(self, samples: int, time_major: bool) -> Layout:
        """Where the samples are in the arrays of this use."""
        moved = self.rows is not None and self.rows.moved is not None
        if self.rows is None or time_major or self.rows.samples != samples:
            return Layout(samples, time_major, self.rerouted or moved)
        return Layout(samples, rows=self.rows if moved else None)


LayoutName = Literal["second axis", "looked up once", "looked up by sample"]
LAYOUTS: tuple[LayoutName, ...] = ("second axis", "looked up once", "looked up by sample")
"""Where else the samples of a parameter's operations are found: the second axis of time-major arrays; or nowhere, in an
embedding that is looked up once for all samples, such as that of positions, before it meets them. One that is looked up
by numbers along one axis that do not come from the samples is taken for the latter, unless told otherwise."""
Layouts = Mapping[str, LayoutName]
"""{name of a parameter: where its operations have the samples}, where not along the first axis."""


@dataclass(frozen=True)
class Pullback:
    """What one pull-back of a cotangent v yields.

    Attributes
    ----------
    square_norms:
        {name: (N,) array of ||J_nl^T v_n||^2} of the parameters whose operations all have rules.
    missing:
        {name of any other parameter: why}.
    gradient:
        {name: J_l^T v} of the parameters for which it was asked.
    gradient_norms:
        {name: ||J_l^T v||^2, shape ()} of the whole batch, where that was asked for.
    products:
        <J_m^T v_m, J^T v> for some of the samples m, shape (M,); None where it was not asked for.
    """

    square_norms: dict[str, Tensor]
    missing: dict[str, str]
    gradient: dict[str, Tensor] = field(default_factory=dict)
    gradient_norms: dict[str, Tensor] = field(default_factory=dict)
    products: Tensor | None = None

    def divided(self, scale: float | Tensor) -> Pullback:
        """What the cotangent divided by `scale` would have yielded."""
        return replace(
            self,
            square_norms={name: norm / scale**2 for name, norm in self.square_norms.items()},
            gradient={name: widened(part) / scale for name, part in self.gradient.items()},
            gradient_norms={name: norm / scale**2 for name, norm in self.gradient_norms.items()},
            products=None if self.products is None else self.products / scale**2,
        )


@dataclass(frozen=True)
class Reading:
    """How taps are to be read.

    Attributes
    ----------
    general:
        Parameters that are left out.
    layouts:
        Where the samples of the others are, where not along the first axis.
    gradient_norms:
        Whether the squared norms of the batch's gradient are taken on its way.
    index:
        Samples whose gradients are then multiplied with that of the batch, (M,), or None.
    """

    general: frozenset[str] = frozenset()
    layouts: Layouts = field(default_factory=dict)
    gradient_norms: bool = False
    index: Tensor | None = None


class Reader:
    """Adds up, during one backward pass, what the taps yield; single uses at once, others when all are there.

    Attributes
    ----------
    unread:
        {parameter whose uses cannot be squared: why}.
    gradient_norms, products:
        As of `Pullback`.
    """

    def __init__(
        self,
        sites: list[list[Site]],
        lookups: dict[str, Lookup],
        derived: dict[str, Derived],
        reading: Reading,
        unrecognised: set[str],
        samples: int,
    ) -> None:
        self._sites, self._lookups, self._samples = sites, lookups, samples
        self._layouts, self._index, general = reading.layouts, reading.index, {*reading.general, *unrecognised}
        self._of_all = reading.index is not None and 2 * len(reading.index) >= samples
        self._kept: dict[str, list[tuple[Frame, Factors]]] = {}
        self._parts: dict[str, list[tuple[Frame, Factors]]] = {}
        self.gradient_norms: dict[str, Tensor] = {}
        self.products: Tensor | None = None
        self._uses: dict[str, list[Site]] = {}
        for site in itertools.chain.from_iterable(sites):
            self._uses.setdefault(site.name, []).append(site)
        self._derived = {own: it for own, it in derived.items() if own in self._uses or own in unrecognised}
        self._sources = {name: t for it in self._derived.values() for name, t in it.sources.items()}
        summed = {*self._derived, *self._sources}  # there, uses of any kind and view can be added
        uses_of = {name: of_one for name, of_one in self._uses.items() if name not in summed}
        self.unread = {name: "overlapping views" for name, of_one in uses_of.items() if not _readable(of_one)}
        self._tables = {own for own, lookup in lookups.items() if self._as_table(lookup)}
        looked_up = {lookups[own].name for own in self._tables}
        for own in self._tables:
            if own in general or own in self.unread or own not in {*self._uses, *self._sources}:
                self.unread[lookups[own].name] = "what was looked up is used in another way"
        for own in self._derived.keys() & unrecognised:
            self._leave(own, "what is computed from it is used in a way without a rule")
        self._skip = {*general, *self.unread, *looked_up, *(lookups.keys() - self._tables)}
        self._met: dict[str, Tensor] = {}
        self._waiting: dict[tuple[str, Frame], list[Factors]] = {}
        self._found: dict[str, Tensor] = {}

    def read(self, index: int, d: Tensor) -> None:
        """Called with the cotangent d of the output of the operation of this number."""
        with torch.no_grad(), without_autocast(d.device.type):
            for site in self._sites[index]:
                if site.name not in self._skip:
                    self._read(site, d)

    def _as_table(self, lookup: Lookup) -> bool:
        """Whether a lookup is read where what was looked up meets the samples: one that is told so, or the only use."""
        layout, only = self._layouts.get(lookup.name), len(self._uses[lookup.name]) == 1
        return layout == "looked up once" or (lookup.shared and only and layout is None)

    def _read(self, site: Site, d: Tensor) -> None:
        """Form the factors of one use, and square the uses of its frame once all of them are there."""
        layout = site.layout(self._samples, self._layouts.get(site.name) == "second axis")
        try:
            factors = Factors(site.use.kind, _comparable(site.use.kind, site.use.factors(d, layout)))
        except Unread:
            self._skip.add(site.name)
            return self._leave(site.name, "the samples are not along the first axis")
        factors = factors.transposed() if site.flipped else factors
        if site.name in self._derived or site.name in self._sources:
            self._parts.setdefault(site.name, []).append((site.frame, factors))
            return
        if self._index is not None:
            name, frame, some = self._of_some(site, factors, self._index)
            self._kept.setdefault(name, []).append((frame, some))
        waiting = self._waiting.setdefault((site.name, site.frame), [])
        waiting.append(factors)
        if len(waiting) == sum(other.frame == site.frame for other in self._uses[site.name]):
            self._add(site.name, site.frame)

    def _leave(self, name: str, why: str) -> None:
        """The parameters behind a name are not read."""
        for source in self._derived[name].sources if name in self._derived else [name]:
            if source not in self._lookups:
                self.unread[source] = why
            elif source in self._tables:
                self.unread[self._lookups[source].name] = why

    def _add(self, name: str, frame: Frame) -> None:
        """Square the sum of the uses of one frame."""
        factors = self._waiting.pop((name, frame))
        if name in self._tables:
            gradient = uses.total(xp, [use.arrays[0] for use in factors])
            value = uses.square_norms(xp, [self._lookups[name].of(gradient)])
            name = self._lookups[name].name
        else:
            value = uses.square_norms(xp, factors)
        self._found[name] = self._found[name] + value if name in self._found else value

    def meet(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        """Called with a parameter's gradient, right after the last of its uses: neither has to stay."""
        with torch.no_grad(), without_autocast(gradient.device.type):
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            self.gradient_norms[name] = square_norm(gradient)
            if self._index is not None and self._is_summed(name):
                self._met[name] = gradient
            for frame, factors in self._kept.pop(name, ()):
                product = inner_products(frame, factors, parameter, gradient)
                self._add_product(product[self._index] if self._of_all else product)

    def _of_some(self, site: Site, factors: Factors, index: Tensor) -> tuple[str, Frame, Factors]:
        """(parameter, frame, factors) of some of the samples; of all where a copy of most of them would take more."""
        some = factors if self._of_all else factors.of(index)
        if site.name in self._tables:
            lookup = self._lookups[site.name]
            return lookup.name, lookup.frame, lookup.of(some.arrays[0])
        return site.name, site.frame, some

    def _is_summed(self, name: str) -> bool:
        """Whether something was computed from a parameter or its rows, before it met the samples."""
        return name in self._sources or any(self._lookups[own].name == name for own in self._tables & {*self._sources})

    def _sum(self) -> None:
        """Add what was computed from parameters to their own uses, and square it."""
        wanted = {
            name: tensor
            for name, tensor in self._sources.items()
            if name not in self._skip and (name in self._tables or name not in self._lookups)
        }
        if not wanted:
            return
        try:
            found = square_norms(self._samples, self._derived, self._parts, wanted, self._of_source)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever somebody's own backward pass does with gradients of several samples
            for name in wanted:
                self._leave(name, "what is computed from it has no gradient for all samples at once")
            return
        for name, value in found.items():
            of = self._lookups[name].name if name in self._tables else name
            self._found[of] = self._found[of] + value if of in self._found else value
        if self._index is not None:
            self._multiply(totals(self._index, len(self._index), self._derived, self._parts, wanted))

    def _of_source(self, name: str, gradient: Tensor) -> Factors:
        """The gradient (C, *shape) of a parameter, or of a table that was looked up in one."""
        if name in self._tables:
            return self._lookups[name].of(gradient)
        return Factors("dense", (gradient,))

    def _multiply(self, found: dict[str, Tensor]) -> None:
        """Add the products of some samples' gradients with the batch's."""
        for name, gradient in found.items():
            of = self._lookups[name].name if name in self._tables else name
            met = self._met.get(of)
            if met is not None:
                self._add_product(uses.inner_products(xp, self._of_source(name, gradient), met))

    def _add_product(self, product: Tensor) -> None:
        self.products = product if self.products is None else self.products + product

    def result(self) -> dict[str, Tensor]:
        """{name: (N,)}. A use that no cotangent reached has contributed nothing."""
        for name, frame in list(self._waiting):
            if name not in self._skip:
                self._add(name, frame)
        with torch.no_grad():
            self._sum()
        return {name: value for name, value in self._found.items() if name not in self.unread}


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Nothing is cast: autocast is off, and left alone where it already is, for entering it takes a while."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _comparable(kind: Kind, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating-point factors in float32 or better; in bfloat16 where a GPU multiplies it and sums in float32.

    A product with an output in bfloat16 had its inputs cast to it, as autocast does behind the function that is seen.
    """
    floating = [f for f in arrays if isinstance(f, Tensor) and f.is_floating_point()]
    narrow = [f.dtype == torch.bfloat16 for f in floating]
    if all(f.is_cuda for f in floating) and (all(narrow) or (any(narrow) and kind in ("outer", "convolution"))):
        return tuple(f.bfloat16() if isinstance(f, Tensor) and f.is_floating_point() else f for f in arrays)
    return tuple(widened(f) if isinstance(f, Tensor) and f.is_floating_point() else f for f in arrays)


def _readable(sites: list[Site]) -> bool:
    """Whether the uses of one parameter can be squared."""
    return uses.readable([site.frame for site in sites], [site.use.kind for site in sites], disjoint)
