"""The demo's words follow its numbers, either way, and what is missing is named."""

from __future__ import annotations

import csv
import json
import sys
from types import ModuleType

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.cli import main
from lnp.demo import Settings, data, screen, summary
from lnp.demo.run import network_name, train, write_csv
from lnp.runs.seeds import mean_over_seeds


def ladder(positions: dict[tuple[int, bool], list[float]], spread: float = 0.01, seeds: int = 3) -> dict:
    found: dict[str, list[lnp.History]] = {}
    for (width, frozen), values in positions.items():
        for seed in range(seeds):
            run = {
                "network": network_name(width, frozen),
                "width": width,
                "frozen": frozen,
                "seed": seed,
                "parameters": width,
            }
            rows = [
                {"step": step, "population/chi_pos": value * (1 + spread * (seed - 1)), "loss": 1.0}
                | {"population/chi_pos_stderr": 0.05 * value}
                | {"chi_net": 1.0 + step * (not frozen), **run}
                for step, value in enumerate(values)
            ]
            found.setdefault(network_name(width, frozen), []).append(lnp.History(rows))
    return found


class Trainer:
    """Stands in for a backend's: a linear model that stays as it is, and notes which steps were taken."""

    model, trained = lnp_numpy.LinearModel(weight=np.full((4, 3), 0.1)), 12

    def __init__(self):
        self.taken = []

    def arrays(self, batch):
        return batch

    def train(self, start, stop):
        self.taken += range(start, stop)


def new_images(count):
    generator = np.random.default_rng(0)
    return [(generator.standard_normal((8, 4)), np.arange(8) % 3) for _ in range(count)]


FLAT = [0.0106, 0.0103, 0.0102, 0.0101, 0.0100, 0.0099, 0.0098]
FALLING = [1.0, 0.1, 0.02, *FLAT]
LOWER = [1.0, 0.1, 0.002, *[0.1 * value for value in FLAT]]


def test_reach_is_that_of_the_runs_averaged():
    runs = ladder({(4, False): FALLING}, spread=0.1)["4 units"]
    assert summary.reach(runs) == lnp.reach_of_runs([run.reach() for run in runs])
    assert summary.reach(runs).chi_pos == pytest.approx(0.01)


def test_standard_errors_are_over_seeds():
    runs = ladder({(4, False): FALLING}, spread=0.1)["4 units"]
    assert summary.last_value(runs, "population/chi_pos").stderr == pytest.approx(0.0098 * 0.1 / np.sqrt(3))
    assert summary.reach(runs).stderr >= 0.01 * 0.1 / np.sqrt(3)


def test_curves_are_means_over_seeds_with_their_errors():
    runs = ladder({(4, False): FALLING}, spread=0.1)["4 units"]
    line = mean_over_seeds(runs, "population/chi_pos")
    assert line.step.tolist() == list(range(10))
    assert line.mean == pytest.approx(np.array(FALLING))
    assert line.stderr == pytest.approx(0.1 * np.array(FALLING) / np.sqrt(3))


def test_findings_where_the_effects_are_there():
    runs = ladder({(16, False): FALLING, (64, False): LOWER, (64, True): FALLING})
    falls, larger, stall = summary.findings(runs)
    assert falls.startswith("Learning moves into the tail")
    assert larger.startswith("Larger networks reach further into the tail: 0.01")
    assert stall.startswith("Frozen features stall: reach 0.0100 ± ")
    assert " against 0.00100 ± " in stall
    assert "grows by 1.00 against 10.00" in stall


def test_findings_where_they_are_not():
    runs = ladder({(16, False): LOWER, (64, False): FALLING, (64, True): LOWER})
    assert summary.findings(runs)[1].startswith("Larger networks do not reach further")
    assert summary.findings(runs)[2].startswith("Frozen features do not stall")
    flat = ladder({(16, False): [1.0] * 4, (64, False): [1.0] * 4})
    assert summary.findings(flat)[0].startswith("Learning does not move")
    unclear = ladder({(16, False): FALLING, (64, False): [0.99 * p for p in FALLING]}, spread=0.5)
    assert "not beyond two standard errors" in summary.findings(unclear)[1]


def test_schedule_starts_at_zero_and_ends_at_the_last_step():
    for steps in (3, 100, 300, 3000):
        measurements = Settings(steps=steps).measurements
        even = np.geomspace(1, steps, 20).round().astype(int)
        assert measurements == [0, *sorted(set(even.tolist()))]


def test_a_tracker_measures_each_time_on_new_images(tmp_path):
    settings, trainer, advanced = Settings(steps=10, points=4), Trainer(), []
    new = new_images(len(settings.measurements))
    tags = {"network": "3 units", "width": 3, "frozen": False, "seed": 0}
    path = tmp_path / "runs" / "run.jsonl"
    for _ in range(2):  # the second time in the place of the first
        history = train(trainer, settings, new, tags, path, advanced.append)
    assert trainer.taken == [*range(10)] * 2
    assert history["step"].tolist() == settings.measurements == [0, 1, 2, 5, 10]
    expected = [lnp.decompose(trainer.model, batch, population=True) for batch in new]
    assert history["rate"] == pytest.approx([d.rate for d in expected])
    assert history["population/chi_pos"] == pytest.approx([d.population.chi_pos for d in expected])
    assert set(history["network"]) == {"3 units"}
    assert set(history["parameters"]) == {12}
    written = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert written == settings.measurements
    assert advanced == [1] * 10


def test_images_are_new_each_time_and_reproducible():
    images, labels = np.arange(3 * 64, dtype=np.float32).reshape(3, 8, 8), np.arange(3, dtype=np.int32)
    x, y = data.draw(images, labels, 50, np.random.default_rng(0))
    again, _ = data.draw(images, labels, 50, np.random.default_rng(0))
    assert x.shape == (50, 64)
    assert x.dtype == np.float32
    assert np.array_equal(x, again)
    assert len(np.unique(x, axis=0)) == 50
    assert set(y) == {0, 1, 2}


def test_positions_are_shown_in_millionths_and_the_rest_as_it_is():
    factors = {column: factor for _, column, factor in screen.COLUMNS}
    positions = {"chi_pos", "population/chi_pos"}
    assert factors == {column: 1e6 if column in positions else 1 for column in factors}
    assert positions < factors.keys()


def test_history_is_written_as_csv(tmp_path):
    write_csv(ladder({(4, False): FALLING, (4, True): LOWER}), tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["network", "width", "frozen", "seed", "step"]
    assert [row["network"] for row in rows] == ["4 units"] * 30 + ["4 frozen"] * 30
    assert [float(row["population/chi_pos"]) for row in rows[40:50]] == LOWER


def test_runs_are_written_for_the_other_commands(tmp_path, capsys):
    settings = Settings(steps=10, points=4)
    for seed in range(2):
        tags = {"network": "4 units", "width": 4, "frozen": False, "seed": seed}
        train(Trainer(), settings, new_images(5), tags, tmp_path / f"4-units-seed-{seed}.jsonl")
    assert main(["compare", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:3]]
    assert [line[:3] for line in lines] == [["4-units-seed-0", "12", "10"], ["4-units-seed-1", "12", "10"]]


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_a_missing_extra_is_named_before_the_work(missing, monkeypatch, tmp_path, capsys):
    for module in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None if module == missing else ModuleType(module))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert f"lnp demo needs {missing}, which is not installed. Run: pip install 'lnp[demo]'" in capsys.readouterr().err


def test_missing_data_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn.*lnp\[demo\]"):
        data.digits()


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "1"])
    assert "expected at least 3 steps" in capsys.readouterr().err
