"""The demo's words follow its numbers, either way, and what is missing is named."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lnp.cli import main
from lnp.demo import Settings, data, summary
from lnp.demo.run import name, write_csv, write_runs


def history(positions: dict[tuple[int, bool], list[float]], spread: float = 0.01, seeds: int = 3) -> list[dict]:
    rows = []
    for (width, frozen), values in positions.items():
        for seed in range(seeds):
            for step, value in enumerate(values):
                shifted = value * (1 + spread * (seed - 1))
                run = {"network": name(width, frozen), "width": width, "frozen": frozen, "seed": seed, "step": step}
                rows.append(run | {"population/chi_pos": shifted, "loss": 1.0, "chi_net": 1.0 + step * (not frozen)})
    return rows


FALLING = [1.0, 0.1, 0.02, 0.01, 0.01, 0.01]
LOWER = [1.0, 0.1, 0.002, 0.001, 0.001, 0.001]


def test_reach_is_the_lowest_window_and_not_a_lucky_point():
    rows = history({(4, False): [1.0, 0.5, 0.0, 0.5, 0.4, 0.3]}, spread=0.0)
    assert summary.reach(rows, "4 units").mean == pytest.approx((0.0 + 0.5 + 0.4) / 3)
    assert summary.reach(rows, "4 units").stderr == 0


def test_standard_errors_are_over_seeds():
    rows = history({(4, False): FALLING}, spread=0.1)
    assert summary.final(rows, "4 units", "population/chi_pos").stderr == pytest.approx(0.01 * 0.1 / np.sqrt(3))
    assert np.isnan(summary.reach(history({(4, False): FALLING}, seeds=1), "4 units").stderr)


def test_findings_where_the_effects_are_there():
    rows = history({(16, False): FALLING, (64, False): LOWER, (64, True): FALLING})
    falls, ladder, stall = summary.findings(rows)
    assert falls.startswith("Learning moves into the tail")
    assert ladder.startswith("Larger networks reach further into the tail: 0.01")
    assert stall.startswith("Frozen features stall: reach 0.01 against 0.001")
    assert "grows by 1.00 against 6.00" in stall


def test_findings_where_they_are_not():
    rows = history({(16, False): LOWER, (64, False): FALLING, (64, True): LOWER})
    assert summary.findings(rows)[1].startswith("Larger networks do not reach further")
    assert summary.findings(rows)[2].startswith("Frozen features do not stall")
    flat = history({(16, False): [1.0] * 4, (64, False): [1.0] * 4})
    assert summary.findings(flat)[0].startswith("Learning does not move")
    unclear = history({(16, False): FALLING, (64, False): [0.99 * p for p in FALLING]}, spread=0.5)
    assert "not beyond two standard errors" in summary.findings(unclear)[1]


def test_schedule_starts_at_zero_and_ends_at_the_last_step():
    schedule = Settings(steps=100, points=10).schedule
    assert schedule[0] == 0
    assert schedule[-1] == 100
    assert schedule == sorted(set(schedule))


def test_images_are_new_each_time_and_reproducible():
    images, labels = np.arange(3 * 64, dtype=np.float32).reshape(3, 8, 8), np.arange(3, dtype=np.int32)
    x, y = data.draw(images, labels, 50, np.random.default_rng(0))
    again, _ = data.draw(images, labels, 50, np.random.default_rng(0))
    assert x.shape == (50, 64)
    assert x.dtype == np.float32
    assert np.array_equal(x, again)
    assert len(np.unique(x, axis=0)) == 50
    assert set(y) == {0, 1, 2}


def test_history_is_written_as_csv(tmp_path):
    rows = history({(4, False): FALLING})
    write_csv(rows, tmp_path / "history.csv")
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].startswith("network,width,frozen,seed,step")
    assert len(lines) == len(rows) + 1


def test_runs_are_written_for_the_other_commands(tmp_path, capsys):
    rows = history({(4, False): FALLING, (4, True): LOWER}, seeds=2)
    write_runs(rows, tmp_path / "runs")
    assert main(["compare", str(tmp_path / "runs")]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:5]]
    assert names == ["4-frozen-seed-0", "4-frozen-seed-1", "4-units-seed-0", "4-units-seed-1"]


@pytest.mark.parametrize("missing", ["rich", "sklearn", "matplotlib"])
def test_a_missing_extra_is_named(missing, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo", "--out", str(tmp_path / "out"), "--framework", "torch"]) == 1
    assert "pip install 'lnp[" in capsys.readouterr().err


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "1"])
    assert "expected at least 3 steps" in capsys.readouterr().err
