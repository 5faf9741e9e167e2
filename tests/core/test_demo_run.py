"""The demo trains each network of each seed on one stream of digits, and measures them on the same new ones."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest

import lnp
from lnp.demo import Settings, run
from lnp.demo.run import choose_framework

MODULE = importlib.import_module(choose_framework.__module__)
"""`lnp.demo.run` is a function by name as well."""
SMALL = Settings(framework="made_up", widths=(2, 3), frozen=3, steps=10, batch=4, measured=5, points=4, seeds=2)


class Trainer:
    """Keeps what it was made of."""

    def __init__(self, weights, stream, learning_rate, frozen):
        self.weights, self.stream, self.learning_rate, self.frozen = weights, stream, learning_rate, frozen


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The arguments of each training, in their order, and the ladder that was returned."""
    calls = []

    def train(*given):
        calls.append(given)
        return len(calls)

    backend, trainers, datasets = ModuleType("backend"), ModuleType("backend.demo"), ModuleType("sklearn.datasets")
    trainers.Trainer = Trainer
    datasets.load_digits = lambda return_X_y: (np.random.default_rng(0).uniform(size=(20, 64)), np.arange(20) % 10)
    modules = {"backend.demo": trainers, "sklearn": ModuleType("sklearn"), "sklearn.datasets": datasets}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(MODULE, "choose_framework", {"made_up": "made_up"}.get)
    monkeypatch.setattr(lnp, "load", {"made_up": backend}.get)
    monkeypatch.setattr(MODULE, "train", train)
    return calls, run(SMALL, tmp_path)


def test_the_demo_is_the_one_that_the_readme_describes():
    settings = Settings()
    assert settings.runs == [(16, False), (64, False), (256, False), (64, True)]
    assert (settings.steps, settings.seeds) == (300, 3)


def test_networks_are_run_in_their_order_for_one_seed_after_the_other(trained):
    calls, ladder = trained
    assert ladder == {"2 units": [1, 4], "3 units": [2, 5], "3 frozen": [3, 6]}
    assert [tags for _, _, _, tags, _, _ in calls] == [
        {"network": network, "width": width, "frozen": frozen, "seed": seed}
        for seed in (0, 1)
        for network, width, frozen in (("2 units", 2, False), ("3 units", 3, False), ("3 frozen", 3, True))
    ]


def test_each_run_has_a_file_of_its_own(trained, tmp_path):
    calls, _ = trained
    names = [f"{network}-seed-{seed}.jsonl" for seed in (0, 1) for network in ("2-units", "3-units", "3-frozen")]
    assert [path for _, _, _, _, path, _ in calls] == [tmp_path / name for name in names]


def test_networks_of_a_seed_are_trained_on_one_stream_and_measured_on_the_same_images(trained):
    first, second, third, other = [(trainer.stream, new) for trainer, _, new, *_ in trained[0]][:4]
    for stream, new in (second, third):
        assert np.array_equal(stream[0], first[0][0])
        assert np.array_equal(new[1][0], first[1][1][0])
    assert not np.array_equal(other[0][0], first[0][0])
    assert not np.array_equal(other[1][1][0], first[1][1][0])


def test_the_stream_has_a_batch_for_each_step_and_new_images_for_each_measurement(trained):
    trainer, settings, new, *_ = trained[0][0]
    assert settings == SMALL
    assert [part.shape for part in trainer.stream] == [(10, 4, 64), (10, 4)]
    assert [[part.shape for part in batch] for batch in new] == [[(5, 64), (5,)]] * 5  # at steps 0, 1, 2, 5 and 10
    assert len(np.unique(np.concatenate([trainer.stream[0].reshape(40, 64), *(x for x, _ in new)]), axis=0)) == 65


def test_frozen_features_are_those_that_the_network_of_their_width_starts_from(trained):
    _, free, frozen, *_ = [trainer for trainer, *_ in trained[0]]
    assert (free.frozen, frozen.frozen) == (False, True)
    assert frozen.learning_rate == free.learning_rate == 0.1
    for own, other in zip(frozen.weights, free.weights, strict=True):
        assert np.array_equal(own["weight"], other["weight"])


def test_weights_differ_between_seeds(trained):
    first, _, _, other, *_ = [trainer.weights[0]["weight"] for trainer, *_ in trained[0]]
    assert first.shape == other.shape == (64, 2)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("installed", "chosen"), [({"jax", "torch"}, "jax"), ({"torch"}, "torch")])
def test_the_first_framework_that_is_installed_is_chosen(installed, chosen, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {name: name for name in installed}.get)
    assert choose_framework(None) == chosen


def test_the_framework_that_is_asked_for_is_chosen_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {"jax": "jax", "torch": "torch"}.get)
    assert choose_framework("torch") == "torch"
    monkeypatch.setattr(importlib.util, "find_spec", {"jax": "jax"}.get)
    with pytest.raises(ImportError, match=r"asked to use torch, which is not installed.*lnp\[torch\]"):
        choose_framework("torch")


def test_without_a_framework_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    with pytest.raises(ImportError, match=r"neither JAX nor PyTorch is installed.*lnp\[demo,jax\]"):
        choose_framework(None)
