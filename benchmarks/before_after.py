"""What a change costs: measurements by an earlier revision and by this one, in turn in one process.

    python benchmarks/before_after.py REVISION {torch,jax,tensorflow} [--models mlp,cnn,lm] [--rounds 15]

The earlier revision is taken from git and loaded beside this one under other package names. Times are medians of ratios
to a training step's loss and gradient in the same round; `first call` is what the first measurement took, in seconds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import report

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "jax", "tensorflow")
BACKENDS = ("numpy", "torch", "jax", "tensorflow", "keras")
NAMES = re.compile(r"\blnp(_(?:numpy|torch|jax|tensorflow|keras))?\b")
WAYS: dict[str, dict[str, Any]] = {
    "1%": {"population": False},
    "1%, with the population": {},
    "exact": {"estimator": "exact", "population": False},
}


def earlier(revision: str, folder: Path) -> ModuleType:
    """The core of a revision, imported as `before_lnp`."""
    archive = subprocess.run(["git", "archive", revision, "lnp", "backends"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    packages = {"lnp": folder / "lnp", **{f"lnp_{name}": folder / "backends" / f"lnp_{name}" for name in BACKENDS}}
    for name, path in packages.items():
        path.rename(folder / f"before_{name}")
    for path in folder.rglob("*.py"):
        path.write_text(NAMES.sub(r"before_lnp\1", path.read_text(encoding="utf-8")), encoding="utf-8")
    described = folder / "before_lnp-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: before_lnp\nVersion: 0\n")
    entries = "\n".join(f"{name} = before_lnp_{name}" for name in BACKENDS)
    (described / "entry_points.txt").write_text(f"[before_lnp.backends]\n{entries}\n")
    sys.path.insert(0, str(folder))
    return importlib.import_module("before_lnp")


def problem(framework: str, name: str) -> tuple[Any, Any, Callable[[], Any]]:
    """(model, batch, a training step) of the framework's own benchmark."""
    benchmark = importlib.import_module(f"{framework}_benchmark")
    if framework == "torch":
        model, batch = benchmark.made(name)
        return model, batch, benchmark.cases_of(name, model, batch)["step"]
    if framework == "tensorflow":
        make = next(make for title, make in benchmark.MODELS.items() if name in title.lower())
        model, batch = make()
        return model, batch, benchmark.step_of(model, batch)
    import jax

    p = benchmark.MODELS[name]()
    step, key = jax.jit(benchmark.step(p)), jax.random.key(0)
    return (p.apply, p.parameters), p.batch, lambda: jax.block_until_ready(step(p.parameters, p.batch, key))


def compared(framework: str, name: str, before: ModuleType, rounds: int) -> list[dict[str, Any]]:
    """One row for each way to measure a model."""
    now = importlib.import_module("lnp")
    model, batch, step = problem(framework, name)
    cases: dict[str, Callable[[], Any]] = {"step": step}
    first: dict[str, float] = {}
    for (when, core), (way, options) in itertools.product({"before": before, "now": now}.items(), WAYS.items()):
        if way == "exact" and name == "lm":
            continue
        seeds = itertools.count()  # what 1% asks for depends on the signs
        case = f"{way} {when}"
        cases[case] = lambda core=core, options=options, seeds=seeds: core.decompose(
            model, batch, seed=next(seeds), **options
        )
        start = time.perf_counter()
        cases[case]()
        first[case] = time.perf_counter() - start
    seconds = report.interleaved(cases, rounds, warmup=2)
    to_step = report.ratios(seconds, "step")
    rows = []
    for way in WAYS:
        if f"{way} now" in cases:
            old, new = f"{way} before", f"{way} now"
            rows.append({
                "model": name, "case": way, "before": to_step[old], "now": to_step[new],
                "now / before": report.ratios(seconds, old)[new],
                "first call before, s": first[old], "first call now, s": first[new],
            })  # fmt: skip
    return rows


def main() -> None:
    """Compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--models", default="mlp,cnn,lm")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    importlib.import_module(arguments.framework)
    with tempfile.TemporaryDirectory() as folder:
        before = earlier(arguments.revision, Path(folder))
        rows = [
            row
            for name in arguments.models.split(",")
            for row in compared(arguments.framework, name, before, arguments.rounds)
        ]
    print(report.table(rows))
    report.write(
        f"before_after_{arguments.framework}",
        {
            "title": f"{arguments.framework}: {arguments.revision} and now",
            "machine": report.machine(),
            "tables": {"In training steps": rows},
        },
    )


if __name__ == "__main__":
    main()
