"""Uses of one weight that add, in several places or at several steps of a loop, before they are squared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lnp.per_sample import norms
from lnp_jax.fallback import wide
from lnp_jax.taps.interpreter import Path, Site
from lnp_jax.taps.primitives import chunked, inner


def square_norms(uses: tuple[Site, ...], kept: Mapping[Path, Any], cotangents: Mapping[Path, Any]) -> jax.Array:
    """(N,) squared norms of sums over several places or steps."""
    if len(uses) == 1 and not uses[0].scans:
        return chunked(uses[0].use, kept[uses[0].path], cotangents[uses[0].path])
    outer, rows = _together(uses, kept, cotangents)
    samples = cotangents[uses[0].path].shape[0]
    total = jnp.zeros(())
    if outer:
        total = total + norms.outer(jnp, *outer)
    if rows:
        total = total + norms.rows(jnp, *rows)
    if outer and rows:
        total = total + 2 * norms.rows_and_outer(jnp, *rows, *outer)
    return jnp.sum(total.reshape(samples, -1), axis=1)


def inner_products(
    uses: tuple[Site, ...], kept: Mapping[Path, Any], cotangents: Mapping[Path, Any], index: jax.Array
) -> jax.Array:
    """(M,) inner products of sums over several places or steps with those of all samples."""
    samples = cotangents[uses[0].path].shape[0]
    apart = lambda part: part.reshape(samples, -1, *part.shape[1:])  # samples, steps over the parameter, ...
    outer, rows = (tuple(apart(part) for part in parts) for parts in _together(uses, kept, cotangents))
    gradient: Any = 0
    if outer:
        gradient = jnp.einsum("ncsp,ncsq->cpq", *(wide(part) for part in outer))
    if rows:
        table = max(site.use.table for site in uses)
        row, values = rows[0], wide(rows[1])
        zeros = jnp.zeros((row.shape[1], table, values.shape[-1]), values.dtype)
        step = jnp.arange(row.shape[1])[None, :, None]
        gradient = gradient + zeros.at[step, jnp.where(row < 0, table, row)].add(values, mode="drop")
    total = jnp.zeros(len(index))
    if outer:
        left, right = (part[index] for part in outer)
        total = total + inner(jnp.einsum("ncsp,cpq->ncsq", wide(left), gradient), right)
    if rows:
        row, values = (part[index] for part in rows)
        looked_up = gradient.at[step, jnp.where(row < 0, table, row)].get(mode="fill", fill_value=0)
        total = total + inner(looked_up, values)
    return total


def _together(
    uses: tuple[Site, ...], kept: Mapping[Path, Any], cotangents: Mapping[Path, Any]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Factors of the uses that are products, (left, right), and of those that are look-ups, (index, values), with the
    places that add along the second axis; () for none.
    """
    outer, rows = [], []
    for site in uses:
        factors = _factors(site, kept[site.path], cotangents[site.path])
        if site.use.kind == "rows":
            rows.append(factors)
        else:
            outer.append(factors[::-1] if site.use.flipped else factors)
    joined = lambda found: tuple(jnp.concatenate(same, axis=1) for same in zip(*found, strict=True))
    return joined(outer), joined(rows)


def _factors(site: Site, beside: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    """Factors (samples x steps over the parameter, steps that add x positions, ...)."""
    samples, levels = d.shape[0], len(site.scans)
    over = [depth + 1 for depth in range(levels) if depth in site.view.scanned]
    again = [depth + 1 for depth in range(levels) if depth not in site.view.scanned]
    count, repeats = (math.prod(lengths(site, scanned)) for scanned in (True, False))

    def flat(array: jax.Array) -> jax.Array:
        moved = jnp.transpose(array, (0, *over, *again, *range(levels + 1, array.ndim)))
        return moved.reshape(samples * count * repeats, *array.shape[levels + 1 :])

    made = site.use.factors(flat(beside), flat(d))
    return tuple(part.reshape(samples * count, repeats * part.shape[1], *part.shape[2:]) for part in made)


def lengths(site: Site, scanned: bool) -> tuple[int, ...]:
    """Of the scans that run over the parameter, or of those that do not."""
    return tuple(length for depth, length in enumerate(site.scans) if (depth in site.view.scanned) == scanned)
