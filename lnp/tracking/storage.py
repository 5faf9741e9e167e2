r"""A run's history on disk: JSON Lines, one record per line, appended and never rewritten.

A file holds data only: nothing in it is executed when it is read. Each record is handed to the operating system in one
write to the end of the file. A process that is killed at any moment loses at most the record that it was writing: a
torn last line has no newline, is not read, and is cut off when the file is next written to. That holds for the death of
a process. Against a power failure `fsync=True` waits for the disk after each record, which costs milliseconds; without
it the operating system writes within seconds.

JSON has no numbers for what is not finite: nan and the infinities are written as the strings "NaN", "Infinity" and
"-Infinity", and become numbers again when they are read.

A file has one writer at a time: writing takes a lock that the operating system drops when the process ends, however it
ends. Readers need none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHUNK = 1 << 22
"""Bytes that are read at a time."""
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Record = dict[str, Any]


def encode(record: Mapping[str, Any]) -> bytes:
    r"""A record as one line of JSON.

    >>> encode({"step": 3, "chi_pos": float("nan")})
    b'{"step": 3, "chi_pos": "NaN"}\n'
    """
    values = {name: _json_value(value) for name, value in record.items()}
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _json_value(value: Any) -> str | bool | float | None:
    """The value, or the name of a number that is not finite. Numbers of other libraries become Python's."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    try:
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, int):
            return number
        number = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"A record holds a value of type {type(value).__name__}. Expected numbers, texts, booleans or None. "
            "Turn it into one of these."
        ) from error
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def decode(line: bytes) -> Record:
    """The record of one line; a ValueError for a line that holds none."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"A line holds a {type(record).__name__}. Expected an object.")
    return record


def read(path: str | os.PathLike, report: Callable[[int], None] = lambda done: None) -> Iterator[list[Record]]:
    """The records of a file, many at a time; numbers that are not finite are still texts. `report` is called with the
    bytes that were read.

    A torn last line is left out. Lines in the middle that hold no record, which only a damaged disk or an editor leaves
    behind, are skipped with a warning.
    """
    damaged = 0
    with open(path, "rb") as file:
        rest = b""
        while chunk := file.read(CHUNK):
            block, newline, torn = (rest + chunk).rpartition(b"\n")
            rest = torn
            if not newline:
                continue
            records, bad = _parse(block)
            damaged += bad
            yield records
            report(len(chunk))
    if damaged:
        warnings.warn(f"{path}: {damaged} lines hold no record and were left out", stacklevel=2)


def _parse(block: bytes) -> tuple[list[Record], int]:
    """The records of complete lines, and how many lines held none."""
    count = block.count(b"\n") + 1
    with contextlib.suppress(ValueError):  # a damaged line: one by one
        # one call is several times faster than one per line
        records = parser()("[" + block.replace(b"\n", b",").decode() + "]")
        if len(records) == count and all(type(record) is dict for record in records):
            return records, 0
    records = []
    lines = [line for line in block.split(b"\n") if line]
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(decode(line))
    return records, len(lines) - len(records)


def parser() -> Callable[[str], Any]:
    """Python's JSON parser, or orjson where it is installed: a million records open in half the time."""
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads


class Appender:
    """A file that records are appended to, locked against other writers until it is closed.

    Raises
    ------
    BlockingIOError
        If another tracker, in this process or another, is writing to the file.
    """

    def __init__(self, path: str | os.PathLike, fsync: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        binary = getattr(os, "O_BINARY", 0)  # on Windows, where text would get other line ends
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
        self._fsync = fsync
        self._process = os.getpid()
        try:
            self._lock()
            os.ftruncate(self._file, _end_of_lines(self._file))  # a record that a killed process left torn
        except BaseException:
            os.close(self._file)
            raise

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
                f"{self.path} was opened by another process, of which this one is a copy. Expected one writer. Make a "
                "tracker with a file of its own in each process."
            )
        line = encode(record)
        size = os.fstat(self._file).st_size
        if os.write(self._file, line) != len(line):  # a full disk takes a part without an error
            os.ftruncate(self._file, size)
            raise OSError(errno.ENOSPC, f"{self.path} could not take the whole record: is the disk full?")
        if self._fsync:
            os.fsync(self._file)

    def close(self) -> None:
        """Wait for the disk, and let others write."""
        if self._file >= 0 and os.getpid() == self._process:
            os.fsync(self._file)
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _lock(self) -> None:
        """Lock the file against other writers, without waiting; the operating system ends the lock with the process."""
        try:
            if sys.platform == "win32":
                import msvcrt

                os.lseek(self._file, 1 << 62, os.SEEK_SET)  # far behind the data: others may read those
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                warnings.warn(f"{self.path}: this file system has no locks; see to it that one tracker writes here",
                              stacklevel=4)  # fmt: skip
                return
            raise BlockingIOError(
                errno.EAGAIN,
                f"{self.path} is being written to by another tracker. Expected a file of its own for each run and "
                "process. Choose another path, or end the other run",
            ) from error


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
