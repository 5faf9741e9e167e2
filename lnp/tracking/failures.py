"""What goes wrong beside a training run: one warning for each reason, its repetitions counted, the run never ended."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from lnp.user_warnings import warn

OnError = Literal["warn", "raise"]
ON_ERROR: tuple[str, ...] = get_args(OnError)
MISSING_ROW = "a row where this happens"
"""What a run goes on without in most failures."""
QUOTED_LINES = 3
"""Lines of an error's message that a warning quotes."""
QUOTED_LENGTH = 500
"""Characters of an error's message that a warning quotes."""


@dataclass
class _Repetitions:
    """How often a reason came again since the last warning of it, and at which steps."""

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

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error is {on_error!r}. Expected one of {', '.join(map(repr, ON_ERROR))}.")
        self.on_error = on_error
        self._repetitions: dict[str, _Repetitions] = {}

    @contextlib.contextmanager
    def catch(self, step: int | None, missing: str, always: bool = False) -> Iterator[None]:
        """Around what may fail: a warning names the error and what is `missing` then. `always` never raises."""
        try:
            yield
        except Exception as error:  # whatever a framework, a service or a disk raises
            if self.on_error == "raise" and not always:
                raise
            self._warn_once(describe(error), step, missing)

    def report(self, reason: str, step: int | None, missing: str) -> None:
        """Warn of something that raised no error, or raise it as a RuntimeError."""
        if self.on_error == "raise":
            raise RuntimeError(reason)
        self._warn_once(reason, step, missing)

    def report_repetitions(self) -> None:
        """Warn of how often reasons came again since the last warning of them."""
        for failure in [failure for failure in self._repetitions.values() if failure.count]:
            times = "once more" if failure.count == 1 else f"{failure.count} times more"
            steps = "" if failure.first is None else f" (steps {failure.first} to {failure.last})"
            warn(f"lnp: {times}{steps}: {failure.reason}")
            failure.count, failure.first, failure.last = 0, None, None

    def _warn_once(self, reason: str, step: int | None, missing: str) -> None:
        """Warn of a reason, or count it where a warning was given already."""
        # sizes, steps and addresses differ at each repetition
        key = re.sub(r"0x[0-9a-f]+|\d+", "#", reason)
        failure = self._repetitions.get(key)
        if failure is not None:
            failure.count += 1
            failure.last = step
            failure.first = step if failure.first is None else failure.first
            return
        self._repetitions[key] = _Repetitions(reason)
        where = "" if step is None else f" at step {step}"
        warn(
            f"lnp{where}: {reason}\nThe run goes on without {missing}. The same again is counted, and told by the "
            "tracker's close(). To stop there with a traceback instead, make the tracker with on_error='raise'."
        )


def describe(error: BaseException) -> str:
    """The type of an error and the first lines of its message.

    >>> describe(ValueError("The batch is empty."))
    'ValueError: The batch is empty.'
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a message that cannot be formatted must not end the run either
        lines = ["its message cannot be read"]
    quoted = "\n".join(lines[:QUOTED_LINES])
    return f"{type(error).__name__}: {quoted[:QUOTED_LENGTH]}"
