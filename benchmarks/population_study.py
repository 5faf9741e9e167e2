"""Does the position depend on how many samples the batch has? The batch's own does, late in training; the population's
does not.

    python benchmarks/population_study.py [--steps 600] [--widths 16,64]

Trains a small character language model on the source text of Python's standard library (64 characters are a sample) and
measures it on batches of several sizes, drawn from text that it has not seen. Writes results/population.{json,md,png}.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import numpy as np
import torch
from report import RESULTS, machine, write
from torch import nn
from torch.nn import functional as F

import lnp

LENGTH, SIZES = 64, (8, 32, 128, 512)
DRAWS = {8: 64, 32: 16, 128: 6, 512: 3}
"""Batches of each size, whose mean and standard error are shown."""


class Model(nn.Module):
    """Two causal transformer blocks."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)

        def layer():
            return nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)

        self.blocks = nn.ModuleList([layer(), layer()])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.place(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def text() -> tuple[torch.Tensor, int]:
    """(the standard library's source as numbers, how many characters there are)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    joined = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    known = sorted({c for c in joined if c.isascii()})
    index = {c: i for i, c in enumerate(known)}
    return torch.tensor([index[c] for c in joined if c in index]), len(known)


def drawn(tokens: torch.Tensor, samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows at random places, and the characters that follow."""
    starts = torch.randint(len(tokens) - LENGTH - 1, (samples,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def trained(tokens: torch.Tensor, characters: int, width: int, steps: int) -> nn.Module:
    """Adam, 32 windows a step."""
    torch.manual_seed(0)
    model, generator = Model(characters, width), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        x, y = drawn(tokens, 32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return model


def measured(model: nn.Module, tokens: torch.Tensor, samples: int) -> dict[str, float]:
    """Means over batches of one size, with their standard errors, and the mean error that lnp gives for one batch."""
    generator = torch.Generator().manual_seed(samples)
    found = [lnp.decompose(model, drawn(tokens, samples, generator), seed=i) for i in range(DRAWS[samples])]
    assert all(d.population is not None for d in found)
    own, population = np.array([d.chi_pos for d in found]), np.array([d.population.chi_pos for d in found])
    errors = np.array([d.population.chi_pos_stderr for d in found])

    def spread(values):
        return float(values.std(ddof=1) / len(values) ** 0.5)

    return {
        "samples": samples, "chi_pos": float(own.mean()), "its standard error": spread(own),
        "chi_pos of the population": float(population.mean()), "standard error": spread(population),
        "spread of one batch": float(population.std(ddof=1)),
        "error given for one batch": float((errors**2).mean() ** 0.5),
    }  # fmt: skip


def figure(rows: list[dict], path: Path) -> None:
    """Position over batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for width, colour in zip(sorted({row["width"] for row in rows}), ("C0", "C1", "C2", "C3"), strict=False):
        some = [row for row in rows if row["width"] == width and row["step"] > 0]
        sizes = [row["samples"] for row in some]
        for name, error, style in (
            ("chi_pos", "its standard error", "--s"), ("chi_pos of the population", "standard error", "-o"),
        ):  # fmt: skip
            values, errors = [row[name] for row in some], [row[error] for row in some]
            label = f"width {width}, {'population' if 'population' in name else 'batch'}"
            ax.errorbar(sizes, values, errors, fmt=style, color=colour, label=label, capsize=3)
    ax.set(xscale="log", yscale="log", xlabel="samples in the batch", ylabel="spectral position chi_pos")
    ax.set_xticks(SIZES, [str(size) for size in SIZES])
    ax.minorticks_off()
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--widths", default="16,64")
    options = parser.parse_args()
    tokens, characters = text()
    seen, unseen = tokens[: len(tokens) * 9 // 10], tokens[len(tokens) * 9 // 10 :]
    rows = []
    for width in map(int, options.widths.split(",")):
        for steps in (0, options.steps):
            model = trained(seen, characters, width, steps)
            rows += [{"width": width, "step": steps, **measured(model, unseen, size)} for size in SIZES]
    tables = {"Position over the size of the batch": rows}
    write("population", {"title": "The population's position", "machine": machine(), "tables": tables})
    figure(rows, RESULTS / "population.png")


if __name__ == "__main__":
    main()
