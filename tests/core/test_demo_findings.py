"""The demo's sentences say whether the paper's effects are there, at the bounds that they name."""

from __future__ import annotations

import math

import pytest

import lnp
from lnp.demo import summary


def history(width, frozen=False, seed=0, start=1.0, loss=1.0, growth=1.0):
    """A run of two measurements, between which its network scale grows by a factor."""
    own = {"network": f"{width} {'frozen' if frozen else 'units'}", "width": width, "frozen": frozen, "seed": seed}
    rows = [{"step": 0, "population/chi_pos": start, "loss": 9.0, "chi_net": 2.0}]
    rows.append({"step": 1, "population/chi_pos": 0.9 * start, "loss": loss, "chi_net": 2.0 * growth})
    return lnp.History(row | own for row in rows)


@pytest.fixture
def reaching(monkeypatch):
    """Sets the reach of each network: {its name: (chi_pos, stderr)}."""

    def set_to(reaches):
        def reach(runs):
            return lnp.Reach(*reaches[runs[0]["network"][0]], 1.0, 5)

        monkeypatch.setattr(summary, "reach", reach)

    return set_to


def ladder(*runs):
    """One run of each network."""
    return {run["network"][0]: [run] for run in runs}


@pytest.mark.parametrize(("reached", "falls"), [(0.49, True), (0.5, False), (0.6, False)])
def test_the_position_falls_where_less_than_half_is_left(reached, falls, reaching):
    reaching({"4 units": (reached, 0.0)})
    said = summary.findings(ladder(history(4)))[0]
    assert said.startswith("Learning moves into the tail") == falls


def test_the_position_has_to_fall_in_every_network(reaching):
    reaching({"4 units": (0.1, 0.0), "8 units": (0.9, 0.0)})
    assert summary.findings(ladder(history(4), history(8)))[0] == (
        "Learning does not move into the tail: chi_pos falls to 0.1 (4 units), 0.9 (8 units) of its value at the start."
    )


def test_the_fall_is_told_as_a_part_of_the_position_at_the_start(reaching):
    reaching({"4 units": (0.01, 0.0)})
    assert "falls to 0.0025 (4 units) of" in summary.findings(ladder(history(4, start=4.0)))[0]


def test_a_position_that_is_lost_in_noise_has_fallen_to_its_upper_limit(reaching):
    reaching({"4 units": (0.02, 0.04)})
    assert "falls to 0.1 (4 units) of" in summary.findings(ladder(history(4)))[0]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (10.25, "Larger networks reach further into the tail: "),
        (10.0, "Larger networks reach further, but not beyond two standard errors at every step: "),
        (0.25, "Larger networks reach further, but not beyond two standard errors at every step: "),
        (0.0, "Larger networks do not reach further in this run: "),
        (-10.25, "Larger networks do not reach further in this run: "),
    ],
)
def test_larger_networks_reach_further_beyond_two_standard_errors(further, said, reaching):
    reaching({"4 units": (64.0, 3.0), "8 units": (64.0 - further, 4.0)})  # errors of 3 and 4: one of 5
    assert summary.findings(ladder(history(4), history(8)))[1].startswith(said)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (50.0, "Larger networks reach further, but not beyond two standard errors at every step: "),
        (90.0, "Larger networks do not reach further in this run: "),
    ],
)
def test_larger_networks_reach_further_at_every_step_of_the_ladder(last, said, reaching):
    reaching({"4 units": (90.0, 3.0), "8 units": (60.0, 3.0), "16 units": (last, 4.0)})
    assert summary.findings(ladder(history(4), history(8), history(16)))[1].startswith(said)


@pytest.mark.parametrize(("above", "stalls"), [(10.25, True), (10.0, False), (0.0, False), (-10.25, False)])
def test_frozen_features_stall_where_their_reach_is_higher_beyond_two_standard_errors(above, stalls, reaching):
    reaching({"4 units": (64.0, 3.0), "4 frozen": (64.0 + above, 4.0)})
    said = summary.findings(ladder(history(4), history(4, frozen=True)))[2]
    assert said.startswith("Frozen features stall: ") == stalls
    assert said.startswith("Frozen features do not stall in this run: ") != stalls


def test_frozen_features_are_compared_with_the_network_of_their_width(reaching):
    reaching({"4 units": (64.0, 3.0), "8 units": (32.0, 3.0), "8 frozen": (128.0, 3.0)})
    runs = (history(4, loss=5.0), history(8, loss=1.5, growth=2.5), history(8, frozen=True, loss=3.0, growth=1.25))
    assert summary.findings(ladder(*runs))[2].endswith(
        "reach 128 ± 3 against 32 ± 3, loss 3 against 1.5; chi_net grows by 1.25 against 2.50."
    )


def test_frozen_features_without_a_network_of_their_width_are_not_compared(reaching):
    reaching({"4 units": (64.0, 3.0), "8 frozen": (128.0, 3.0)})
    assert summary.findings(ladder(history(4), history(8, frozen=True)))[2].startswith("No network of 8 units with")


def test_values_are_means_over_seeds_with_their_standard_errors():
    runs = [history(4, seed=0, loss=1.0, growth=2.0), history(4, seed=1, loss=4.0, growth=3.0)]
    assert summary.last_value(runs, "loss") == summary.Value(2.5, pytest.approx(1.5))  # sd 3 / sqrt 2, over sqrt 2
    assert summary.growth(runs, "chi_net") == summary.Value(2.5, pytest.approx(0.5))


def test_a_single_seed_has_no_standard_error():
    value = summary.last_value([history(4, loss=3.0)], "loss")
    assert value.mean == 3.0
    assert math.isnan(value.stderr)


def test_frozen_networks_are_told_from_the_others():
    assert summary.is_frozen([history(4, frozen=True)])
    assert not summary.is_frozen([history(4)])
