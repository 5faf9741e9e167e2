"""The comparison of models that are drawn at random sees numbers that are wrong, of each kind that it compares."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "benchmarks" / "random_models"
if not FOLDER.exists():
    pytest.skip("The tests lie apart from the tree.", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
models = importlib.import_module("torch_models")


def build():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), (torch.randn(4, 5), torch.arange(4) % 4)


def test_right_numbers_are_right():
    assert models.compared(build, 0) == ("right", "")


@pytest.mark.parametrize("sample", [0, 3])
def test_a_wrong_norm_of_one_sample_is_seen(sample, monkeypatch):
    def wrong(*args):
        record = models_evaluate(*args)
        record["norms"]["2.weight"][sample] *= 1.02
        return record

    models_evaluate = models.evaluate
    monkeypatch.setattr(models, "evaluate", wrong)
    assert models.compared(build, 0)[0] == "wrong"


def test_a_wrong_rate_is_seen(monkeypatch):
    plain = models.plain_step
    monkeypatch.setattr(models, "plain_step", lambda *args: 1.02 * plain(*args))
    assert models.compared(build, 0)[0] == "wrong"


def test_a_step_that_changes_the_model_is_seen(monkeypatch):
    decompose = models.lnp.decompose

    def writing(model, *args, **options):
        with torch.no_grad():
            model[0].bias += 1
        return decompose(model, *args, **options)

    monkeypatch.setattr(models.lnp, "decompose", writing)
    assert models.compared(build, 0) == ("wrong", "0.bias was changed")
