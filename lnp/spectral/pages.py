"""What a spectrum and a kernel show when they are printed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from lnp.results.display import MEANING, noted
from lnp.results.rounding import number
from lnp.results.tables import Page, Row

MODES = ("eigenvalue", "weight", "share of the loss decrease")
LEAST_SHARE = 5e-4
"""Share of the loss decrease from which on a node of a spectrum is printed."""
PRINTED_MODES = 8
"""Modes of a kernel that are printed, from the largest eigenvalue down."""
PRINTED_ROWS = 2048
"""Rows of a kernel at most whose modes are computed to be printed, within seconds."""


def spectrum_page(s: Any) -> Page:
    """A `lnp.Spectrum`: its sums, and the nodes that the loss decreases along."""
    off = f"spectral position, from {s.eigenvalues.size} nodes; off by {s.moment_error:.1g} (relative)"
    modes = s.participation_ratio if s.density is not None else None
    largest: Row = ("lambda_max", number(s.lambda_max), "", "largest eigenvalue seen")
    nodes = (node for node in zip(s.eigenvalues, s.weights, s.shares, strict=True) if not node[2] < LEAST_SHARE)
    notes = noted((*s.decomposition.notes, *s.notes))
    return Page([largest, *_sums(s, "tr Theta, the sum of all", off, modes)], MODES, _modes(nodes), notes)


def kernel_page(k: Any) -> Page:
    """A `lnp.Kernel`: its sums and, of all outputs, its largest modes."""
    of = f"tr Theta; {k.kind} kernel, {' x '.join(map(str, k.matrix.shape))}"
    if k.kind != "full":
        return Page([("trace", number(k.trace), "", of)], lines=noted(k.notes))
    rate: Row = ("rate", number(k.rate), "", MEANING["rate"])
    found: Iterable[tuple] = ()
    if len(k.matrix) <= PRINTED_ROWS:
        found = itertools.islice(zip(k.eigenvalues, k.weights, k.contributions, strict=True), PRINTED_MODES)
    rows = [rate, *_sums(k, of, MEANING["chi_pos"], k.participation_ratio)]
    return Page(rows, MODES, _modes(found), noted(k.notes))


def _sums(values: Any, trace: str, position: str, modes: float | None) -> list[Row]:
    """Trace, position and preference, and how many modes there are where that is known."""
    rows: list[Row] = [
        ("trace", number(values.trace), "", trace),
        ("chi_pos", number(values.chi_pos), "", position),
        ("preference", number(values.preference), "", MEANING["preference"]),
    ]
    if modes is not None:
        rows.append(("modes", number(modes), "", "participation ratio: how many share the kernel"))
    return rows


def _modes(found: Iterable[tuple]) -> list[list[str]]:
    """Lines of texts under `MODES`."""
    return [[number(float(value)), f"{weight:.3g}", f"{share:.3g}"] for value, weight, share in found]
