"""README.md's Python blocks as a user's own code, held against lnp's types: `python typed_examples.py FOLDER`.

Writes a program for each framework into the folder, and runs mypy --strict and pyright on them. Functions without types
of their own are the reader's affair; that lnp answers with types is what is looked at: `MISTAKES` have to be seen.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

FRAMEWORKS = ("numpy", "torch", "jax", "tensorflow", "keras")
CHECKERS = (
    ("mypy", "--strict", "--allow-untyped-defs", "--allow-untyped-calls", "--ignore-missing-imports"),
    ("basedpyright", "--pythonpath", sys.executable),
)
PYRIGHT = {"typeCheckingMode": "standard", "reportMissingImports": False, "reportMissingModuleSource": False}
"""As pyright itself, where no framework is installed."""
RIGHT = """
import lnp

def measured(model: object, batch: object) -> float:
    d = lnp.decompose(model, batch, estimator="exact", by_layer=True)
    position: float = d.chi_pos
    tracker = lnp.Tracker("run.jsonl", 10, rtol=0.1, batch=batch, tags={"width": 3})
    seen = tracker.observe(0, model, batch, epoch=1)
    steps = tracker.history["step"]
    lnp.plot.chi_pos(tracker)
    response: float = lnp.cross_response(model, batch, batch).rate
    return position + response + (0.0 if seen is None or d.population is None else d.population.chi_pos) + len(steps)
"""
MISTAKES = {
    "a misspelt option": "lnp.decompose(model, batch, rtoll=0.1)",
    "an unknown estimator": 'lnp.decompose(model, batch, estimator="exakt")',
    "a number that is none": "position: str = lnp.decompose(model, batch).chi_pos",
    "a misspelt option of the tracker": 'lnp.Tracker("run.jsonl", rtoll=0.1)',
    "a text as a tolerance": 'lnp.Tracker("run.jsonl", rtol="1%")',
    "a name that lnp does not have": "lnp.decomposed(model, batch)",
    "a misspelt value": "lnp.decompose(model, batch).chi_poss",
    "an unknown loss": 'lnp.decompose(model, batch, "crossentropy")',
    "a misspelt option of nested batches": "lnp.decompose_nested(model, batch, rtoll=0.1)",
}


def main(folder: Path) -> int:
    """The number of files that a checker has refused, or has not, otherwise than it should."""
    from test_readme import README, program_of  # found where this file runs as a program, not where it is collected

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    right = {f"readme_{framework}": program_of(README, framework) for framework in FRAMEWORKS} | {"right": RIGHT}
    wrong = {
        f"wrong_{number}": f"import lnp\n\ndef measured(model: object, batch: object) -> None:\n    {mistake}\n"
        for number, mistake in enumerate(MISTAKES.values())
    }
    for name, program in (right | wrong).items():
        (folder / f"{name}.py").write_text(program, encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
    failed = []
    for checker in CHECKERS:
        done = subprocess.run([sys.executable, "-m", *checker, "."], cwd=folder, capture_output=True, text=True)
        refused = set(re.findall(r"(\w+)\.py:\d+.* error: ", done.stdout))
        failed += sorted(refused ^ set(wrong))
        if refused != set(wrong):
            print(
                done.stdout, done.stderr, f"{checker[0]}: expected errors in the files of mistakes, and in no others."
            )
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
