r"""A small language model on the source text of Python's standard library: the same questions.

The paper claims for language models what it claims for vision: chi_pos falls during training, larger models reach
further, chi_net rises as chi_pos falls, and without feature learning the loss stalls.

This study trains transformers of two layers, 8 to 64 wide, on characters, one pass over text that they cannot hold,
with Adam and for each width the best learning rate (`python 05_language_model.py tune`); and the widest one again with
all but its output layer frozen. The learning rate is constant and then cools down to zero, which takes the noise of the
optimizer away. Samples are sequences of 64 characters, positions those of the population. Three seeds.
"""

import math
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from shared import plt, positive, save, shades
from torch import nn
from torch.nn import functional as F

import lnp
import lnp.plot

RATES = {8: 0.1, 16: 0.03, 32: 0.03, 64: 0.01}
"""The best learning rate of each width."""
LADDER, SEEDS, HEADS, LENGTH, BATCH = (0.01, 0.03, 0.1), 3, 4, 64, 16
STEPS, WARM, COOL = 800, 100, 600
POINTS, FRAMES = (3, 10, 30, 100, 200, 400, COOL, STEPS), (3, 30, COOL, STEPS)
MEASURED, MORE, FILMED, LAST = 96, 512, 48, 2


def text():
    """The standard library's modules, one after another in an order of their own, as symbols, the rare ones as one."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    characters = "".join(files[i].read_text(encoding="utf-8", errors="ignore") for i in order)
    known = {chr(code): index for index, code in enumerate([10, *range(32, 127)])}
    return torch.tensor([known.get(character, len(known)) for character in characters]), len(known) + 1


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each on what layer normalisation leaves."""

    def __init__(self, width):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """(N, T, D) -> (N, T, D)."""
        samples, length, width = x.shape
        parts = self.heads(self.before(x)).reshape(samples, length, 3, HEADS, width // HEADS)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mask = torch.full((length, length), float("-inf")).triu(1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / (width // HEADS) ** 0.5 + mask, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(samples, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Language(nn.Module):
    """Symbols (N, T) -> logits (N, T, V)."""

    def __init__(self, symbols, width):
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks, self.last = nn.Sequential(Block(width), Block(width)), nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens):
        """Of each position, the logits of the next symbol."""
        return self.head(self.last(self.blocks(self.symbol(tokens) + self.position)))


def draw(corpus, samples, generator):
    """(inputs, targets) of random sequences."""
    start = torch.randint(len(corpus) - LENGTH - 1, (samples, 1), generator=generator)
    sequences = corpus[start + torch.arange(LENGTH + 1)]
    return sequences[:, :-1], sequences[:, 1:]


def step_size(step):
    """The learning rate at a step, in units of the highest."""
    return min(1, (step + 1) / WARM, (STEPS - step) / (STEPS - COOL))


def network(symbols, width, frozen, seed):
    """A model, of which all or the output layer alone can be trained."""
    torch.manual_seed(100 * width + seed)
    model = Language(symbols, width)
    model.requires_grad_(not frozen)
    model.head.requires_grad_(True)
    return model


