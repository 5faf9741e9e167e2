"""The numbers of docs/reading.md: logits against probabilities, batch sizes, and the optimizer's noise, on digits.

python benchmarks/reading_study.py        # a minute on one core
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import lnp

HELD = 1200
"""Images that are trained on."""
RATE, BATCH = 0.5, 32
START, LENGTH, BRANCHES = 1500, 150, 12


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


X, Y = digits()


def network() -> torch.nn.Sequential:
    """64 hidden units, the same each time."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def trained(
    model: torch.nn.Module, steps: int, rate: float = RATE, batch: int = BATCH, seed: int = 0, cool: bool = False
) -> torch.nn.Module:
    """A copy after some steps of gradient descent, with the learning rate going to 0 if it is to `cool`."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps) if cool else rate
        chosen = torch.randint(0, HELD, (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(X[chosen]), Y[chosen]).backward()
        optimizer.step()
    return model


def negative_logarithm(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p, of outputs that are probabilities."""
    return F.nll_loss(outputs.log(), targets)


def outputs_table(name: str, model: torch.nn.Module) -> None:
    """The factors of one network, with its outputs taken as logits and as probabilities."""
    softened = torch.nn.Sequential(model, torch.nn.Softmax(-1))
    ways = {
        "logits": (model, None),
        "probabilities": (softened, negative_logarithm),
        "mistaken": (softened, "cross_entropy"),
    }
    for outputs, (measured, loss) in ways.items():
        d = lnp.decompose(measured, (X[:128], Y[:128]), loss)
        numbers = (d.loss, d.rate, d.chi_loss, d.chi_net, d.chi_pos, d.preference)
        print(f"{name:>10} {outputs:>14}", *(f"{number:9.3g}" for number in numbers))


def batches_table(name: str, model: torch.nn.Module) -> None:
    """Positions of batches of several sizes: means over batches, and the standard error of the population's."""
    for size in (8, 32, 128, 512, HELD):
        found = [
            lnp.decompose(model, (X[start : start + size], Y[start : start + size]))
            for start in range(0, HELD - size + 1, size)[:20]
        ]
        means = [np.mean([getattr(d, value) for d in found]) for value in ("chi_pos", "preference")]
        population = [d.population.chi_pos for d in found]
        error = np.std(population, ddof=1) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        print(f"{name:>10} {size:14d}", *(f"{number:9.3g}" for number in (*means, np.mean(population), error)))


def branches_table(model: torch.nn.Module) -> None:
    """Positions on all images that are trained on, at the ends of branches."""
    ways = {"as before": {}, "batch 256": {"batch": 256}, "rate 0.05": {"rate": 0.05}, "rate to 0": {"cool": True}}
    for name, options in ways.items():
        ends = [trained(model, LENGTH, seed=10 + seed, **options) for seed in range(BRANCHES)]
        found = [lnp.decompose(end, (X[:HELD], Y[:HELD]), population=False) for end in ends]
        means = [np.mean([getattr(d, value) for d in found]) for value in ("loss", "chi_pos", "preference")]
        error = np.std([d.chi_pos for d in found], ddof=1) / len(found) ** 0.5
        print(f"{name:>25}", *(f"{number:9.3g}" for number in (*means, error)))


def main() -> None:
    torch.set_num_threads(1)
    start, later = network(), trained(network(), 500)
    print(lnp.decompose(start, (X[:128], Y[:128])), "\n\n", lnp.decompose(later, (X[:128], Y[:128])), sep="")
    print("\noutputs: loss, rate, chi_loss, chi_net, chi_pos, preference")
    outputs_table("start", start)
    outputs_table("500 steps", later)
    print("\nsamples: chi_pos, preference, chi_pos of the population, its standard error")
    batches_table("start", start)
    batches_table("500 steps", later)
    print("\nbranches: loss, chi_pos, preference, standard error of chi_pos")
    branches_table(trained(network(), START))


if __name__ == "__main__":
    main()
