r"""A run's history on disk: JSON Lines, one record per line, appended and never rewritten.

A file holds data only: nothing in it is executed when it is read. Each record is handed to the operating system in one
write to the end of the file. A process that is killed at any moment loses at most the record that it was writing: a
torn last line is not read, and is cut off when the file is next written to. That holds for the death of a process.
Against a power failure `fsync=True` waits for the disk after each record, which costs milliseconds; without it the
operating system writes within seconds.

A file of something else is refused before a byte of it changes: what a tracker writes to has to be empty, or to hold
lines that a tracker wrote. Other lines between those are left out when the file is read, with one warning.

A file has one writer at a time: writing takes a lock, which ends with the tracker, or else with the process. Readers
need none.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import stat
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lnp.printable import printable
from lnp.tracking.records import Record, decode_all, encode, is_torn, is_tracker_line
from lnp.user_warnings import warn

CHUNK = 1 << 22
"""Bytes that are read at a time."""
QUOTED = 60
"""Characters of a line that an error quotes."""
OPEN: weakref.WeakSet[Appender] = weakref.WeakSet()
"""Those of this process, so that a later one can close an earlier one of the same file."""


def read(path: str | os.PathLike, report: Callable[[int], None] = lambda done: None) -> Iterator[list[Record]]:
    """The records of a file, many at a time, each held against the schema; numbers that are not finite are still
    texts. `report` is called with the bytes that were read.

    A torn last line is left out. Other lines that hold no record, which a damaged disk or an editor leaves behind, are
    left out with one warning.

    Raises
    ------
    OSError
        If there is no such file, and for what is none, such as a pipe.
    ValueError
        If it holds something else than a tracker's lines.
    """
    check_kind(path, os.stat(path).st_mode)
    count, left_out, first, known, sealed = 0, 0, (0, b""), False, False
    with open(path, "rb") as file:
        for block, size in _blocks(file):
            numbered = [(number, line) for number, line in enumerate(block, count + 1) if line.strip()]
            count += len(block)
            records, sealed = decode_all([line for _, line in numbered], sealed)
            bad = [pair for pair, record in zip(numbered, records, strict=True) if record is None]
            first = first if left_out or not bad else bad[0]
            left_out += len(bad)
            known = known or len(bad) < len(numbered) or any(is_tracker_line(line) for _, line in bad)
            yield [record for record in records if record is not None]
            report(size)
    if left_out and not known:
        raise ValueError(
            f"{printable(path)} holds no measurements; line {first[0]} is {first[1][:QUOTED]!r}. Expected a tracker's "
            "file, with steps."
        )
    if left_out:
        warn(
            f"{printable(path)}: {left_out} lines hold no record, or a damaged one, and were left out (of {count}; the "
            f"first is line {first[0]})"
        )


def _blocks(file: IO[bytes]) -> Iterator[tuple[list[bytes], int]]:
    """(Lines, bytes that were read for them), many at a time. A last one without newline is there unless it is torn."""
    pieces: list[bytes] = []
    while chunk := file.read(CHUNK):
        head, newline, tail = chunk.rpartition(b"\n")
        lines = b"".join([*pieces, head]).split(b"\n") if newline else []
        pieces = [tail] if newline else [*pieces, chunk]
        yield lines, len(chunk)
    last = b"".join(pieces)
    if last and not is_torn(last):
        yield [last], 0


def check_kind(path: str | os.PathLike, mode: int) -> None:
    """Raise OSError unless this is the mode of a file of bytes."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
        kind = next((name for holds, name in kinds.items() if holds(mode)), "a device")
        raise OSError(errno.EINVAL, f"{printable(path)} is {kind}. Expected a tracker's file, or a path without one")


