"""When a note stands beside a number that is returned."""

from dataclasses import replace

import pytest

from core.dense import network, record
from lnp.contract.trees import map_leaves
from lnp.results.decomposition import decomposed
from lnp.results.finished import ABOVE_ONE, MANY, explained

JACOBIAN, GRADIENT = network(3, 2)
FOUND = map_leaves(lambda leaf: getattr(leaf, "tolist", lambda: leaf)(), decomposed(record(JACOBIAN, GRADIENT))[0])


def notes(text, unscaled=False, **changes):
    """How many notes with this text there are, once some numbers are other ones."""
    return sum(text in note for note in explained(replace(FOUND, **changes), unscaled).notes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, True),
        ({"chi_net_stderr": 0.41}, True),
        ({"chi_net_stderr": 0.4}, False),  # as certain as was asked for, by a factor of two
        ({"chi_net_stderr": 0.39}, False),
        ({"probes": MANY - 1}, False),
        ({"probes": MANY + 1}, True),
        ({"rtol": 0.0}, False),
        ({"rtol": 0.25}, False),
    ],
)
def test_a_tolerance_that_was_missed(changes, told):
    missed = {"probes": MANY, "chi_net": 2.0, "chi_net_stderr": 0.5, "rtol": 0.1}
    assert notes("less certain than rtol", **missed | changes) == told
    assert MANY == 64


def test_a_position_above_one():
    assert notes("above 1", chi_pos=1 + ABOVE_ONE, chi_pos_stderr=0.0) == 0
    assert notes("above 1", chi_pos=1 + 2 * ABOVE_ONE, chi_pos_stderr=0.0) == 1
    assert notes("above 1", chi_pos=1.5, chi_pos_stderr=0.5) == 0
    assert notes("above 1", chi_pos=1.5, chi_pos_stderr=float("nan")) == 1


def test_a_gradient_that_was_squared_as_it_is():
    small = {"rate": 1e-9, "least": 1e-6, "magnitude": 1.0}
    assert notes("the step's own gradient", unscaled=True, **small) == 1
    assert notes("the step's own gradient", unscaled=True, **small | {"chi_loss": 1e-3}) == 1
    assert notes("the step's own gradient", unscaled=True, **small | {"chi_loss": 0.0}) == 0
    assert notes("the step's own gradient", unscaled=True, **small | {"rate": 1e-3}) == 0
    assert notes("the step's own gradient", **small) == 0


def test_what_is_of_the_computation_is_put_back():
    d = explained(replace(FOUND, magnitude=2.0, rtol=0.1, way=1))
    assert (d.magnitude, d.least, d.rtol, d.way, d.evidence, d.contributions) == (1.0, 0.0, 0.0, 0, {}, None)
    assert d.rate == pytest.approx(4 * FOUND.rate)
