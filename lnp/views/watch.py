"""`lnp watch`: a table in the terminal that follows the files of running trackers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lnp.optional import import_optional
from lnp.printable import printable
from lnp.runs.curves import NET_POSITION, NOISE_SCALE, POSITION, curve, summary
from lnp.runs.open_runs import named_files
from lnp.runs.table import integer, net_position, number, reached
from lnp.tracking.history import History

if TYPE_CHECKING:
    from rich.console import Group

BARS = "▁▂▃▄▅▆▇█"
POINTS = 16
"""Characters of a curve."""
COLUMNS = (
    ("run", 0), ("step", 1), ("loss", 2), ("", 9), ("chi_loss", 8), ("chi_net", 6), ("chi_pos", 3), ("", 10),
    ("net chi_pos", 7), ("noise scale", 12), ("reach", 4), ("measuring", 11), ("last", 5),
)  # fmt: skip
"""Headings, and which of them comes first where not all fit into the terminal."""
NAME = 3
"""The share of the terminal that names may take: one third."""


@dataclass
class _Seen:
    """What a file was when it was last read."""

    state: tuple[int, int]
    history: History | None
    problem: str


class Watched:
    """The runs of some files and folders, of which those are read again that have grown."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._seen: dict[Path, _Seen] = {}

    def table(self, width: int, now: float) -> Group:
        """The table for a terminal of this many characters, and below it what is not in it; `now` is the time, in
        seconds since 1970.
        """
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        lines, below = [], []
        for name, seen in self._read().items():
            if seen.history is None or not len(seen.history):
                below.append(Text(f"{name}: {seen.problem or 'nothing yet'}".removeprefix(": "), style="dim"))
            else:
                lines.append(line(shortened(name, max(width // NAME, 8)), seen.history, now))
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        shown = fitting(lines, width)
        for index in shown:
            table.add_column(COLUMNS[index][0], justify="left" if index == 0 else "right", no_wrap=True)
        for cells in lines:
            table.add_row(*(Text(cells[index]) for index in shown))
        return Group(*([table] if lines else []), *below)

    def _read(self) -> dict[str, _Seen]:
        """{name: what is known of the file}; a file that cannot be read says why, and the others go on."""
        try:
            files = named_files(self._paths)
        except FileNotFoundError as error:  # a folder in which no run has begun
            return {"": _Seen((0, 0), None, printable(str(error)))}
        for path in files.values():
            try:
                status = path.stat()
                state = status.st_size, status.st_mtime_ns
                if path not in self._seen or self._seen[path].state != state:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of damaged lines, which `lnp plot` tells
                        self._seen[path] = _Seen(state, History.read(path), "")
            except (OSError, ValueError) as error:
                self._seen[path] = _Seen((0, 0), None, printable(str(error)))
        return {name: self._seen[path] for name, path in files.items()}


def watch(paths: Iterable[Path], every: float, once: bool) -> None:
    """Show the runs until Ctrl-C; once, where that is asked for, or the output is no terminal."""
    import_optional("rich", "lnp watch", install="'lnp[watch]'")
    from rich.console import Console
    from rich.live import Live

    console, watched = Console(), Watched(paths)
    if once or not console.is_terminal:
        console.print(watched.table(console.width, time.time()))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(watched.table(console.width, time.time()), refresh=True)
            time.sleep(every)


def line(name: str, run: History, now: float) -> list[str]:
    """The cells of a run, under `COLUMNS`."""
    s = summary(run)
    position = POSITION if POSITION in run else "chi_pos"
    seconds = np.nansum(run.numbers("seconds"))
    return [
        name,
        integer(s.last_step),
        number(s.loss),
        sparkline(run, "loss"),
        _last(run, "chi_loss"),
        _last(run, "chi_net"),
        _last(run, position),
        sparkline(run, position),
        net_position(run) if NET_POSITION in run else "-",
        _last(run, NOISE_SCALE),
        reached(s.reach),
        f"{number(float(seconds))} s",
        age(now - float(run.numbers("time")[-1])),
    ]


def fitting(lines: list[list[str]], width: int) -> list[int]:
    """The columns that fit into a terminal of this many characters, in their order.

    >>> fitting([["a", "10", "0.5", *["x" * 30] * 10]], 20)
    [0, 1, 2]
    """
    chosen, left = [], width - 1
    for index in sorted(range(len(COLUMNS)), key=lambda index: COLUMNS[index][1]):
        needed = max(len(text) for text in (COLUMNS[index][0], *(cells[index] for cells in lines))) + 2  # and a gap
        if needed <= left:
            chosen.append(index)
            left -= needed
    return sorted(chosen)


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters: without its middle, since runs of a sweep begin alike.

    >>> shortened("width-16", 8), shortened("sweep-of-widths-lr-3e-4", 11)
    ('width-16', 'sweep…-3e-4')
    """
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - half]}…{name[-half:]}"


def sparkline(run: History, column: str) -> str:
    """The course of a column in one line, on a logarithmic scale, evenly spaced in the logarithm of the step."""
    found = curve(run, column)
    good = np.isfinite(found.mean) & (found.mean > 0)
    if good.sum() < 2:
        return ""
    step, value = np.log1p(found.step[good]), np.log(found.mean[good])
    values = np.interp(np.linspace(step[0], step[-1], POINTS), step, value)
    low, span = values.min(), np.ptp(values)
    return "".join(BARS[round((len(BARS) - 1) * (v - low) / span)] if span > 0 else BARS[0] for v in values)


def age(seconds: float) -> str:
    """How long ago something was.

    >>> age(5), age(600), age(7200), age(float("nan"))
    ('5 s ago', '10 min ago', '2 h ago', '-')
    """
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _last(run: History, column: str) -> str:
    """The mean of the last window of a column."""
    mean: Any = curve(run, column).mean
    return number(float(mean[-1])) if len(mean) else "-"