class Appender:
    """A file that records are appended to, locked against other writers until it is closed or let go of.

    One of this process that has the file open, as that of a notebook cell's earlier run has, is closed with a warning.

    Raises
    ------
    BlockingIOError
        If another process is writing to the file.
    FileExistsError
        If the file holds something else than a tracker's lines. It is left as it is.
    OSError
        For what is no file: a folder, a pipe, a device, a link to nothing.
    """

    def __init__(self, path: str | os.PathLike, fsync: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists():
            check_kind(path, self.path.stat().st_mode)  # beforehand: opening a pipe waits for its other end
        elif self.path.is_symlink():
            raise OSError(
                errno.ENOENT, f"{printable(path)} is a link to nothing. Expected a file, or a path without one"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        binary = getattr(os, "O_BINARY", 0)  # on Windows, where text would get other line ends
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
        self._fsync = fsync
        self._process = os.getpid()
        self._let_go = weakref.finalize(self, _let_go, self._file, self._process)
        try:
            self._lock()
            self._end_last_line()
        except BaseException:
            self._let_go()
            raise
        OPEN.add(self)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record.

        Raises
        ------
        OSError
            If the file cannot take it, as on a full disk; the file is then as before.
        RuntimeError
            In a process that was forked from the one that opened the file.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{printable(self.path)} was opened by another process, of which this one is a copy. Expected one "
                "writer. Make a tracker with a file of its own in each process."
            )
        if not self._let_go.alive:
            raise RuntimeError(
                f"a later tracker of this process writes to {printable(self.path)} now. Expected a file of its own for "
                "each run."
            )
        line = encode(record)
        size = os.fstat(self._file).st_size
        if os.write(self._file, line) != len(line):  # a full disk takes a part without an error
            os.ftruncate(self._file, size)
            raise OSError(errno.ENOSPC, f"{printable(self.path)} could not take the whole record: is the disk full?")
        if self._fsync:
            os.fsync(self._file)

    def close(self) -> None:
        """Wait for the disk, and let others write."""
        try:
            if self._let_go.alive and os.getpid() == self._process:
                os.fsync(self._file)
        finally:
            self._let_go()

    def _lock(self) -> None:
        """Lock the file against other writers, without waiting."""
        try:
            if not self._locked_after_others():
                warn(f"{printable(self.path)}: this file system has no locks; see to it that one tracker writes here")
        except OSError as error:
            raise BlockingIOError(
                errno.EAGAIN,
                f"{printable(self.path)} is being written to by another tracker. Expected a file of its own for each "
                "run and process. Close the other one, by tracker.close() or `with lnp.Tracker(...) as tracker:`, or "
                "choose another path",
            ) from error

    def _locked_after_others(self) -> bool:
        """`lock`, once more after trackers of this process: those that nobody holds any longer are gone, the one of an
        earlier run of a notebook cell, which keeps what cells return, is closed.
        """
        with contextlib.suppress(OSError):
            return lock(self._file)
        gc.collect()
        with contextlib.suppress(OSError):
            return lock(self._file)
        for other in list(OPEN):
            if other.has(self._file):
                other.close()
                warn(
                    f"{printable(self.path)} was still open in an earlier tracker of this process, as after running a "
                    "notebook cell again. That one writes nothing more. Close a tracker by tracker.close() or "
                    "`with lnp.Tracker(...) as tracker:`"
                )
        return lock(self._file)

    def has(self, file: int) -> bool:
        """Whether this is the same file, held by this process."""
        return self._let_go.alive and self._process == os.getpid() and os.path.sameopenfile(self._file, file)

    def _end_last_line(self) -> None:
        """Refuse a file of something else; cut off the last line if it is torn, and end it if it has no newline."""
        size, end = os.fstat(self._file).st_size, _end_of_lines(self._file)
        with open(self._file, "rb", closefd=False) as file:
            file.seek(end)
            last = file.read()
            torn = is_torn(last)
            file.seek(0)
            if not (end == 0 and torn) and size and not any(is_tracker_line(line.rstrip(b"\n")) for line in file):
                raise FileExistsError(
                    errno.EEXIST,
                    f"{printable(self.path)} holds something else than a tracker's measurements and was left as it is. "
                    "Expected a tracker's file, or a path without one. Choose another path",
                )
        if torn:
            os.ftruncate(self._file, end)
        elif last:
            os.write(self._file, b"\n")


def lock(file: int, wait: bool = False) -> bool:
    """Lock an open file against other processes until it is closed; whether this file system has locks.

    Raises
    ------
    OSError
        If another process holds the lock, and this one is not to wait.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 62, os.SEEK_SET)  # far behind the data: others may read those
            msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        raise
    return True


def _let_go(file: int, process: int) -> None:
    """Close the file, and end the lock, which a forked process with a copy of the descriptor would keep."""
    if os.getpid() == process and sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _end_of_lines(file: int) -> int:
    """The number of bytes up to the end of the last complete line."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(file, start, os.SEEK_SET)
        newline = os.read(file, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