def run(corpus, model, rate, seed, points=POINTS, frames=()):
    """([decomposition at each point], {step: Spectrum})."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, step_size)
    found, spectra = [], {}
    for step in range(STEPS + 1):
        if step in points:
            new = draw(corpus, MORE if step >= COOL else MEASURED, generator)
            found.append(lnp.decompose(model, new, population=True, seed=step, rtol=0.03))
        if step in frames:
            spectra[step] = lnp.spectrum(model, draw(corpus, FILMED, generator), steps=24, rtol=0.03)
        inputs, targets = draw(corpus, BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        schedule.step()
    return found, spectra


def tune():
    """The loss at the end after each of the learning rates, with a seed that is not used again."""
    corpus, symbols = text()
    for width, frozen in [(width, False) for width in RATES] + [(max(RATES), True)]:
        ends = {r: run(corpus, network(symbols, width, frozen, 9), r, 9, [STEPS])[0][0].loss for r in LADDER}
        print(f"width {width}{', frozen' if frozen else ''}: {ends}", flush=True)


def over_seeds(values):
    """(mean, standard error)."""
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / math.sqrt(len(values))


def curves(axes, runs, size, label, **style):
    """Loss, position and network scale along the runs; the position against loss and compute."""
    loss, net, position = (
        over_seeds([[read(d) for d in found] for found in runs])
        for read in (lambda d: d.loss, lambda d: d.chi_net, lambda d: d.population.chi_pos)
    )
    axes["loss"].errorbar(POINTS, *loss, label=label, **style)
    axes["net"].errorbar(POINTS, *net, **style)
    positive(axes["position"], POINTS, *position, **style)
    if style["ls"] == "-":
        positive(axes["against"], loss[0], *position, **style)
        positive(axes["compute"], 6 * size * BATCH * LENGTH * np.array(POINTS), *position, **style)
    told = [f"{s}: {a:.1e} ± {b:.0e} ({y:.3f})" for s, a, b, y in zip(POINTS, *position, loss[0], strict=True)]
    print(f"{label}, {size} parameters: chi_net {net[0][0]:.0f} x {net[0][-1] / net[0][0]:.2f}, ", end="")
    print(f"chi_pos at each step (and loss): {', '.join(told)}", flush=True)
    return loss[0][-1], loss[1][-1]


def reaches_of(runs):
    """(reach while the learning rate is constant, position after the cool-down), means of the runs."""
    parts = [[d.population for d in found] for found in runs]
    before = [([p.chi_pos for p in part[:-1]], [p.chi_pos_stderr for p in part[:-1]]) for part in parts]
    return (
        lnp.reach_of_runs([lnp.reach(POINTS[:-1], *values, window="last", size=LAST) for values in before]),
        lnp.reach_of_runs([lnp.Reach(part[-1].chi_pos, part[-1].chi_pos_stderr, STEPS, 1) for part in parts]),
    )


def main():
    """Train the ladder and the frozen one, fit, draw."""
    torch.set_num_threads(1)
    corpus, symbols = text()
    rows = [["loss", "position", "net"], ["compute", "against", "reach"], ["film", "film", "film"]]
    figure, axes = plt.subplot_mosaic(rows, figsize=(11, 10))
    sizes, losses, reaches = [], [], []
    kinds = [(width, False) for width in RATES] + [(max(RATES), True)]
    for (width, frozen), color in zip(kinds, [*shades(len(RATES)), "C3"], strict=True):
        size = sum(p.numel() for p in network(symbols, width, frozen, 0).parameters() if p.requires_grad)
        runs = []
        for seed in range(SEEDS):
            filmed = FRAMES if width == max(RATES) and not frozen and seed == 0 else ()
            found, spectra = run(corpus, network(symbols, width, frozen, seed), RATES[width], seed, frames=filmed)
            runs.append(found)
            if spectra:
                lnp.plot.spectrum(spectra, axes["film"], decades=7).set_title("where in the spectrum the loss falls")
        label = f"width {width}, all but the output layer frozen" if frozen else f"width {width}"
        loss = curves(axes, runs, size, label, color=color, ls="--" if frozen else "-")
        reach = reaches_of(runs)
        print(
            f"  loss {loss[0]:.4f} ± {loss[1]:.4f}; reach before the cool-down {reach[0]}, after {reach[1]}", flush=True
        )
        if not frozen:
            sizes.append(size)
            losses.append(loss)
            reaches.append(reach)
    finish(figure, axes, sizes, losses, reaches)


def finish(figure, axes, sizes, losses, reaches):
    """Fits, titles, legends."""
    law = lnp.power_law(sizes, *zip(*losses, strict=True))
    print(f"loss: {law}; chi^2 per degree of freedom {law.chi_square_per_degree:.1f}")
    both = zip(("constant learning rate", "cooled down"), ("C1", "C0"), zip(*reaches, strict=True), strict=True)
    for label, color, found in both:
        law = lnp.power_law(sizes, found)
        print(f"reach, {label}: {law}; chi^2 per degree of freedom {law.chi_square_per_degree:.1f}")
        lnp.plot.power_law(sizes, found, ax=axes["reach"], label=label, color=color, legend=False)
    titles = {
        "loss": ("loss", "step"),
        "net": ("$\\chi_{net}$", "step"),
        "position": ("$\\chi_{pos}$ of the population", "step"),
        "against": ("$\\chi_{pos}$", "loss"),
        "compute": ("$\\chi_{pos}$", "compute, $6ND$ (floating-point operations)"),
        "reach": ("reach", "parameters"),
    }
    for name, (title, xlabel) in titles.items():
        axes[name].set(xscale="log", yscale="log", xlabel=xlabel, title=title)
    for axis in (axes["loss"].yaxis, axes["against"].xaxis):
        axis.set_ticks([2, 2.5, 3, 4], ["2", "2.5", "3", "4"])
        axis.set_ticks([], minor=True)
    axes["loss"].legend(loc="lower left")
    axes["reach"].legend()
    save(figure, "05_language_model")


if __name__ == "__main__":
    tune() if "tune" in sys.argv else main()
