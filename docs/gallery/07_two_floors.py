r"""Two floors under a position, shown on purpose: the noise of a finite batch, and the noise of the optimizer.

A batch's own gradient is the population's and what the batch happens to add, E rate = rate_population + tr Cov / N,
which late in training is all but noise. The population's own position has a second floor. A learning rate that is not
small keeps the weights off the way, where the gradient is large and mostly undone by the next steps.

This study shows the first floor by the size of the batch, early and late in a run. It shows the second one twice: at
weights averaged over the last W steps, against the position of a batch of all the samples that these steps saw; and by
branches from one state, in which the population's rate is compared with the net rate, at which the loss on held-out
samples really falls.
"""

import copy
import math

import numpy as np
import torch
from descent import BATCH
from shared import plt, save
from teacher import Teacher, loss_of, student
from torch.optim.swa_utils import AveragedModel

import lnp

WIDTH, RATE, STEPS, EARLY, SEEDS, MEASURED, REPEATS = 128, 0.3, 1500, 30, 3, 16384, 8
SIZES, AVERAGED = (16, 64, 256, 1024, 4096, 16384), (1, 4, 16, 64, 256, 1024)
AFTER = 300
BRANCHES = {
    "as before": {},
    "batch of 2048": {"batch": 2048},
    "learning rate / 10": {"rate": RATE / 10},
    "cool-down to 0": {"cool": True},
}
TEACHER = Teacher()


def descend(model, generator, steps, rate=RATE, batch=BATCH, cool=(), averages=()):
    """Train; the sum of the learning rates. `cool` is (steps before, of how many), `averages` {W: AveragedModel}."""
    way, optimizer = 0.0, torch.optim.SGD(model.parameters(), rate)
    for step in range(steps):
        if cool:
            optimizer.param_groups[0]["lr"] = rate * (1 - (cool[0] + step + 0.5) / cool[1])
        optimizer.zero_grad()
        loss_of(model, TEACHER.draw(batch, generator)).backward()
        optimizer.step()
        way += optimizer.param_groups[0]["lr"]
        for length, average in dict(averages).items():
            if step >= steps - length:
                average.update_parameters(model)
    return way


def measured(model, generator):
    """Decompositions on two new batches."""
    return [lnp.decompose(model, TEACHER.draw(MEASURED, generator), population=True, seed=seed) for seed in (0, 1)]


def branch(model, seed, rate=RATE, batch=BATCH, cool=False):
    """(population rate, net rate over the second half) of one branch."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(500 + seed)
    held_out, half, losses = TEACHER.draw(2 * MEASURED, torch.Generator().manual_seed(7)), AFTER // 2, []
    for before in (0, half):
        way = descend(model, generator, half, rate, batch, (before, AFTER) if cool else ())
        with torch.no_grad():
            losses.append(float(loss_of(model, held_out)))
    return np.mean([d.population.rate for d in measured(model, generator)]), (losses[0] - losses[1]) / way


def main():
    """Train, branch, measure, draw."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.6))
    averaged, branches = [], {name: [] for name in BRANCHES}
    for seed in range(SEEDS):
        generator, model = torch.Generator().manual_seed(seed), student(WIDTH, seed)
        descend(model, generator, EARLY)
        if seed == 0:
            draw_sizes(axes[0], model, generator, EARLY, "C1")
        averages = {length: AveragedModel(model) for length in AVERAGED}
        descend(model, generator, STEPS - EARLY, averages=averages)
        if seed == 0:
            draw_sizes(axes[0], model, generator, STEPS, "C0")
        averaged.append([measured(average.module, generator) for average in averages.values()])
        for name, changes in BRANCHES.items():
            branches[name].append(branch(model, seed, **changes))
    draw_averages(axes[1], averaged)
    draw_branches(axes[2], branches)
    save(figure, "07_two_floors")


