r"""Do larger models reach further? Position against steps, loss, compute and the number of parameters.

The paper claims that larger models get to lower chi_pos, their spectral reach, while the loss follows a power law in
the number of parameters.

This study trains students of seven widths on labels of a random teacher: new samples at every step, far from solving
the task, each width at its own best learning rate (`python 03_larger_reach_further.py tune` finds it, with a seed that
is not used again). It looks at three positions: the population's at the weights of the moment, the population's at
averaged weights, and the net position, of the rate at which the loss on held-out samples really falls. Three seeds, and
power laws with chi^2, which says whether they describe the points.
"""

import math
import sys

import numpy as np
import torch
from descent import BATCH, watched
from shared import plt, positive, save, schedule, shades
from teacher import student

import lnp
import lnp.plot

RATES = {4: 0.4, 8: 0.4, 16: 0.4, 32: 0.8, 64: 0.8, 128: 0.8, 256: 0.8}
"""The best learning rate of each width."""
LADDER, SEEDS, STEPS, LATE, WINDOW = (0.1, 0.2, 0.4, 0.8, 1.6), 3, 1500, 600, 4
POINTS = [*schedule(LATE, 9)[2:], *range(LATE + 180, STEPS + 1, 180)]
KINDS = {"weights of the moment": "C1", "averaged weights": "C0", "net position": "C3"}
EDGE = 3e-8
"""The lowest position in the figure."""


def tune():
    """The loss at averaged weights after each of the learning rates, for each width."""
    for width in RATES:
        ends = {rate: watched(student(width, 100), 100, rate, [STEPS]).averaged[0].loss for rate in LADDER}
        print(f"width {width:3d}, loss by learning rate: { ({rate: round(loss, 4) for rate, loss in ends.items()}) }")


def positions(run):
    """{kind: (steps, positions, standard errors)}; the net position lies between two measurements."""
    found = {}
    for kind, ds in (("weights of the moment", run.moment), ("averaged weights", run.averaged)):
        found[kind] = [run.steps, *zip(*[(d.population.chi_pos, d.population.chi_pos_stderr) for d in ds], strict=True)]
    middles = np.sqrt(np.multiply(run.steps[1:], run.steps[:-1]))
    found["net position"] = [middles, run.net["net/chi_pos"][1:], run.net["net/chi_pos_stderr"][1:]]
    return found


def reach(steps, values, stderrs):
    """The reach of one run, of its last 60%."""
    late = np.asarray(steps) >= LATE
    return lnp.reach(*(np.asarray(part)[late] for part in (steps, values, stderrs)), window=WINDOW)


def over_seeds(values):
    """(mean, standard error)."""
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def fitted(axis, sizes, values, stderrs=None, *, label, color="C0", **options):
    """The points and the power law through them, drawn and said."""
    law = lnp.power_law(sizes, values, stderrs, **options)
    lnp.plot.power_law(sizes, values, stderrs, axis, label=label, color=color, legend=False, **options)
    print(f"{label}: {law}; chi^2 per degree of freedom {law.chi_square_per_degree:.1f}, R^2 {law.r_squared:.2f}")


def main():
    """Train the ladder, fit, draw."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.6))
    sizes, losses, reaches = [], [], {kind: [] for kind in KINDS}
    for (width, rate), color in zip(RATES.items(), shades(len(RATES)), strict=True):
        runs = [watched(student(width, seed), seed, rate, POINTS) for seed in range(SEEDS)]
        sizes.append(sum(p.numel() for p in student(width, 0).parameters()))
        losses.append(over_seeds([run.net["loss"][-1] for run in runs]))
        of_runs = [positions(run) for run in runs]
        for kind, found in reaches.items():
            found.append(lnp.reach_of_runs([reach(*of_run[kind]) for of_run in of_runs]))
        curves(axes, width, sizes[-1], runs, of_runs, color)
        told = ", ".join(f"{kind} {found[-1]}" for kind, found in reaches.items())
        loss, error = losses[-1]
        print(f"width {width}, {sizes[-1]} parameters: loss {loss:.4f} ± {error:.4f}; reach: {told}", flush=True)
    for kind, color in KINDS.items():
        fitted(axes[1, 1], sizes, reaches[kind], label=kind, color=color)
    fitted(axes[1, 2], sizes, *zip(*losses, strict=True), label="loss", offset=True)
    finish(axes)
    save(figure, "03_larger_reach_further")


def curves(axes, width, size, runs, of_runs, color):
    """One width: the population's position along the steps, the net position against steps, loss and compute."""
    for axis, kind in ((axes[0, 0], "averaged weights"), (axes[0, 1], "net position")):
        mean, error = over_seeds([of_run[kind][1] for of_run in of_runs])
        positive(axis, of_runs[0][kind][0], mean, error, color=color, label=str(width))
    steps, loss = of_runs[0]["net position"][0], np.mean([run.net["loss"] for run in runs], axis=0)
    positive(axes[0, 2], (loss[1:] + loss[:-1]) / 2, mean, error, color=color)
    positive(axes[1, 0], 6 * size * BATCH * steps, mean, error, color=color)
    told = [f"{s:.0f}: {x:.1e} ({y:.3f})" for s, x, y in zip(steps, mean, (loss[1:] + loss[:-1]) / 2, strict=True)]
    print(f"net position at each step (and loss): {', '.join(told)}")


def finish(axes):
    """Titles, scales, legends."""
    titles = (
        ("step", "$\\chi_{pos}$ of the population, averaged weights"), ("step", "net position"),
        ("loss", "net position against loss"), ("compute, $6ND$ (floating-point operations)", "net position"),
        ("parameters", "reach"), ("parameters", "loss, and a power law with an offset"),
    )  # fmt: skip
    for axis, (xlabel, title) in zip(axes.flat, titles, strict=True):
        axis.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
    for axis in (*axes[0], axes[1, 0]):
        axis.set_ylim(EDGE, 1.5e-3)
    for axis, ticks in ((axes[0, 2].xaxis, (0.6, 0.8, 1, 1.5, 2)), (axes[1, 2].yaxis, (0.6, 0.8, 1, 1.2))):
        axis.set_ticks(ticks, [str(x) for x in ticks])
        axis.set_ticks([], minor=True)
    axes[0, 0].legend(ncols=2, loc="lower left", title="width")
    axes[1, 1].set_ylim(1e-8)
    axes[1, 1].legend(loc="lower left")


if __name__ == "__main__":
    tune() if "tune" in sys.argv else main()
