"""Where a tracker's rows go: the run's file, the history in memory, and loggers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from lnp.loggers import Logger
from lnp.printable import printable
from lnp.tracking.failures import Failures
from lnp.tracking.history import History, Row
from lnp.tracking.names import RESUMED
from lnp.tracking.storage import Appender
from lnp.user_warnings import warn


class Recorder:
    """Keeps rows, and leaves out those of steps that the run has gone back behind.

    Attributes
    ----------
    path:
        The file's path, or None.
    is_open:
        Whether rows can be kept now.
    latest:
        The last row's numbers as loggers get them.
    """

    def __init__(self, path: str | None, fsync: bool, loggers: list[Logger], failures: Failures) -> None:
        self.path = path
        self._fsync = fsync
        self._loggers = loggers
        self._failures = failures
        self._file: Appender | None = None
        self._history: History | None = None
        self._refused = False  # whether the file belongs to another process
        self._resumed: int | None = None  # the step that the run went back to, until a row tells the file
        self._notes: tuple[str, ...] = ()
        self.is_open = False
        self.latest: dict[str, float] = {}

    @property
    def history(self) -> History:
        """The measurements so far, also those of earlier processes."""
        if self._history is not None:
            return self._history
        if self._refused:  # what is in the file is another run
            return History()
        return History.read(self.path) if self.path is not None and os.path.exists(self.path) else History()

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Have these rows in memory."""
        self._history = History(rows)

    def open(self, step: int) -> None:
        """Continue the file, of which a run that begins at this step leaves out what is not before it."""
        if self.path is not None:
            self._refused = True
            file = Appender(self.path, self._fsync)
            self._refused = False
            try:
                self._history = History.read(self.path)
            except BaseException:
                file.close()  # its lock would keep this tracker, too, from trying again
                raise
            self._file = file
        elif self._history is None:
            self._history = History()
        last = self.history.last_step
        if last is not None and step <= last:
            if self.path is not None and step <= self.history["step"][0]:
                self._tell_other_run(self.path, step)
            self.go_back(step)
        self.is_open = True

    def _tell_other_run(self, path: str, step: int) -> None:
        """Warn that a run which begins anew stands in the place of all that the file has."""
        warn(
            f"lnp: {printable(path)} holds an earlier run, measured up to step {self.history.last_step}. This run "
            f"begins with step {step} and takes its place: the earlier lines stay in the file, and are no longer read. "
            "To keep both runs, give each a file of its own."
        )

    def go_back(self, step: int) -> None:
        """Leave out what was measured at this step and later."""
        if self._history is not None:
            self._history.go_back(step)
        self._resumed = step if self._resumed is None else min(step, self._resumed)

    def keep(self, row: Mapping[str, Any], notes: tuple[str, ...], tags: Iterable[str], always: bool) -> None:
        """Append a row to the file and the history, and give its numbers, without the tags, to the loggers.

        Notes are written where they change. Where the file fails the row is in neither, so that they agree, and loggers
        have it all the same. `always` warns also where the tracker raises. Nothing is kept before the first `open`, by
        a process that measures with the one that keeps the rows.
        """
        if self._history is None:
            return
        step = row["step"]
        complete = dict(row)
        if notes != self._notes:
            complete["notes"] = "; ".join(notes)
        last = self._history.last_step
        if self._resumed is None and last is not None and step <= last:
            self._resumed = step  # a checkpoint was loaded into a tracker that runs
        if self._resumed is not None:
            complete[RESUMED] = self._resumed
        self.latest = logged_values(complete, tags)
        with self._failures.catch(step, "the row of this step in file and history", always):
            self._append(complete)
            self._notes = notes
            self._resumed = None
        for logger in list(self._loggers):
            with self._failures.catch(step, "this logger, which gets no more values", always):
                self._log(logger, step)

    def close(self) -> None:
        """Let others write to the file."""
        file, self._file = self._file, None
        self.is_open = False
        if file is not None:
            file.close()

    def _append(self, row: Row) -> None:
        """Append a row to the file, if there is one, and then to the history."""
        if self._file is not None:
            self._file.append(row)
        assert self._history is not None, "open() has made it"
        self._history.append(row)

    def _log(self, logger: Logger, step: int) -> None:
        """Give the last row's numbers to a logger; one that fails gets no more."""
        try:
            logger(self.latest, step)
        except Exception:
            self._loggers.remove(logger)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "is_open": False}  # a copy in another process opens the file itself


def logged_values(row: Mapping[str, Any], tags: Iterable[str]) -> dict[str, float]:
    """The numbers of a row under the names that loggers get: {"lnp/chi_pos": 0.01, ...}."""
    hidden = (RESUMED, "time", *tags)
    return {
        f"lnp/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in hidden
    }
