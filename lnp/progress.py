"""Progress bars on long work: with rich or tqdm where one is installed, and never where the output is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]


@contextlib.contextmanager
def bar(label: str, total: int | None) -> Iterator[Advance]:
    """A function to call with the amount of work that was done since the last call."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with contextlib.ExitStack() as stack:
        yield _rich(stack, label, total) or _tqdm(stack, label, total) or (lambda done: None)


def _rich(stack: contextlib.ExitStack, label: str, total: int | None) -> Advance | None:
    """A bar of rich's, on the stack; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = progress.add_task(label, total=total)
    return lambda done: progress.advance(task, done)


def _tqdm(stack: contextlib.ExitStack, label: str, total: int | None) -> Advance | None:
    """A bar of tqdm's, on the stack; None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    progress = stack.enter_context(tqdm(total=total, desc=label, leave=False, file=sys.stderr))
    return lambda done: progress.update(done) and None