def over_repeats(values):
    """(mean, standard error) over the first axis."""
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def draw_sizes(axis, model, generator, step, color):
    """A batch's position and the population's against the size of the batch."""
    batches = [TEACHER.draw(MEASURED, generator) for _ in range(REPEATS)]
    sweeps = [lnp.decompose_nested(model, batch, batch_sizes=SIZES, population=True) for batch in batches]
    own, error = over_repeats([[d.chi_pos for d in sweep.decompositions] for sweep in sweeps])
    parts, part_error = over_repeats([[d.population.chi_pos for d in sweep.decompositions] for sweep in sweeps])
    expected = np.mean([[sweep.expected_chi_pos(size) for size in SIZES] for sweep in sweeps], axis=0)
    axis.errorbar(SIZES, own, error, fmt="o", ms=4, color=color, label=f"step {step}: the batch's")
    beside = 1.08 * np.array(SIZES)
    axis.errorbar(
        beside, parts, part_error, fmt="s", ms=4, mfc="w", color=color, label=f"step {step}: the population's"
    )
    axis.loglog(SIZES, expected, color=color, lw=1)
    axis.set(
        xlabel="samples in the batch, $N$", title="$\\chi_{pos}$ (lines: population + noise/$N$)", ylim=(4e-6, 2e-2)
    )
    axis.legend()
    scales = [sweep.population.gradient_noise / sweep.population.rate for sweep in sweeps]
    print(f"step {step}: noise scale {np.mean(scales):.3g} samples")
    for row in zip(SIZES, own, error, expected, parts, part_error, strict=True):
        print("  {:5d} samples: {:.2e} ± {:.0e}, expected {:.2e}; the population's {:.1e} ± {:.0e}".format(*row))


def draw_averages(axis, averaged):
    """The population's position at averaged weights, and the noise of as many samples as were averaged over."""
    mean, error = over_repeats([[np.mean([d.population.chi_pos for d in ds]) for ds in run] for run in averaged])
    decompositions = [d for run in averaged for d in run[-2]]
    noise = np.mean([d.population.gradient_noise / (d.chi_loss * d.chi_net) for d in decompositions])
    floor = noise / (BATCH * np.array(AVERAGED))
    axis.errorbar(AVERAGED, mean, error, fmt="o", ms=4, color="C0", label="the population's, at averaged weights")
    axis.loglog(AVERAGED, floor, "k--", lw=1, label=f"noise of a batch of ${BATCH}\\,W$ samples")
    axis.set(xlabel="steps that were averaged, $W$", title=f"$\\chi_{{pos}}$ at step {STEPS}")
    axis.legend()
    for row in zip(AVERAGED, mean, error, floor, strict=True):
        print("{:4d} steps averaged: the population's {:.2e} ± {:.0e}, noise of as many samples {:.1e}".format(*row))


def draw_branches(axis, branches):
    """Population rate and net rate of each branch."""
    rows = np.arange(len(branches))[::-1]
    values = np.array(list(branches.values()))
    mean, error = over_repeats(values.transpose(1, 0, 2))
    for index, (label, color) in enumerate((("population rate", "C0"), ("net rate", "C3"))):
        at = rows + 0.18 - 0.36 * index
        axis.barh(at, mean[:, index], 0.34, xerr=error[:, index], color=color, label=label)
    axis.set(xscale="log", yticks=rows, yticklabels=list(branches), ylim=(-0.6, len(branches) + 0.2), xlim=(1e-4, 5e-2))
    axis.set(xlabel="fall of the loss per unit of learning rate", title=f"{AFTER} steps after step {STEPS}")
    axis.legend(loc="upper right", ncols=2)
    for name, (rate, net), (a, b) in zip(branches, mean, error, strict=True):
        print(
            f"{name}: population rate {rate:.2e} ± {a:.0e}, net rate {net:.2e} ± {b:.0e}, {rate / net:.0f} times less"
        )


if __name__ == "__main__":
    main()
