"""Runs next to each other in a table: final loss, spectral reach, and where each factor stalls."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lnp.results import rounding
from lnp.runs.curves import FACTORS, NET_POSITION, curve, summary
from lnp.runs.open_runs import RunSources, open_runs
from lnp.runs.spectral_reach import Reach
from lnp.tracking.history import History

SETTLED = tuple(f"{name} settled" for name in FACTORS)
HEADER = ("run", "size", "last step", "loss", "reach", "at step", *SETTLED, "net chi_pos")
ABOUT = """reach: lowest chi_pos over windows of five measurements with its standard error, and the step around which it
is attained; one half of the measurements chooses the window, the other is averaged, and "below" is an upper limit.
settled: the step from which on the factor stays within 25% of where it ends; - if it moves on.
net chi_pos: from the fall of the loss on the tracker's own batch, in the last window, or below two standard errors."""


def compare(runs: RunSources) -> list[tuple[str, ...]]:
    """One line of texts for each run, under `HEADER`. Runs without rows are left out.

    Examples
    --------
    >>> import lnp
    >>> rows = [{"step": s, "loss": 1 / (1 + s), "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 0.5} for s in range(9)]
    >>> compare({"a": lnp.History(rows)})
    [('a', '-', '8', '0.111', '0.5', '2', '1', '1', '1', '-')]
    """
    return [_line(name, run) for name, run in open_runs(runs).items() if len(run)]


def to_text(lines: Sequence[tuple[str, ...]]) -> str:
    """The table as aligned text, and what its columns mean."""
    return "\n".join([*aligned(HEADER, lines), "", ABOUT])


def aligned(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> list[str]:
    """The header and the lines, their cells one below the other.

    >>> aligned(("run", "loss"), [("small", "0.5")])
    ['run    loss', 'small   0.5']
    """
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (header, *lines)
    ]


def number(value: float) -> str:
    """Three digits, or two where there is a power of ten.

    >>> number(0.1234), number(999.7), number(26122), number(0.0000293), number(float("nan"))
    ('0.123', '1,000', '26,122', '2.9e-05', '-')
    """
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.1e}"


def integer(value: float) -> str:
    """A step with its thousands apart, or "-" if there is none."""
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def with_error(value: float, error: float) -> str:
    """A value with its standard error, if it has one."""
    return rounding.with_error(value, error) if error > 0 else number(value)


def reached(reach: Reach) -> str:
    """A reach with its standard error, or its upper limit.

    >>> reached(Reach(3e-5, 1e-5, 10.0, 5)), reached(Reach(-1e-5, 1e-5, 10.0, 5)), reached(Reach(0.5, 0.0, 1.0, 5))
    ('3.0e-05 ± 1.0e-05', 'below 2.0e-05', '0.5')
    """
    return with_error(reach.chi_pos, reach.stderr) if reach.resolved else f"below {number(reach.limit)}"


def _line(name: str, run: History) -> tuple[str, ...]:
    """The cells of one run, under `HEADER`."""
    s = summary(run)
    stalls = (integer(s.stalled[factor]) for factor in FACTORS)
    at = integer(s.reach.step)
    return (
        name,
        number(s.parameters),
        integer(s.last_step),
        number(s.loss),
        reached(s.reach),
        at,
        *stalls,
        net_position(run),
    )


def net_position(run: History) -> str:
    """The net position of a run's last window with its standard error, or what it is below; "-" without one.

    >>> row = {"step": 9, "net/chi_pos": 3e-5, "net/chi_pos_stderr": 1e-5}
    >>> net_position(History([row])), net_position(History([row | {"net/chi_pos": -1e-6}])), net_position(History())
    ('3.0e-05 ± 1.0e-05', 'below 2.0e-05', '-')
    """
    found = curve(run, NET_POSITION)
    if not len(found.mean):
        return "-"
    value, error = float(found.mean[-1]), float(found.stderr[-1])
    return reached(Reach(value, error, float(found.step[-1]), 1))
