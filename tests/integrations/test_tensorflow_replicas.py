"""Under a strategy with two replicas: the whole batch is measured as without it, each replica's part by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

import lnp
from lnp_tensorflow import strategies

CASES = ("module", "tracker")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two replicas of one process found, by case."""
    path = tmp_path_factory.mktemp("replicas") / "found.json"
    command = [sys.executable, str(Path(__file__).with_name("tensorflow_replicas.py")), str(path), *CASES]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(path.read_text())


def test_a_distributed_batch_is_measured_whole(found):
    """With a loss of Keras, which divides by the number of replicas in a scope and in a step."""
    measured, expected = found["module"].values()
    for where in ("outside", "in scope", "arrays in scope"):
        assert measured[where] == pytest.approx(expected["whole"], rel=1e-12)
    assert measured["by replicas"][0] == pytest.approx(expected["first"], rel=1e-12)
    assert measured["by replicas"][1] == pytest.approx(expected["second"], rel=1e-12)


def test_a_tracked_step_in_a_scope(found):
    case = found["tracker"]
    assert case["kept"] == [True, True]
    assert case["change"] == pytest.approx(case["expected"], rel=1e-9)


def test_parts_that_other_workers_hold_are_missed():
    class Elsewhere(tf.distribute.DistributedValues):
        """A batch's part, or a variable, of one worker of two."""

        def __init__(self, *values):
            self.values = values

        num_replicas_in_sync = 2
        distribute_strategy = property(lambda self: self)

    with pytest.raises(ValueError, match=r"parts of 1 replicas, and the strategy has 2: the other workers"):
        strategies.whole((Elsewhere(tf.ones((2, 3))),), [Elsewhere()])
    with pytest.raises(ValueError, match="one number for each replica"):
        strategies.whole((Elsewhere(tf.ones(()), tf.ones(())),), [])
    x = tf.ones((2, 3))
    assert strategies.whole((x,), [Elsewhere()])[0] is x
    assert lnp.decompose((lambda w, x: x @ w, tf.ones((3, 1))), (Elsewhere(x, x), tf.ones((4, 1)))).samples == 4
