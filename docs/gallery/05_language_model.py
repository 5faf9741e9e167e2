r"""A small language model on the source text of Python's standard library: the same findings.

The paper claims for language models what it claims for vision: chi_pos falls during training, larger models reach
further, chi_net rises as chi_pos falls, and without feature learning the loss stalls.

This study trains transformers of two layers, 8 to 64 wide, on characters, one pass over text that they cannot hold,
with Adam and one learning rate; and the widest one again with all but its output layer frozen. Samples are sequences of
64 characters. Late in training the position of a batch this small is its sampling noise: what is shown is the
population's.
"""

import sysconfig
from pathlib import Path

import numpy as np
import torch
from shared import film_strip, plt, positive, save, schedule, shades
from torch import nn
from torch.nn import functional as F

import lnp

WIDTHS, HEADS, LENGTH, STEPS, BATCH, RATE, WARM = (8, 16, 32, 64), 4, 64, 1500, 16, 2e-3, 100
MEASURED, WINDOW, FRAMES, FILMED = 96, 4, (0, 15, 150, 1500), 48


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


def run(corpus, symbols, width, frozen=False, filmed=False):
    """(trained parameters, [(step, Decomposition)], {step: Spectrum})."""
    torch.manual_seed(width)
    generator = torch.Generator().manual_seed(0)
    model = Language(symbols, width)
    trained = list((model.head if frozen else model).parameters())
    optimizer = torch.optim.Adam(trained, RATE, betas=(0.9, 0.99))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM))
    points, found, spectra = schedule(STEPS, 12), [], {}
    options = {"parameters": "head.*" if frozen else None, "rtol": 0.03}
    for step in range(STEPS + 1):
        if step in points:
            new = draw(corpus, MEASURED, generator)
            found.append((step, lnp.decompose(model, new, population=True, seed=step, **options)))
        if filmed and step in FRAMES:
            spectra[step] = lnp.spectrum(model, draw(corpus, FILMED, generator), steps=24, **options)
        inputs, targets = draw(corpus, BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        warm.step()
    return sum(p.numel() for p in trained), found, spectra


def curves(axes, found, label, **style):
    """Loss, position and network scale along a run."""
    steps = [max(step, 0.7) for step, _ in found]
    axes["loss"].loglog(steps, [d.loss for _, d in found], label=label, **style)
    axes["net"].loglog(steps, [d.chi_net / found[0][1].chi_net for _, d in found], **style)
    parts = [d.population for _, d in found]
    positive(axes["position"], steps, [p.chi_pos for p in parts], [p.chi_pos_stderr for p in parts], **style)


def main():
    """Train the ladder and the frozen one, fit, draw."""
    torch.set_num_threads(1)
    corpus, symbols = text()
    figure, axes = plt.subplot_mosaic([["loss", "position", "net"], ["reach", "film", "film"]], figsize=(11, 7))
    sizes, losses, reaches = [], [], []
    runs = [(width, False) for width in WIDTHS] + [(WIDTHS[-1], True)]
    for (width, frozen), color in zip(runs, [*shades(len(WIDTHS)), "C3"], strict=True):
        size, found, spectra = run(corpus, symbols, width, frozen, filmed=width == WIDTHS[-1] and not frozen)
        label = f"{width}, all but the output layer frozen" if frozen else f"width {width}"
        curves(axes, found, label, color=color, ls="--" if frozen else "-")
        parts = [d.population for _, d in found]
        r = lnp.reach(
            [step for step, _ in found], [p.chi_pos for p in parts], [p.chi_pos_stderr for p in parts], window=WINDOW
        )
        first, last = found[0][1], found[-1][1]
        at_the_end = last.population
        print(
            f"{label}, {size} parameters: loss {first.loss:.2f} -> {last.loss:.3f}, chi_net x "
            f"{last.chi_net / first.chi_net:.2f}, chi_pos {first.population.chi_pos:.1e} -> {at_the_end.chi_pos:.1e} ± "
            f"{at_the_end.chi_pos_stderr:.0e} (the batch's {last.chi_pos:.1e}), reach {r.chi_pos:.1e} ± {r.stderr:.0e}",
            flush=True,
        )
        if not frozen:
            sizes.append(size)
            losses.append(np.mean([d.loss for _, d in found[-2:]]))
            reaches.append((max(r.chi_pos, r.stderr), r.stderr))
        if spectra:
            film_strip(axes["film"], spectra, decades=7)
    finish(figure, axes, sizes, losses, reaches)


def finish(figure, axes, sizes, losses, reaches):
    """Fits, titles, legends."""
    loss_law, law = lnp.power_law(sizes, losses), lnp.power_law(sizes, *zip(*reaches, strict=True))
    print(f"loss: {loss_law}\nreach: {law}; chi^2 {law.chi_square:.1f} for {law.degrees} degrees of freedom")
    values, errors = zip(*reaches, strict=True)
    axes["reach"].errorbar(sizes, values, errors, fmt="C3.", label="reach")
    axes["reach"].loglog(sizes, [law.predict(size)[0] for size in sizes], "C3-", lw=1)
    exponent = f"{law.exponent:.2f} \\pm {law.exponent_stderr:.2f}"
    axes["reach"].set(xlabel="parameters", title=f"reach $\\propto$ parameters$^{{{exponent}}}$")
    titles = {"loss": "loss", "position": "$\\chi_{pos}$ of the population", "net": "$\\chi_{net}$ / its first value"}
    for name, title in titles.items():
        axes[name].set(xscale="log", yscale="log", xlabel="step", title=title)
    axes["loss"].legend()
    save(figure, "05_language_model")


if __name__ == "__main__":
    main()
