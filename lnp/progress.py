"""Progress bars on long work: with rich or tqdm where one is installed, and never where the output is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """A function to call with the amount of work that was done since the last call."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with contextlib.ExitStack() as stack:
        yield _rich(stack, what, total) or _tqdm(stack, what, total) or (lambda done: None)


def _rich(stack: contextlib.ExitStack, what: str, total: int) -> Advance | None:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    shown = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = shown.add_task(what, total=total)
    return lambda done: shown.advance(task, done)


def _tqdm(stack: contextlib.ExitStack, what: str, total: int) -> Advance | None:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    shown = stack.enter_context(tqdm(total=total, desc=what, leave=False, file=sys.stderr))
    return lambda done: shown.update(done) and None
