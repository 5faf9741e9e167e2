"""What goes wrong beside a training run: told once for each reason, counted, and never the end of the run."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

ON_ERROR = ("warn", "raise")
ROWS = "a row where this happens"
"""What a run mostly goes on without."""
LINES, LENGTH = 3, 500
"""How much of an error's message a warning quotes: lines, and characters."""


@dataclass
class _Repeats:
    """How often a reason came again since it was last told, and at which steps."""

    reason: str
    count: int = 0
    first: int | None = None
    last: int | None = None


class Failures:
    """Warns of each distinct reason once and counts its repetitions, or raises, as `on_error` says.

    Two reasons that differ in numbers alone, such as bytes of free memory, count as one.

    Raises
    ------
    ValueError
        For an `on_error` that is neither "warn" nor "raise".
    """

    def __init__(self, on_error: str) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error is {on_error!r}. Expected one of {', '.join(map(repr, ON_ERROR))}.")
        self.on_error = on_error
        self._told: dict[str, _Repeats] = {}

    @contextlib.contextmanager
    def caught(self, step: int | None, missing: str, always: bool = False) -> Iterator[None]:
        """Around what may fail: a warning names the error and what is `missing` then. `always` never raises."""
        try:
            yield
        except Exception as error:  # whatever a framework, a service or a disk raises
            if self.on_error == "raise" and not always:
                raise
            self._tell(described(error), step, missing)

    def tell(self, reason: str, step: int | None, missing: str) -> None:
        """Warn of something that raised no error, or raise it as a RuntimeError."""
        if self.on_error == "raise":
            raise RuntimeError(reason)
        self._tell(reason, step, missing)

    def summary(self) -> None:
        """Tell how often reasons came again since they were told."""
        repeats = [known for known in self._told.values() if known.count]
        for known in repeats:
            times = "once more" if known.count == 1 else f"{known.count} times more"
            at = "" if known.first is None else f" (steps {known.first} to {known.last})"
            say(f"lnp: {times}{at}: {known.reason}")
            known.count, known.first, known.last = 0, None, None

    def _tell(self, reason: str, step: int | None, missing: str) -> None:
        known = self._told.get(key := re.sub(r"0x[0-9a-f]+|\d+", "#", reason))
        if known is not None:
            known.count, known.last = known.count + 1, step
            known.first = step if known.first is None else known.first
            return
        self._told[key] = _Repeats(reason)
        where = "" if step is None else f" at step {step}"
        say(
            f"lnp{where}: {reason}\nThe run goes on without {missing}. The same again is counted, and told by the "
            "tracker's close(). To stop there with a traceback instead, make the tracker with on_error='raise'."
        )


def described(error: BaseException) -> str:
    """The type of an error and the first lines of its message.

    >>> described(ValueError("The batch is empty."))
    'ValueError: The batch is empty.'
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a message that cannot be formatted must not end the run either
        lines = ["its message cannot be read"]
    quoted = "\n".join(lines[:LINES])
    return f"{type(error).__name__}: {quoted[:LENGTH]}"


def say(text: str) -> None:
    """Warn. Where a filter turns warnings into errors the text goes to the log: a warning must not end the run."""
    try:
        warnings.warn(text, stacklevel=_level())
    except Warning:
        logging.getLogger("lnp").warning(text)


def _level() -> int:
    """The stack level of the caller outside of lnp, for `warnings.warn` in the calling function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _inside(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _inside(module: str) -> bool:
    root = module.partition(".")[0]
    return root == "lnp" or root.startswith("lnp_") or root == "contextlib"
