"""The variance of one probe with balanced signs, beside independent ones: the table of docs/theory.md.

    python benchmarks/balanced_signs.py

Exact blocks Theta_nn of small networks at the start and after a training on scikit-learn's digits, or on text, and the
core's own signs for 2,000 seeds. Relative standard deviations have an error of 1.6%, ratios of variances one of 4.5%.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from lnp.estimators.signs import Signs, seed_words

SEEDS = 2000


class LanguageModel(nn.Module):
    """Characters to logits of the next one, by a causal convolution over eight of them."""

    def __init__(self, vocabulary: int, width: int = 24) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.mix = nn.Conv1d(width, width, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = F.pad(self.token(ids).transpose(1, 2), (7, 0))
        return self.head(torch.tanh(self.mix(h)).transpose(1, 2))


def mlp(outputs: int) -> nn.Module:
    """Two hidden layers on the 64 pixels of a digit."""
    hidden = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(128, outputs))


def cnn() -> nn.Module:
    """Two convolutions, and ten classes."""
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def blocks(model: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    """(N, K, K) blocks Theta_nn."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def block(x: torch.Tensor) -> torch.Tensor:
        rows = jacrev(lambda p: functional_call(model, p, (x[None],)).flatten())(parameters)
        return sum(row.flatten(1) @ row.flatten(1).T for row in rows.values())

    return torch.stack([block(x) for x in inputs]).double().numpy()


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> nn.Module:
    """The model after this many steps of Adam on batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]).flatten(0, -2), y[chosen].flatten()).backward()
        optimizer.step()
    return model


def deviation(theta: np.ndarray, vectors: Callable[[int], np.ndarray]) -> float:
    """Relative standard deviation of the sum of v_n^T Theta_nn v_n over the seeds."""
    totals = [np.einsum("nk,nk->", np.einsum("nkl,nl->nk", theta, v), v) for v in map(vectors, range(SEEDS))]
    return float(np.std(totals) / np.einsum("nkk->", theta))


def independent(shape: tuple[int, int], seed: int) -> np.ndarray:
    """(N, K) signs without a design."""
    return 1.0 - 2 * np.random.default_rng(seed).integers(0, 2, size=shape)


def cases() -> dict[str, tuple[nn.Module, torch.Tensor, int]]:
    """{name: (model, inputs, V or 0)}."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16 - 0.3, dtype=torch.float32), torch.tensor(digits.target)
    many = y * 10 + torch.tensor(digits.data[:, 20:30].argmax(axis=1))  # a hundred classes
    images = x.reshape(-1, 1, 8, 8)
    text = torch.tensor([ord(c) % 48 for c in (torch.__doc__ or "") * 40 + str(nn.Module.__doc__) * 20])
    lines = text[: len(text) // 17 * 17].reshape(-1, 17)
    return {
        "MLP, K=10, start, N=128": (mlp(10), x[:128], 0),
        "MLP, K=10, trained, N=128": (trained(mlp(10), x, y, 600), x[:128], 0),
        "MLP, K=100, trained, N=256": (trained(mlp(100), x, many, 600), x[:256], 0),
        "CNN, K=10, start, N=64": (cnn(), images[:64], 0),
        "CNN, K=10, trained, N=64": (trained(cnn(), images, y, 600), images[:64], 0),
        "CNN, K=10, trained, N=8": (trained(cnn(), images, y, 600), images[:8], 0),
        "LM, S=16, V=48, start, N=8": (LanguageModel(48), lines[:8, :-1], 48),
        "LM, S=16, V=48, trained, N=8": (
            trained(LanguageModel(48), lines[:, :-1], lines[:, 1:], 600),
            lines[:8, :-1],
            48,
        ),
    }


def main() -> None:
    print("| network | independent | balanced | variance |\n|---|---|---|---|")
    for name, (model, inputs, width) in cases().items():
        theta = blocks(model, inputs)
        shape = theta.shape[:2]
        plain = deviation(theta, lambda seed, shape=shape: independent(shape, seed))
        design = deviation(
            theta, lambda seed, shape=shape, w=width: Signs(np, seed_words(seed), shape, w, False, np.float64)(0)
        )
        print(f"| {name} | {plain:.2g} | {design:.2g} | x {(design / plain) ** 2:.2g} |", flush=True)


if __name__ == "__main__":
    main()
