"""What has been measured of a run's checkpoints: a file for each, from which the history is written anew.

Beside the history `run.jsonl` is a folder `run.jsonl.parts`. It holds one file for each checkpoint that was measured,
written whole or not at all, so that checkpoints can be measured in any order, by several processes, and again after
an interruption. The history is made of these files: their rows in order of the steps, with net rates between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lnp.printable import printable
from lnp.tracking.history import History
from lnp.tracking.learning_rate import Mark
from lnp.tracking.net_rate import Ends
from lnp.tracking.records import encode
from lnp.tracking.storage import check_kind, lock

SETTINGS = "settings.json"
Part = dict[str, Any]
"""What a file holds: the row, its notes, the ends of net rates, and what the checkpoint was known by."""
Rows = Callable[[list[tuple[int, Part]]], list[dict[str, Any]]]


class Results:
    """The files of one run.

    Raises
    ------
    FileExistsError
        If there is a history at this path which was not made of checkpoints. It is left as it is.
    ValueError
        If checkpoints were measured for this path already, of another run or in another way.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, str]) -> None:
        self.path = Path(path)
        self._folder = self.path.with_name(self.path.name + ".parts")
        if self.path.exists() and not (self._folder / SETTINGS).exists():
            check_kind(self.path, self.path.stat().st_mode)
            raise FileExistsError(
                f"{printable(self.path)} was not made of checkpoints, and was left as it is. Expected a path at which "
                "there is no file, or one that measuring checkpoints has written. Choose another path."
            )
        self._next = 0.0
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._alone("settings.lock", wait=True):
            known = _read(self._folder / SETTINGS)
            if known is None:
                _write(self._folder / SETTINGS, dict(settings))
            elif known != dict(settings):
                self._refuse(known, settings)

    def _refuse(self, known: Mapping[str, str], settings: Mapping[str, str]) -> None:
        """The error for a path whose checkpoints were measured in another way."""
        other = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
        values = "; ".join(f"{n}: {known.get(n, 'default')} before, {settings.get(n, 'default')} now" for n in other)
        raise ValueError(
            f"{printable(self.path)} holds checkpoints that were measured with other settings ({printable(values)}). "
            f"Expected the same, to go on. Choose another path, or delete {printable(self.path)} and "
            f"{printable(self._folder)}."
        )

    def part(self, step: int, stamp: str) -> Part | None:
        """What was measured at this step; None if nothing was, or the checkpoint has changed since."""
        part = _read(self._folder / f"{step}.json")
        return part if part is not None and part["stamp"] == stamp else None

    def keep(self, step: int, part: Part) -> None:
        """Keep what was measured at a step."""
        _write(self._folder / f"{step}.json", {**part, "ends": asdict(part["ends"])})

    def forget(self, step: int) -> None:
        """Remove what was measured of a checkpoint that has changed since."""
        (self._folder / f"{step}.json").unlink(missing_ok=True)

    def claim(self, step: int) -> contextlib.AbstractContextManager[bool]:
        """A context whose value is whether this process may measure the step: no other one is at it."""
        return self._alone(f"{step}.lock", wait=False)

    def write_history(self, rows: Rows, in_time: bool = False) -> History | None:
        """Write the history that `rows` makes of [(step, part)] in order of the steps, and return it.

        `in_time` leaves it for later where writing would take more than a twentieth of the time.
        """
        started = time.perf_counter()
        if in_time and started < self._next:
            return None
        with self._alone("history.lock", wait=True):  # what one process reads, no other has written less of since
            steps = sorted(int(file.stem) for file in self._folder.glob("*.json") if file.stem.isdecimal())
            read = ((step, _read(self._folder / f"{step}.json")) for step in steps)
            history = History(rows([(step, _with_ends(part)) for step, part in read if part is not None]))
            _replace(self.path, b"".join(encode(row) for row in history.rows()))
        ended = time.perf_counter()
        self._next = ended + 20 * (ended - started)
        return history

    @contextlib.contextmanager
    def _alone(self, name: str, wait: bool) -> Iterator[bool]:
        """Around what one process does at a time: whether this one may, which without waiting is false where another
        does. A lock ends with its process, however that ends.
        """
        file = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                lock(file, wait)
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(file)


def _with_ends(part: Part) -> Part:
    """A part as it was before it was written."""
    ends = part["ends"]
    return {**part, "ends": Ends(**{**ends, "mark": Mark(*ends["mark"])})}


def _write(path: Path, value: Any) -> None:
    """Write JSON with its checksum, whole or not at all."""
    text = json.dumps(value).encode()
    _replace(path, b"%08x %b\n" % (zlib.crc32(text), text))


def _read(path: Path) -> Any:
    """What `_write` has written; None for no file, and for one that a disk has damaged."""
    try:
        digits, _, text = path.read_bytes().rstrip(b"\n").partition(b" ")
    except FileNotFoundError:
        return None
    return json.loads(text) if digits == b"%08x" % zlib.crc32(text) else None


def _replace(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, in the place of one that may be there."""
    written = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(written, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
