"""The demo's digits: standardised, shifted by up to a pixel, with noise; and the weights that networks start from."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from lnp.demo import data

IMAGE = np.arange(64, dtype=np.float32).reshape(1, 8, 8)


@pytest.fixture
def loaded(monkeypatch):
    """Five images, as scikit-learn gives them where images and labels are asked for."""
    images = np.random.default_rng(0).integers(0, 17, size=(5, 64)).astype(float)
    module = ModuleType("sklearn.datasets")
    module.load_digits = lambda return_X_y: (images, np.arange(5)) if return_X_y else {"data": images}
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    return images


def test_digits_are_standardised_with_a_mean_for_each_pixel_and_one_spread_for_all(loaded):
    images, labels = data.digits()
    spread = (sum((loaded.ravel() - sum(loaded.ravel()) / 320) ** 2) / 320) ** 0.5
    for row, column in ((0, 0), (2, 5), (7, 7)):
        pixel = loaded[:, 8 * row + column]
        assert images[:, row, column] == pytest.approx((pixel - sum(pixel) / 5) / spread, abs=1e-6)
    assert images.shape == (5, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_numbers_are_those_that_frameworks_train_in(loaded):
    images, labels = data.digits()
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)


def test_images_are_shifted_by_a_pixel_at_most_with_the_edge_repeated(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 0.0)
    drawn, _ = data.draw(IMAGE, np.zeros(1), 300, np.random.default_rng(0))
    shifted = set()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows, columns = (np.clip(np.arange(8) + shift, 0, 7) for shift in (down, right))
            shifted.add(tuple((8 * rows[:, None] + columns).ravel().tolist()))
    assert {tuple(one) for one in drawn.tolist()} == shifted


def test_each_image_keeps_its_label(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 0.0)
    images = np.ones((3, 8, 8), dtype=np.float32) * np.array([[[5.0]], [[6.0]], [[7.0]]])
    drawn, labels = data.draw(images, np.array([50, 60, 70]), 100, np.random.default_rng(0))
    assert np.array_equal(drawn, np.repeat(labels[:, None] / 10, 64, axis=1))
    assert set(labels.tolist()) == {50, 60, 70}


def test_the_noise_is_half_of_the_pixels_spread():
    drawn, _ = data.draw(np.zeros((1, 8, 8), dtype=np.float32), np.zeros(1), 1000, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(0.5, rel=0.02)
    assert drawn.mean() == pytest.approx(0.0, abs=0.01)


def test_weights_have_a_variance_of_one_over_the_inputs_and_biases_are_zero():
    hidden, head = data.network(500, np.random.default_rng(0))
    assert (hidden["weight"].shape, head["weight"].shape) == ((64, 500), (500, 10))
    assert hidden["weight"].var() == pytest.approx(1 / 64, rel=0.05)
    assert head["weight"].var() == pytest.approx(1 / 500, rel=0.1)
    assert (hidden["bias"].tolist(), head["bias"].tolist()) == ([0.0] * 500, [0.0] * 10)
