r"""Frozen features stall, feature learning sustains.

The paper claims that a network that learns features keeps its speed as learning moves into the tail, because its
network scale chi_net rises while chi_pos falls; a network whose features are frozen has a fixed kernel, cannot make up
for the falling position, and stalls.

This study trains two students of one width on the labels of a random teacher, one in all its layers and one in its last
layer alone, from the same weights and on the same samples. Of the frozen one, the kernel is that of the layer that
learns.
"""

import math

import numpy as np
import torch
from shared import plt, positive, save, schedule
from teacher import Teacher, loss_of, student

import lnp

WIDTH, SEEDS, STEPS, BATCH, RATE, MEASURED = 128, 3, 3000, 256, 0.3, 4096
LAST = "4.*"
"""The parameters of the last layer."""


def run(frozen, seed):
    """[(step, Decomposition)] along plain gradient descent."""
    teacher, generator = Teacher(), torch.Generator().manual_seed(seed)
    model = student(WIDTH, seed)
    trained = list(model[4].parameters()) if frozen else list(model.parameters())
    optimizer = torch.optim.SGD(trained, RATE)
    points, found = schedule(STEPS, 16), []
    for step in range(STEPS + 1):
        if step in points:
            batch = teacher.draw(MEASURED, generator)
            d = lnp.decompose(model, batch, population=True, parameters=LAST if frozen else None, seed=step)
            found.append((step, d))
        optimizer.zero_grad()
        loss_of(model, teacher.draw(BATCH, generator)).backward()
        optimizer.step()
    return found


def main():
    """Train both, compare, draw."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2))
    read = {
        "loss": lambda d: d.loss,
        "rate of the population": lambda d: d.population.rate,
        "$\\chi_{net}$": lambda d: d.chi_net,
        "$\\chi_{pos}$ of the population": lambda d: d.population.chi_pos,
    }
    for name, frozen, color in (("all layers", False, "C0"), ("last layer alone", True, "C3")):
        runs = [run(frozen, seed) for seed in range(SEEDS)]
        steps = [max(step, 0.7) for step, _ in runs[0]]
        ends = {}
        for axis, (what, value) in zip(axes, read.items(), strict=True):
            curves = np.array([[value(d) for _, d in found] for found in runs])
            mean, error = curves.mean(axis=0), curves.std(axis=0, ddof=1) / math.sqrt(SEEDS)
            positive(axis, steps, mean, error, color=color, label=name)
            axis.set(xscale="log", yscale="log", xlabel="step", title=what)
            ends[what] = (mean[0], mean[-1], error[-1])
        print(name)
        for what, (first, last, error) in ends.items():
            print(f"  {what:32} {first:9.3g} -> {last:9.3g} ± {error:.1g}, x {last / first:.3g}")
    axes[0].legend()
    save(figure, "04_frozen_features")


if __name__ == "__main__":
    main()
