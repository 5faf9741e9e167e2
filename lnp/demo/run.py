"""Trains the ladder, measures along the way, and writes what was seen."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lnp
from lnp.demo import data

Row = dict[str, Any]
FRAMEWORKS = ("jax", "torch")


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Attributes
    ----------
    framework:
        "jax", "torch", or None for the first that is installed.
    widths:
        Hidden units of the ladder's networks.
    frozen:
        Width of the network whose hidden layer stays as it was drawn.
    steps, batch, learning_rate:
        Of the gradient descent.
    measured:
        New images in each measurement.
    points:
        Measurements along a run, spaced evenly in the logarithm of the step.
    seeds:
        Repetitions with other weights and other data, for the error bands.
    """

    framework: str | None = None
    widths: tuple[int, ...] = (16, 64, 256)
    frozen: int = 64
    steps: int = 300
    batch: int = 256
    learning_rate: float = 0.1
    measured: int = 1024
    points: int = 20
    seeds: int = 3

    @property
    def runs(self) -> list[tuple[int, bool]]:
        """(width, frozen) of each run."""
        return [(width, False) for width in self.widths] + [(self.frozen, True)]

    @property
    def schedule(self) -> list[int]:
        """The steps after which is measured, 0 included."""
        spaced = np.geomspace(1, self.steps, self.points).round().astype(int)
        return [0, *sorted(set(spaced.tolist()))]


def chosen(framework: str | None) -> str:
    """The framework asked for, else the first one installed."""
    if framework is not None:
        if importlib.util.find_spec(framework) is None:
            raise ImportError(
                f"The demo was asked to use {framework}, which is not installed. Run: pip install 'lnp[{framework}]'"
            )
        return framework
    for name in FRAMEWORKS:
        if importlib.util.find_spec(name) is not None:
            return name
    raise ImportError(
        "The demo needs a framework, and neither JAX nor PyTorch is installed. Run: pip install 'lnp[demo,jax]'"
    )


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Train and measure everything; one row per measurement. `progress` is called with a text before each."""
    trainers = importlib.import_module(f"{lnp.load(chosen(settings.framework)).__name__}.demo")
    images, labels = data.digits()
    rows: list[Row] = []
    for seed in range(settings.seeds):
        generator = np.random.default_rng(seed)
        drawn = data.draw(images, labels, settings.steps * settings.batch, generator)
        stream = tuple(part.reshape(settings.steps, settings.batch, *part.shape[1:]) for part in drawn)
        probes = [data.draw(images, labels, settings.measured, generator) for _ in settings.schedule]
        for width, frozen in settings.runs:
            weights = data.network(width, np.random.default_rng((seed, width)))
            trainer = trainers.Trainer(weights, stream, settings.learning_rate, frozen)
            run_of = {"network": name(width, frozen), "width": width, "frozen": frozen, "seed": seed}
            rows += [run_of | row for row in _watched(trainer, settings, probes, frozen, progress)]
    return rows


def _watched(trainer: Any, settings: Settings, probes: list, frozen: bool, progress: Callable) -> Iterator[Row]:
    """Train one network, and measure it at the scheduled steps."""
    done = 0
    parameters = "1.*" if frozen else None
    for step, batch in zip(settings.schedule, probes, strict=True):
        progress(f"step {step}")
        trainer.train(done, step)
        done = step
        d = lnp.decompose(trainer.model, trainer.arrays(batch), parameters=parameters, population=True)
        yield {"step": step, "parameters": trainer.trained, **d.to_dict()}


def name(width: int, frozen: bool) -> str:
    """Of a run, as tables and figures show it."""
    return f"{width} units" if not frozen else f"{width} frozen"


def write_csv(rows: list[Row], path: Path) -> None:
    """The history, one line per measurement."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_runs(rows: list[Row], folder: Path) -> None:
    """A file for each run, as trackers write them: for `lnp plot` and `lnp compare`."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(f"{row['network'].replace(' ', '-')}-seed-{row['seed']}", []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for run, own in runs.items():
        lnp.History(own).to_jsonl(folder / f"{run}.jsonl")
