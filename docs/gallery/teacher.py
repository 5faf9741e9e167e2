"""An endless task that no student of the studies solves: the labels of a random network, drawn anew at each step."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

INPUTS, CLASSES = 16, 10


class Teacher:
    """Two hidden layers of 256 units; its largest output is the label."""

    def __init__(self, seed: int = 1234, width: int = 256, scale: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = (INPUTS, width, width, CLASSES)
        self.weights = [scale * torch.randn(a, b, generator=generator) / a**0.5 for a, b in itertools.pairwise(sizes)]

    def draw(self, samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, labels) of new samples."""
        x = h = torch.randn(samples, INPUTS, generator=generator)
        for weight in self.weights[:-1]:
            h = torch.tanh(h @ weight)
        return x, (h @ self.weights[-1]).argmax(1)


def student(width: int, seed: int) -> nn.Sequential:
    """Two hidden layers of tanh units, weights of variance 1 / inputs, biases zero."""
    torch.manual_seed(seed)
    layers = [nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])
