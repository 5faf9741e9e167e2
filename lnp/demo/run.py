"""Trains the ladder, measures along the way, and writes the measurements."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import lnp
from lnp.arguments import Model
from lnp.demo import data
from lnp.tracking import data_frames
from lnp.tracking.history import History

FRAMEWORKS = ("jax", "torch")
TAGS = ("network", "width", "frozen", "seed")
"""What tells one run from another, in every row of its history."""

Ladder = Mapping[str, Sequence[History]]
"""{network: the histories of its seeds}, in the order in which they were run."""


class Trainer(Protocol):
    """One network, trained on a stream of batches in its framework; the module `demo` of a backend has it."""

    @property
    def model(self) -> Model:
        """The model as it is now."""

    @property
    def trained(self) -> int:
        """The number of trained parameters."""

    def arrays(self, batch: tuple) -> tuple:
        """A batch of NumPy arrays as the framework's."""

    def train(self, start: int, stop: int) -> None:
        """Take the steps from `start` up to `stop`."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo.

    Attributes
    ----------
    framework:
        "jax", "torch", or None for the first that is installed.
    widths:
        Hidden units of the ladder's networks.
    frozen:
        Width of the network whose hidden layer stays as it was drawn.
    steps, batch, learning_rate:
        The gradient descent's steps, images in a step, and learning rate.
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
    def schedule(self) -> lnp.schedule.log_windows:
        """When to measure: from step 0 to the last."""
        return lnp.schedule.log_windows((self.points - 1) / math.log10(self.steps), last=self.steps)

    @property
    def measurements(self) -> list[int]:
        """The steps of the schedule."""
        return list(filter(self.schedule, range(self.steps + 1)))


def choose_framework(framework: str | None) -> str:
    """The framework asked for, else the first one installed; an ImportError where it is not installed, or none is."""
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


def run(settings: Settings, folder: Path, advance: Callable[[int], None] = lambda done: None) -> Ladder:
    """Train and measure everything, with a tracker's file in `folder` for each run. `advance(1)` is called after each
    measurement.
    """
    backend: Any = lnp.load(choose_framework(settings.framework))
    trainers = importlib.import_module(f"{backend.__name__}.demo")
    images, labels = data.digits()
    ladder: dict[str, list[History]] = {network_name(*run): [] for run in settings.runs}
    for seed in range(settings.seeds):
        generator = np.random.default_rng(seed)
        drawn = data.draw(images, labels, settings.steps * settings.batch, generator)
        stream = tuple(part.reshape(settings.steps, settings.batch, *part.shape[1:]) for part in drawn)
        new = [data.draw(images, labels, settings.measured, generator) for _ in settings.measurements]
        for width, frozen in settings.runs:
            weights = data.network(width, np.random.default_rng((seed, width)))
            trainer = trainers.Trainer(weights, stream, settings.learning_rate, frozen)
            network = network_name(width, frozen)
            tags = dict(zip(TAGS, (network, width, frozen, seed), strict=True))
            path = folder / f"{network.replace(' ', '-')}-seed-{seed}.jsonl"
            ladder[network].append(train(trainer, settings, new, tags, path, advance))
    return ladder


def train(
    trainer: Trainer,
    settings: Settings,
    new: Sequence[tuple],
    tags: Mapping[str, Any],
    path: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> History:
    """Train one network, and measure it at the scheduled steps, each time on other new images."""
    path.unlink(missing_ok=True)  # a tracker would continue it
    with lnp.Tracker(
        path,
        settings.schedule,
        batch=[trainer.arrays(batch) for batch in new],
        tags={**tags, "parameters": trainer.trained},
        rank=0,
        parameters="1.*" if tags["frozen"] else None,
        population=True,
        on_error="raise",
    ) as tracker:
        done = 0
        for step in settings.measurements:  # the steps between them are one compiled loop in JAX
            trainer.train(done, step)
            tracker.observe(step, trainer.model)
            done = step
            advance(1)
        return tracker.history


def network_name(width: int, frozen: bool) -> str:
    """The name of a network, as tables and figures show it."""
    return f"{width} units" if not frozen else f"{width} frozen"


def write_csv(ladder: Ladder, path: Path) -> None:
    """All runs in one table, one line per measurement."""
    runs = [run for own in ladder.values() for run in own]
    # notes stand in a run's first row only, and not in all runs
    columns = dict.fromkeys((*TAGS, *(column for run in runs for column in run.columns if column != "notes")))
    data_frames.to_csv({column: np.concatenate([run.get(column) for run in runs]) for column in columns}, path)
