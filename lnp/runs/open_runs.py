"""From what users call runs (histories, trackers, files, folders) to histories with names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lnp.printable import printable
from lnp.tracking.history import History

if TYPE_CHECKING:
    from lnp.tracking.tracker import Tracker

Runs = Mapping[str, History]
"""{name: history}."""
RunSource: TypeAlias = "History | Tracker | str | os.PathLike[str]"
"""One run: a history, a tracker, a tracker's file; or a folder of such files."""
RunSources: TypeAlias = "RunSource | Iterable[RunSource] | Mapping[str, RunSource]"
"""One run or several."""


def open_runs(runs: RunSources) -> dict[str, History]:
    """{name: history} from a history, a tracker, a path, a folder, a list of these, or a dictionary of them.

    A folder stands for the `.jsonl` files in it. Names are those of the files, without what they share.

    Raises
    ------
    TypeError
        For anything else.
    OSError
        For a path at which there is nothing, or a folder without histories.
    """
    if isinstance(runs, Mapping):
        return {printable(str(name)): _history(run) for name, run in runs.items()}
    listed = list(runs) if isinstance(runs, Iterable) and not isinstance(runs, str | History) else [runs]
    flat: list[Any] = []
    for run in listed:
        flat += _files(Path(run)) if isinstance(run, str | os.PathLike) else [run]
    names = iter(_names([item for item in flat if isinstance(item, Path)]))
    return {next(names) if isinstance(run, Path) else f"run {i}": _history(run) for i, run in enumerate(flat)}


def named_files(paths: Iterable[str | os.PathLike]) -> dict[str, Path]:
    """{name: file} from files and folders."""
    files = [file for path in paths for file in _files(Path(path))]
    return dict(zip(_names(files), files, strict=True))


def _history(run: RunSource) -> History:
    """The history of one run, read from its file if it is a path; a TypeError for what is no run."""
    if isinstance(run, History):
        return run
    if isinstance(run, str | os.PathLike):
        return History.read(run)
    if isinstance(getattr(run, "history", None), History):
        return run.history
    raise TypeError(
        f"A run is of type {type(run).__name__}. Expected a History, a Tracker, the path of a tracker's file, or a "
        "folder of such files."
    )


def _files(path: Path) -> list[Path]:
    """The file itself, or the trackers' files of a folder; an error if it has none."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {printable(path)}. Expected the file that a tracker wrote, or a folder.")
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"), key=_natural_key)
    if not files:
        raise FileNotFoundError(f"{printable(path)} holds no .jsonl file. Expected the files that trackers write.")
    return files


def _natural_key(path: Path) -> tuple[int | str, ...]:
    """Sorts as people count: width-8 before width-16."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name))


def _names(paths: list[Path]) -> list[str]:
    """The files' names, as a terminal may show them; with their folders, as many as it takes, where two would be
    equal.
    """
    if len({path.stem for path in paths}) == len(paths):
        return [printable(path.stem) for path in paths]
    parts = [path.resolve().with_suffix("").parts for path in paths]
    for depth in range(2, max(map(len, parts))):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return list(map(printable, names))
    return list(map(printable, paths))
