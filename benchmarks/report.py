"""What the benchmarks share: timing of cases in turn, a description of the machine, tables, and files.

Nothing here imports a framework; a benchmark passes callables that block until their result is there.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "numpy", "array-api-compat", "torch", "transformers", "timm", "torchvision", "peft", "jax", "jaxlib", "flax",
    "equinox", "tensorflow", "tensorflow-cpu", "keras",
    "opacus", "backpack-for-pytorch", "nngeometry", "curvlinops-for-pytorch", "neural-tangents", "matfree",
)  # fmt: skip
"""Whose versions are named where they are installed."""


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """{name: seconds of each round}, where every round runs each case once: what slows the machine down meets all.

    Each round starts with another case, so that no case always follows the same one. `warmup` runs of each, which
    compile and fill caches, are not counted.

    >>> sorted(interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)), len(interleaved({"a": int}, 3)["a"])
    (['a', 'b'], 3)
    """
    for case in cases.values():
        for _ in range(warmup):
            case()
    names, seconds = list(cases), {name: [] for name in cases}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                cases[name]()
                seconds[name].append(time.perf_counter() - start)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, float]:
    """{name: median over rounds of its time as a multiple of that of `to` in the same round}.

    >>> ratios({"step": [1.0, 2.0, 1.0], "lnp": [1.5, 3.0, 9.0]}, to="step")
    {'step': 1.0, 'lnp': 1.5}
    """
    return {
        name: median([one / base for one, base in zip(times, seconds[to], strict=True)])
        for name, times in seconds.items()
    }


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def resident_peak(run: Callable[[], Any]) -> int:
    """Peak resident bytes of this process during a call, above those before. Linux only."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and versions. No names of hosts, users or paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; columns in the order in which they first appear, numbers to three digits.

    >>> print(table([{"case": "step", "time": 1.0}, {"case": "lnp", "time": 1.2345, "note": "K=10"}]))
    | case | time | note |
    |---|---|---|
    | step | 1 |  |
    | lnp | 1.23 | K=10 |
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_shown(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def write(name: str, data: Mapping[str, Any], folder: Path = RESULTS) -> tuple[Path, Path]:
    """Write `<name>.json` with everything and `<name>.md` with the tables, and return where they are.

    data["tables"] is {heading: rows}; data["machine"] is described in the Markdown file, and data["notes"], strings,
    are listed under the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(json.dumps(data, indent=1, default=float) + "\n", encoding="utf-8")
    parts = [f"# {data.get('title', name)}"]
    if "machine" in data:
        parts.append(_described(data["machine"]))
    for heading, rows in data.get("tables", {}).items():
        parts.append(f"## {heading}\n\n{table(rows)}")
    if data.get("notes"):
        parts.append("\n".join(f"- {note}" for note in data["notes"]))
    as_markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return as_json, as_markdown


def _described(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}, "
        f"Python {machine['python']}; {versions}."
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
