"""Digits without end: shifted by up to a pixel, with noise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lnp.optional import import_optional

NOISE = 0.5
"""Standard deviation of the noise, in units of the pixels' standard deviation."""


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) standardised images and (1797,) labels."""
    datasets = import_optional("sklearn.datasets", "lnp demo", install="'lnp[demo]'", library="scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images - images.mean(axis=0)) / images.std()
    return images.reshape(-1, 8, 8).astype(np.float32), labels.astype(np.int32)


def draw(
    images: np.ndarray, labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(count, 64) new images with their labels."""
    index = generator.integers(len(images), size=count)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    shift = generator.integers(3, size=(2, count))
    noise = NOISE * generator.standard_normal((count, 64), dtype=np.float32)
    return windows[index, shift[0], shift[1]].reshape(count, 64) + noise, labels[index]


def network(width: int, generator: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Weights of variance 1 / inputs and biases 0 for 64 -> width -> 10."""
    sizes = (64, width, 10)
    return [
        {
            "weight": (generator.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32),
            "bias": np.zeros(b, dtype=np.float32),
        }
        for a, b in pairwise(sizes)
    ]
