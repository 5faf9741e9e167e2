"""Processes meet over their group's store, where nobody waits for one that does not come, has failed, or was killed.

A collective operation waits until all have called it, and for ever where one never does. So before each of them the
processes say in the store, a key each, that they have come this far, or why they have not. A process that is at work
gives a sign of life every now and then; one without is gone.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

ABSENT = (
    "Process {mine} of {size} has called lnp and waited {timeout:g} s for process {other}, which has not: nothing was "
    "measured. Expected the same call in all processes of the group. Call it in each of them, pass group=None to "
    "measure this process alone, or group=lnp_torch.Group(timeout=...) to wait longer."
)
GONE = (
    "Process {other} of {size} has given no sign of life for {timeout:g} s while lnp measured: it was killed, or is "
    "stuck. Nothing was measured in the others."
)
FAILED = "lnp failed in process {other} of {size}, and so there is no result in any: {reason}"
LOST = "The store over which the processes meet cannot be reached ({}): the process that holds it is gone."
BROKEN = "A collective operation of lnp's failed, as it does where another process of the group has ended."
PAUSE = 0.002
"""Seconds between looks into the store, in the beginning."""
LONGEST = 0.05

_CALLS: dict[str, int] = {}
"""{group: measurements that all of its processes have begun}."""


class Gone(RuntimeError):
    """Another process did not come, or is not there any more: no collective operation can end."""


class FailedElsewhere(RuntimeError):
    """Another process has failed, and has told all of them."""


class Meeting:
    """One measurement of several processes: what they tell each other.

    Parameters
    ----------
    name, ranks:
        The group's, by which its processes find each other.
    rank:
        This process in the group.
    timeout:
        Seconds without a sign of life after which a process is taken to be gone.
    """

    def __init__(self, name: str, ranks: Sequence[int], rank: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, len(ranks), timeout
        self._name = f"lnp/{name}/{'.'.join(map(str, ranks))}"
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._call = _CALLS.get(self._name, 0)
        self._written: list[str] = []
        self._seen: dict[int, tuple[str, float]] = {}

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around the measurement: begins when all have come, and tells the others of an error."""
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beating.start()
        try:
            self._begin()
            try:
                yield
            except FailedElsewhere:
                raise
            except BaseException as error:
                self.tell(error)
                raise
            self._leave()
        finally:
            stop.set()
            beating.join()

    def exchange(self, point: str, value: Any) -> list[Any]:
        """The values of all processes at a point that each of them comes to, by rank.

        Raises
        ------
        RuntimeError
            Where another process has failed, or gives no sign of life.
        """
        self._set(point, ("value", value))
        return self._collect(point, GONE)

    def tell(self, error: BaseException) -> None:
        """Tell the others why this process goes no further."""
        with contextlib.suppress(RuntimeError):  # the store is gone as well
            self._set("failed", ("error", f"{type(error).__name__}: {error}"))

    def watch(self, failures: bool = True) -> None:
        """Raise RuntimeError if another process is gone, or has failed."""
        for other in range(self.size):
            if other != self.rank:
                self._look(other, GONE, failures)

    def _begin(self) -> None:
        """Wait until all processes have called; forget that this one has where another does not come."""
        try:
            self._set("begin", ("value", None))
            self._collect("begin", ABSENT)
        except BaseException:
            self._forget(self._call)
            raise
        _CALLS[self._name] = self._call + 1
        self._forget(self._call - 1)  # all others have read it, for they have begun this one

    def _leave(self) -> None:
        """The first process, which may hold the store and end its program now, stays until the others have read all."""
        with contextlib.suppress(RuntimeError):  # there is a result
            self._set("left", ("value", None))
            if dist.get_rank() == 0:
                self._collect("left", GONE)

    def _collect(self, point: str, gone: str) -> list[Any]:
        found: dict[int, Any] = {}
        pause, now = PAUSE, time.monotonic()
        self._seen = {other: (self._seen.get(other, ("", now))[0], now) for other in range(self.size)}
        while len(found) < self.size:
            for other in range(self.size):
                if other not in found and self._has(self._key(point, other)):
                    found[other] = self._get(self._key(point, other))[1]
                elif other not in found and other != self.rank:
                    try:
                        self._look(other, gone)
                    except FailedElsewhere:
                        if not self._has(self._key(point, other)):  # else it came this far before it failed
                            raise
            if len(found) < self.size:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)
        return [found[rank] for rank in range(self.size)]

    def _look(self, other: int, gone: str, failures: bool = True) -> None:
        """Raise RuntimeError if a process has failed, or its signs of life have ended."""
        names = {"other": other, "mine": self.rank, "size": self.size, "timeout": self.timeout}
        if failures and self._has(self._key("failed", other)):
            raise FailedElsewhere(FAILED.format(**names, reason=self._get(self._key("failed", other))[1]))
        key = self._key("alive", other)
        beat = repr(self._get(key)) if self._has(key) else ""
        before, since = self._seen.get(other, ("", time.monotonic()))
        if beat != before:
            self._seen[other] = beat, time.monotonic()
        elif time.monotonic() - since > self.timeout:
            raise Gone(gone.format(**names))

    def _beat(self, stop: threading.Event) -> None:
        """A sign of life, again and again, also while the measurement computes."""
        beats = 0
        with contextlib.suppress(RuntimeError):  # where the store is gone the measurement finds out
            while not stop.wait(0 if beats == 0 else min(1.0, self.timeout / 10)):
                beats += 1
                self._set("alive", beats)

    def _key(self, point: str, rank: int, call: int | None = None) -> str:
        return f"{self._name}/{self._call if call is None else call}/{point}/{rank}"

    def _set(self, point: str, value: Any) -> None:
        key = self._key(point, self.rank)
        with _reached():
            self._store.set(key, pickle.dumps(value))
        if point not in self._written:
            self._written.append(point)

    def _has(self, key: str) -> bool:
        with _reached():
            return self._store.check([key])

    def _get(self, key: str) -> Any:
        with _reached():
            return pickle.loads(self._store.get(key))

    def _forget(self, call: int) -> None:
        """Take this process's keys of a measurement out of the store, where it can."""
        for point in _POINTS:
            with contextlib.suppress(RuntimeError, NotImplementedError):
                self._store.delete_key(self._key(point, self.rank, call))


_POINTS = ("begin", "alive", "measured", "compared", "parts", "left")
"""Of a measurement; an error stays, for those that come late."""


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Errors of the store as one sentence."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise Gone(LOST.format(str(error).splitlines()[0] if str(error) else type(error).__name__)) from error


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Around the end of a collective operation: the errors of a broken connection as one sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, Gone):
        raise
    except RuntimeError as error:
        raise Gone(BROKEN) from error
