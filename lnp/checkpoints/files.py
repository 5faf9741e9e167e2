"""The files of a checkpoint: what can be read to an end, and what is no larger than it says."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lnp.printable import printable

LARGE = 2**32
"""Bytes of arrays from which on they are held against their files."""
MOST = 1000
"""How many times as large as their files arrays may be: those that compress well are never that much larger."""


def files_of(path: Path) -> list[tuple[str, int, int]]:
    """(Name, size, time) of each file of a checkpoint, in order; links are followed, in circles once.

    Raises
    ------
    OSError
        For a checkpoint that is gone, and for what is no file, such as a pipe, which would never end.
    """
    several = [] if path.exists() else path.parent.glob(path.name + ".*")  # as TensorFlow has
    found = _inside(path) if path.is_dir() else [path] if path.exists() else [*several]
    if not found:
        raise FileNotFoundError(f"{printable(path)} is gone. Expected a checkpoint.")
    listed = []
    for file in sorted(found):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{printable(file)} is a pipe, a socket or a device. Expected files in a checkpoint.")
        listed.append((file.relative_to(path.parent).as_posix(), status.st_size, status.st_mtime_ns))
    return listed


def refuse_claims(path: Path, claimed: int) -> None:
    """A ValueError where a checkpoint says that its arrays take far more bytes than its files could hold: a library
    would make room for them before it looks.
    """
    stored = sum(size for _, size, _ in files_of(path))
    if claimed > max(LARGE, MOST * stored):
        raise ValueError(
            f"{printable(path)} says that its arrays take {claimed:.1e} bytes, and its files have {stored:,}. Expected "
            "arrays that are in the files. Save it again."
        )


def _inside(folder: Path) -> list[Path]:
    """All files below a folder."""
    found, seen = [], set()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(at) / name for name in names]
    return found
