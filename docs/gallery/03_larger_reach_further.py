r"""Larger models reach further: loss and spectral reach against the number of parameters.

The paper claims that larger models get to lower chi_pos, their spectral reach, while the loss follows a power law in
the number of parameters.

This study trains students of seven widths, from 4 to 256, with plain gradient descent and one learning rate, on labels
of a random teacher: new samples at every step, so that there is no noise of a finite data set to learn. Reach is
`lnp.reach` of the population's position, measured on 4096 new samples; the power laws are weighted fits over three
seeds.
"""

import math

import numpy as np
import torch
from shared import plt, positive, save, schedule, shades
from teacher import Teacher, loss_of, student

import lnp

WIDTHS, SEEDS, STEPS, BATCH, RATE, MEASURED, WINDOW = (4, 8, 16, 32, 64, 128, 256), 3, 1500, 256, 0.1, 4096, 4


def run(width, seed):
    """(number of parameters, [(step, Decomposition)])."""
    teacher, generator = Teacher(), torch.Generator().manual_seed(seed)
    model = student(width, seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    points, found = schedule(STEPS, 14), []
    for step in range(STEPS + 1):
        if step in points:
            found.append((step, lnp.decompose(model, teacher.draw(MEASURED, generator), population=True, seed=step)))
        optimizer.zero_grad()
        loss_of(model, teacher.draw(BATCH, generator)).backward()
        optimizer.step()
    return sum(p.numel() for p in model.parameters()), found


def reach_of(found):
    """Spectral reach of the population's position."""
    steps, parts = [step for step, _ in found], [d.population for _, d in found]
    return lnp.reach(steps, [p.chi_pos for p in parts], [p.chi_pos_stderr for p in parts], window=WINDOW)


def over_seeds(values):
    """(mean, standard error)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def fitted(axis, sizes, points, name, color):
    """The power law through the points that lie above zero by two errors, drawn and said."""
    kept = [(size, value, error) for size, (value, error) in zip(sizes, points, strict=True) if value > 2 * error]
    law = lnp.power_law(*zip(*kept, strict=True))
    positive(axis, sizes, *zip(*points, strict=True), ls="", color=color, label=name)
    grid = np.geomspace(sizes[0], sizes[-1], 50)
    line = np.array([law.predict(size) for size in grid])
    axis.loglog(grid, line[:, 0], color=color, lw=1)
    axis.fill_between(grid, line[:, 0] - line[:, 1], line[:, 0] + line[:, 1], color=color, alpha=0.2)
    axis.set_title(f"{name} $\\propto$ parameters$^{{{law.exponent:.2f} \\pm {law.exponent_stderr:.2f}}}$")
    print(f"{name}: {law}; chi^2 {law.chi_square:.1f} for {law.degrees} degrees of freedom, {len(kept)} sizes")


def main():
    """Train the ladder, fit, draw."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    sizes, losses, reaches = [], [], []
    for width, color in zip(WIDTHS, shades(len(WIDTHS)), strict=True):
        runs = [run(width, seed) for seed in range(SEEDS)]
        sizes.append(runs[0][0])
        losses.append(over_seeds([np.mean([d.loss for _, d in found[-2:]]) for _, found in runs]))
        mean = lnp.reach_of_runs([reach_of(found) for _, found in runs])
        reaches.append((mean.chi_pos, mean.stderr))
        steps = [max(step, 0.7) for step, _ in runs[0][1]]
        curves = np.array([[d.population.chi_pos for _, d in found] for _, found in runs])
        errors = curves.std(axis=0, ddof=1) / math.sqrt(SEEDS)
        positive(axes[0], steps, curves.mean(axis=0), errors, color=color, label=f"{width}")
        print(
            f"width {width:3d}, {sizes[-1]:6d} parameters: loss {losses[-1][0]:.4f} ± {losses[-1][1]:.4f}, "
            f"reach {mean.chi_pos:.2e} ± {mean.stderr:.0e} around step {mean.step:.0f}"
        )
    axes[0].set(xscale="log", yscale="log", xlabel="step", title="$\\chi_{pos}$ of the population, by width")
    axes[0].legend(ncols=2)
    fitted(axes[1], sizes, losses, "loss", "C0")
    fitted(axes[2], sizes, reaches, "reach", "C3")
    for axis in axes[1:]:
        axis.set(xlabel="parameters")
    save(figure, "03_larger_reach_further")


if __name__ == "__main__":
    main()
