"""The demo's training loop in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


class Trainer:
    """One network of the demo: plain gradient descent on a stream of batches."""

    def __init__(
        self,
        weights: Sequence[dict[str, np.ndarray]],
        stream: tuple[np.ndarray, ...],
        learning_rate: float,
        frozen: bool,
    ) -> None:
        self._parameters = [{name: torch.tensor(value) for name, value in layer.items()} for layer in weights]
        self._images, self._labels = self.arrays(stream)
        self._learning_rate = learning_rate
        trained = self._parameters[-1:] if frozen else self._parameters
        self._trained = [p.requires_grad_() for layer in trained for p in layer.values()]

    @property
    def model(self) -> tuple:
        """For `lnp.decompose`."""
        return apply, self._parameters

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self._trained)

    def arrays(self, batch: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels as tensors."""
        return torch.from_numpy(batch[0]), torch.from_numpy(batch[1]).long()

    def train(self, start: int, stop: int) -> None:
        """Take the steps from `start` up to `stop`."""
        for step in range(start, stop):
            loss = F.cross_entropy(apply(self._parameters, self._images[step]), self._labels[step])
            gradients = torch.autograd.grad(loss, self._trained)
            with torch.no_grad():
                for p, gradient in zip(self._trained, gradients, strict=True):
                    p -= self._learning_rate * gradient


def apply(parameters: Sequence[dict[str, torch.Tensor]], images: torch.Tensor) -> Any:
    """One hidden layer of tanh units."""
    hidden = torch.tanh(images @ parameters[0]["weight"] + parameters[0]["bias"])
    return hidden @ parameters[1]["weight"] + parameters[1]["bias"]
