r"""Frozen features stall, feature learning sustains.

The paper claims that a network that learns features keeps its speed as learning moves into the tail, because its
network scale chi_net rises while chi_pos falls; a network whose features are frozen has a fixed kernel, cannot make up
for the falling position, and stalls.

This study trains two students of one width on the labels of a random teacher, one in all its layers and one in its last
layer alone, from the same weights, on the same samples, each at its own best learning rate
(`python 04_frozen_features.py tune`, with a seed that is not used again). Of the frozen one, the kernel is that of the
layer that learns. Compared are the net rate, at which the loss on held-out samples really falls, and its three factors
at averaged weights; the last of them is the net position.
"""

import sys

import numpy as np
import torch
from descent import watched
from shared import plt, positive, save, schedule
from teacher import student

WIDTH, SEEDS, STEPS = 128, 3, 2000
POINTS = schedule(STEPS, 14)[3:]
RATES = {"all layers": 0.8, "last layer alone": 3.2}
"""The best learning rate of each."""
LADDER = (0.4, 0.8, 1.6, 3.2, 6.4)


def network(kind, seed):
    """A student, of which all layers or the last one can be trained."""
    model = student(WIDTH, seed)
    if kind != "all layers":
        model[:4].requires_grad_(False)
    return model


def tune():
    """The loss at averaged weights after each of the learning rates."""
    for kind in RATES:
        ends = {rate: watched(network(kind, 100), 100, rate, [STEPS]).averaged[0].loss for rate in LADDER}
        print(kind, {rate: round(loss, 4) for rate, loss in ends.items()}, flush=True)


def read(run):
    """{what: values at the points} of one run; what is net is that since the point before."""
    return {
        "loss": run.net["loss"],
        "net rate": run.net["net/rate"],
        "$\\chi_{loss}$": run.net["chi_loss"],
        "$\\chi_{net}$": run.net["chi_net"],
        "net position": run.net["net/chi_pos"],
        "averaged": [d.population.chi_pos for d in run.averaged],
        "of the moment": [d.population.chi_pos for d in run.moment],
    }


def main():
    """Train both, compare, draw."""
    torch.set_num_threads(1)
    figure, grid = plt.subplots(2, 3, figsize=(10.5, 6))
    axes = dict(zip(read_names(), grid.flat, strict=False))
    steps = np.array(POINTS)
    between = np.sqrt(steps * np.r_[np.nan, steps[:-1]])
    for kind, color in (("all layers", "C0"), ("last layer alone", "C3")):
        runs = [read(watched(network(kind, seed), seed, RATES[kind], POINTS)) for seed in range(SEEDS)]
        print(f"{kind}, learning rate {RATES[kind]}")
        for what in runs[0]:
            curves = np.array([run[what] for run in runs])
            mean, error = curves.mean(axis=0), curves.std(axis=0, ddof=1) / SEEDS**0.5
            at = between if what.startswith("net") else steps
            told = [f"{s:.0f}: {m:.3g} ± {e:.1g}" for s, m, e in zip(at, mean, error, strict=True)]
            print(f"  {what:14} {', '.join(told[1::2])}", flush=True)
            if what in axes:
                positive(axes[what], at, mean, error, color=color, label=kind)
            else:
                axis, style = grid[1, 2], {"averaged": "-", "of the moment": ":"}[what]
                positive(axis, at, mean, error, color=color, ls=style, label=f"{kind}, {what}")
    finish(grid, axes)
    save(figure, "04_frozen_features")


def read_names():
    """What has a panel of its own."""
    return ("loss", "net rate", "$\\chi_{loss}$", "$\\chi_{net}$", "net position")


def finish(grid, axes):
    """Titles, scales, legends."""
    for title, axis in (*axes.items(), ("$\\chi_{pos}$ of the population, by weights", grid[1, 2])):
        axis.set(xscale="log", yscale="log", xlabel="step", title=title)
    grid[1, 2].set_ylim(grid[1, 1].get_ylim())
    grid[0, 0].legend()
    grid[1, 2].legend()


if __name__ == "__main__":
    tune() if "tune" in sys.argv else main()
