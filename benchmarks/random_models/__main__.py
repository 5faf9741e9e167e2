"""Models drawn at random, measured by lnp and by the plain framework, one sample at a time.

    python benchmarks/random_models torch --seed 0 --count 60
    python benchmarks/random_models flax --count 40
    KERAS_BACKEND=tensorflow python benchmarks/random_models keras --count 40

Of each model the rate of a plain training step and the squared norms of single samples' gradients, for a random
cotangent, are held against lnp's. A model is

    right     the numbers agree
    noted     they agree, and lnp says that the samples were not taken apart, or that it measures something else
    refused   lnp raises one of its own errors
    crashed   something else is raised
    wrong     they do not agree, and no note says why

What a family cannot build from its drawn settings is drawn anew and not counted. Where PyTorch's numbers do not agree
in float32, float64 decides: its own batch may differ from its samples by rounding. The table goes to
`results/random_models_<family>_<seed>.md`.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = {"torch": "torch_models", "flax": "flax_models", "keras": "keras_models"}


def main() -> int:
    """Draw, compare, print, write; exit code 1 if a number was wrong, or a model crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the name of the sources that are drawn from")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    family = importlib.import_module(FAMILIES[options.family])
    rows, start = [], time.time()
    for name, compare in family.drawn(options.seed, options.only):
        try:
            found, said = compare()
        except family.NotBuilt:
            continue
        except Exception as error:
            found, said = "crashed", f"{type(error).__name__}: {str(error)[:200]}"
        rows.append((found, name, said))
        print(f"{found:8} {name:60} {said}", flush=True)
        if len(rows) == options.count:
            break
    counts = collections.Counter(found for found, _, _ in rows)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("right", "noted", "refused", "crashed", "wrong"))
    print(f"{len(rows)} models: {summary}; {time.time() - start:.0f} s")
    if options.write:
        command = f"python benchmarks/random_models {options.family} --seed {options.seed} --count {options.count}"
        command += f" --only {options.only}" * bool(options.only)
        path = HERE.parent / "results" / f"random_models_{options.family}_{options.seed}.md"
        write(path, command, summary, rows, family.VERSIONS)
    return 1 if counts["wrong"] or counts["crashed"] else 0


def write(path: Path, command: str, summary: str, rows: list[tuple], versions: dict[str, str]) -> None:
    """The table as Markdown."""
    releases = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"# {len(rows)} models drawn at random: {summary}",
        f"`{command}` on Python {platform.python_version()}, {releases}.",
        "| | model | what lnp says |\n|---|---|---|\n"
        + "\n".join(f"| {found} | {name} | {said.replace('|', '/')} |" for found, name, said in rows),
    ]
    path.write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
