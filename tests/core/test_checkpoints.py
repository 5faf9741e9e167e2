"""Saved checkpoints are measured as a tracker in the run would have done, whatever interrupts it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.checkpoints.means import ends_of, row_of
from lnp.runs.curves import NOISE_SCALE, curve
from lnp.runs.table import compare
from lnp.tracking.net_rate import NO_ERROR, fall
from lnp.tracking.storage import lock

RNG = np.random.default_rng(5)
X, Y = RNG.standard_normal((24, 3)), RNG.standard_normal((24, 2))
STEPS = [0, 2, 4, 9]
COST = ("time", "seconds")


def load(step):
    """A model whose weights are a tenth of the step."""
    return lnp_numpy.LinearModel(weight=np.full((3, 2), step / 10) * [[1.0, -1.0]])


class Counting:
    """Loads as `load` does, counts, and fails at some steps."""

    def __init__(self, failing=(), stamps=()):
        self.calls, self.failing, self.stamps = [], failing, dict(stamps)

    def __call__(self, step):
        self.calls.append(step)
        if step in self.failing:
            raise OSError(f"checkpoint-{step} is truncated")
        return load(step)

    def stamp(self, step):
        return self.stamps.get(step, "")


def without_cost(rows):
    return [{name: value for name, value in row.items() if name not in COST} for row in rows]


@pytest.mark.parametrize("rate", [0.05, lambda step: 0.1 / (1 + step)], ids=["number", "schedule"])
def test_rows_are_those_of_a_tracker_in_the_run(tmp_path, rate):
    options = {"by_layer": True, "estimator": "per_sample", "max_probes": 2, "seed": 3}
    with lnp.Tracker(
        tmp_path / "run.jsonl", STEPS, batch=(X, Y), learning_rate=rate, tags={"width": 3}, **options
    ) as tracker:
        for step in range(10):
            tracker.observe(step, load(step))
    path = tmp_path / "measured.jsonl"
    measured = lnp.measure_checkpoints(load, STEPS, (X, Y), path, learning_rate=rate, tags={"width": 3}, **options)
    own = [{n: v for n, v in row.items() if not n.startswith("net/rate_per_")} for row in measured.history.rows()]
    expected = without_cost(tracker.history.rows())
    for row, other in zip(without_cost(own), expected, strict=True):
        assert list(row) == list(other)
        for name, value in other.items():
            assert row[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-12)), name
    assert "net/chi_pos" in own[-1]
    assert without_cost(lnp.History.read(path).rows()) == without_cost(measured.history.rows())
    assert compare(path)[0][2] == "9"


def test_the_fall_per_step_and_per_token():
    tags = {"tokens_per_step": 7}
    history = lnp.measure_checkpoints(load, STEPS, (X, Y), tags=tags).history
    losses = history["loss"]
    assert history["net/rate_per_step"][1:] == pytest.approx(-np.diff(losses) / np.diff(STEPS))
    assert history["net/rate_per_token"][1:] == pytest.approx(-np.diff(losses) / np.diff(STEPS) / 7)
    lost = ((X @ load(0).weight - Y) ** 2 - (X @ load(2).weight - Y) ** 2).mean(axis=1)
    assert history["net/rate_per_step_stderr"][1] == pytest.approx(lost.std(ddof=1) / 24**0.5 / 2)
    assert history["net/rate_per_token_stderr"][1] == pytest.approx(lost.std(ddof=1) / 24**0.5 / 14)
    assert "net/rate" not in history
    assert "net/chi_pos" not in history
    assert not history["notes"][1] if "notes" in history else True


def thirds():
    return [(X[i::3], Y[i::3]) for i in range(3)]


def test_several_batches_give_means_and_errors_over_them():
    history = lnp.measure_checkpoints(load, STEPS, thirds(), population=True).history
    single = [lnp.decompose(load(4), batch, estimator="exact", population=True) for batch in thirds()]
    row = history.rows()[2]
    for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
        values = [getattr(d, name) for d in single]
        assert row[name] == pytest.approx(np.mean(values)), name
        assert row[name + "_stderr"] == pytest.approx(np.std(values, ddof=1) / 3**0.5), name
    rate, noise = (np.mean([getattr(d.population, n) for d in single]) for n in ("rate", "gradient_noise"))
    assert row[NOISE_SCALE] == pytest.approx(noise / rate)
    assert curve(history, NOISE_SCALE).mean[2] in (pytest.approx(noise / rate), np.inf)  # where it is not resolved
    assert curve(history, "loss").stderr[2] == pytest.approx(row["loss_stderr"])
    assert row["loss_terms"] == 16
    assert row["samples"] == 8
    assert "means over 3 batches of 8 samples" in history.rows()[0]["notes"]


def test_a_checkpoint_that_is_gone_when_its_turn_comes_is_told_of(tmp_path):
    class Gone(Counting):
        def stamp(self, step):
            if step == 4:
                raise FileNotFoundError("step 4 is gone")
            return ""

    with pytest.raises(FileNotFoundError, match="step 4 is gone"):
        lnp.measure_checkpoints(Gone(), STEPS, (X, Y), tmp_path / "run.jsonl", on_error="raise")


@pytest.mark.parametrize("unit", [0, -1, "many", None])
def test_there_is_no_fall_per_token_without_a_number_of_them(unit):
    history = lnp.measure_checkpoints(load, STEPS[:2], (X, Y), tags={"tokens_per_step": unit}).history
    assert "net/rate_per_step" in history
    assert "net/rate_per_token" not in history


def test_the_net_rate_of_several_batches_is_that_of_all_their_samples():
    apart = lnp.measure_checkpoints(load, STEPS, thirds()).history
    whole = lnp.measure_checkpoints(load, STEPS, (X, Y)).history
    for name in ("net/loss_fall", "net/loss_fall_stderr", "net/rate_per_step_stderr"):
        assert apart[name][1:] == pytest.approx(whole[name][1:]), name


def test_what_a_net_rate_needs_of_several_batches():
    """The values of their row, with its errors over batches."""
    apart = [lnp.decompose(load(4), batch) for batch in thirds()]
    values, _ = row_of(apart)
    end = ends_of(4, apart, values)
    rate = "population/rate"
    assert (end.loss, end.rate, end.rate_stderr) == (values["loss"], values[rate], values[rate + "_stderr"])
    assert end.scales == pytest.approx(values["chi_loss"] * values["chi_net"])
    assert end.relative == pytest.approx(values["chi_net_stderr"] / values["chi_net"])


@pytest.mark.parametrize("count", [2, 3])
def test_parts_and_shares_of_several_batches_are_those_of_their_mean(count):
    apart = [lnp.decompose(load(4), batch, sample_losses=True) for batch in thirds()[:count]]
    end = ends_of(4, apart, row_of(apart)[0])
    losses = np.concatenate([((x @ load(4).weight - y) ** 2).mean(axis=1) for x, y in thirds()[:count]])
    assert end.parts == pytest.approx(losses / (8 * count))
    assert end.shares == pytest.approx(np.full(8 * count, 1 / (8 * count)))
    apart[1] = dataclasses.replace(apart[1], sample_losses=None)
    end = ends_of(4, apart, row_of(apart)[0])
    assert (end.parts, end.shares) == (None, None)


def test_values_that_one_of_several_batches_lacks_are_left_out():
    apart = [lnp.decompose(load(4), batch) for batch in thirds()]
    apart[1] = dataclasses.replace(apart[1], population=None)
    values, _ = row_of(apart)
    assert not [name for name in values if name.startswith("population/")]
    assert ends_of(4, apart, values).rate == values["rate"]


@pytest.mark.parametrize("rates", [(0.5, 0.25, 0.15), (1.0, -0.5, -0.5), (0.5, -1.0, 0.2)])
def test_a_noise_scale_is_a_ratio_of_means_and_infinite_where_nothing_is_learnt(rates):
    single = [lnp.decompose(load(4), batch) for batch in thirds()]
    apart = [
        dataclasses.replace(d, population=dataclasses.replace(d.population, rate=rate, gradient_noise=6.0))
        for d, rate in zip(single, rates, strict=True)
    ]
    values, _ = row_of(apart)
    assert values[NOISE_SCALE] == (pytest.approx(20.0) if sum(rates) > 0 else np.inf)
    assert NOISE_SCALE + "_stderr" not in values


def test_each_checkpoint_is_one_step_of_the_progress(monkeypatch):
    told = []
    monkeypatch.setattr("lnp.checkpoints.measure.bar", lambda what, total: contextlib.nullcontext(told.append))
    lnp.measure_checkpoints(load, STEPS, (X, Y))
    assert told == [1] * len(STEPS)


def test_a_fall_without_an_error_says_so():
    def square_of_mean(outputs, targets):
        mean = outputs[:, 0].mean()
        return mean**2, 2 * mean / len(outputs) * np.array([[1.0, 0.0]] * len(outputs))

    for loss, expected in ((square_of_mean, [False, True]), (None, [False, False])):
        rows = lnp.measure_checkpoints(load, STEPS[1:3], (X, Y), loss=loss).history.rows()
        assert [NO_ERROR in row.get("notes", "") for row in rows] == expected


def test_the_net_position_of_several_batches_is_in_units_of_their_mean_scales():
    """The scales are far below 1 here, where inputs are small."""
    batches = [(0.01 * x, y) for x, y in thirds()]
    rows = lnp.measure_checkpoints(load, STEPS[1:], batches, learning_rate=0.1).history.rows()
    for before, after in itertools.pairwise(rows):
        scales = [row["chi_loss"] * row["chi_net"] for row in (before, after)]
        assert max(scales) < 0.1
        assert after["net/rate"] == pytest.approx(after["net/loss_fall"] / 0.1 / after["net/steps"])
        assert after["net/chi_pos"] == pytest.approx(after["net/rate"] / np.sqrt(scales[0] * scales[1]))


def test_counts_of_batches_of_different_sizes_are_means_too():
    row = lnp.measure_checkpoints(load, [2], [(X[:5], Y[:5]), (X[5:11], Y[5:11])]).history.rows()[0]
    assert (row["samples"], row["loss_terms"]) == (5.5, 11)
    assert "means over 2 batches of 5, 6 samples" in row["notes"]


def test_the_seconds_of_a_row_are_those_of_its_measurement():
    started = time.perf_counter()
    history = lnp.measure_checkpoints(load, STEPS, (X, Y)).history
    assert min(history["seconds"]) > 0
    assert sum(history["seconds"]) < time.perf_counter() - started


def test_the_error_over_batches_covers_the_truth():
    """Of 200 drawings of four batches, a t-interval of 68.3% (3 degrees of freedom: 1.197) holds the loss of all."""
    rng, hits = np.random.default_rng(0), 0
    truth = 1.5**2 * 3 + 1.0  # (w x - y)^2 for independent x, y of variance 1
    for _ in range(200):
        drawn = [(rng.standard_normal((8, 3)), rng.standard_normal((8, 1))) for _ in range(4)]
        model = lnp_numpy.LinearModel(weight=np.full((3, 1), 1.5))
        found = [lnp.decompose(model, batch, estimator="exact", sample_losses=True) for batch in drawn]
        values, _ = row_of(found)
        hits += abs(values["loss"] - truth) < 1.197 * values["loss_stderr"]
        assert fall(ends_of(0, found, values), ends_of(1, found, values))[0] == 0
    assert 0.55 < hits / 200 < 0.82  # four standard errors


def test_what_is_measured_is_not_measured_again(tmp_path):
    path = tmp_path / "run.jsonl"
    lnp.measure_checkpoints(first := Counting(), STEPS[:2], (X, Y), path)
    before = path.read_bytes()
    again = lnp.measure_checkpoints(second := Counting(), STEPS, (X, Y), path)
    assert (first.calls, second.calls) == ([0, 2], [4, 9])
    assert path.read_bytes().startswith(before)
    assert list(again.history["step"]) == STEPS
    lnp.measure_checkpoints(third := Counting(stamps={4: "changed"}), STEPS, (X, Y), path, tags={"width": 1})
    assert third.calls == [4]
    assert list(lnp.History.read(path)["width"]) == [1] * 4


def test_a_part_that_a_disk_has_damaged_is_measured_again(tmp_path):
    lnp.measure_checkpoints(Counting(), STEPS, (X, Y), tmp_path / "run.jsonl")
    part = tmp_path / "run.jsonl.parts" / "4.json"
    text = part.read_text()
    place = text.index('"loss": ') + 10
    part.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    lnp.measure_checkpoints(counting := Counting(), STEPS, (X, Y), tmp_path / "run.jsonl")
    assert counting.calls == [4]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    lnp.measure_checkpoints(load, STEPS, (X, Y), path)
    for batches, options in (((X, -Y), {}), ((X, Y), {"by_layer": True}), ((X, Y), {"seed": 1})):
        with pytest.raises(ValueError, match="measured with other settings"):
            lnp.measure_checkpoints(load, STEPS, batches, path, **options)
    with pytest.raises(ValueError, match=r"checkpoints: .*load.* before, .*other.* now"):
        lnp.measure_checkpoints(other, STEPS, (X, Y), path)


def other(step):
    return load(step + 1)


def test_a_tracker_s_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "run.jsonl"
    with lnp.Tracker(path, 1) as tracker:
        tracker.observe(0, load(0), (X, Y))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="was not made of checkpoints"):
        lnp.measure_checkpoints(load, STEPS, (X, Y), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_checkpoint_that_fails_is_named_skipped_and_tried_again(tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.warns(UserWarning, match="step 2 was skipped: OSError: checkpoint-2 is truncated"):
        measured = lnp.measure_checkpoints(Counting(failing=[2]), STEPS, (X, Y), path)
    assert measured.skipped == {2: "OSError: checkpoint-2 is truncated"}
    assert list(measured.history["step"]) == [0, 4, 9]
    assert measured.history["net/steps"][1] == 4
    repaired = lnp.measure_checkpoints(counting := Counting(), STEPS, (X, Y), path)
    assert counting.calls == [2]
    assert list(repaired.history["net/steps"][1:]) == [2, 2, 5]
    with pytest.raises(OSError, match="truncated"):
        lnp.measure_checkpoints(Counting(failing=[2]), STEPS, (X, Y), on_error="raise")


def test_one_model_is_in_memory_at_a_time():
    alive = []

    def cyclic(step):
        assert not [model for model in alive if model() is not None]
        model = load(step)
        object.__setattr__(model, "itself", model)
        alive.append(weakref.ref(model))
        return model

    assert not lnp.measure_checkpoints(cyclic, STEPS, (X, Y)).skipped


def test_a_step_that_is_being_measured_is_not_waited_for(tmp_path):
    path, others = tmp_path / "run.jsonl", []

    def loading(step):
        if step == 4:
            measure = lambda: others.append(lnp.measure_checkpoints(loading, [4, 9], (X, Y), path))
            (other := threading.Thread(target=measure, daemon=True)).start()
            other.join(20)
            assert others, "it waits for this one"
        return load(step)

    measured = lnp.measure_checkpoints(loading, [4, 9], (X, Y), path, on_error="raise")
    assert (others[0].elsewhere, list(others[0].history["step"])) == ([4], [9])
    assert (measured.elsewhere, list(measured.history["step"])) == ([], [4, 9])


def test_what_another_process_measures_is_left_to_it(tmp_path):
    path = tmp_path / "run.jsonl"
    lnp.measure_checkpoints(Counting(), STEPS[:1], (X, Y), path)
    with open(tmp_path / "run.jsonl.parts" / "4.lock", "w") as file:
        lock(file.fileno())
        measured = lnp.measure_checkpoints(counting := Counting(), STEPS, (X, Y), path)
        assert counting.calls == [2, 9]
        assert measured.elsewhere == [4]
    lnp.measure_checkpoints(counting, STEPS, (X, Y), path)
    assert counting.calls == [2, 9, 4]


SLOW = """
import sys, time, numpy, lnp, lnp_numpy
def load(step):
    time.sleep(0.01)
    return lnp_numpy.LinearModel(weight=numpy.full((2, 1), step / 10))
print("started", flush=True)
lnp.measure_checkpoints(load, range(40), (numpy.eye(2), numpy.ones((2, 1))), sys.argv[1])
"""


def test_kills_and_several_processes_lose_nothing_that_was_measured(tmp_path):
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-c", SLOW, str(path)]
    generator, seen = random.Random(3), 0
    for _ in range(4):
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
        for run in runs:
            run.stdout.readline()
        time.sleep(generator.uniform(0.02, 0.15))
        for run in runs:
            run.kill()
            run.wait()
            run.stdout.close()
        parts = list((tmp_path / "run.jsonl.parts").glob("*[0-9].json"))
        assert len(parts) >= seen
        seen = len(parts)
        for part in parts:
            assert json.loads(part.read_bytes().partition(b" ")[2])["row"]["chi_net"] == 1.0
    assert seen > 0
    subprocess.run(command, check=True, capture_output=True)
    history = lnp.History.read(path)
    assert list(history["step"]) == list(range(40))
    assert history["loss"] == pytest.approx((1 - np.arange(40) / 10) ** 2)
    assert history["net/rate_per_step"][1:] == pytest.approx(-np.diff(history["loss"]))


def test_the_file_is_brought_up_to_date_where_that_takes_little_of_the_time(tmp_path, monkeypatch):
    """Writing takes a second by this clock, and loading ten: twenty seconds after a writing comes the next one."""
    path, now, seen = tmp_path / "run.jsonl", [0.0], []

    def clock():
        now[0] += 1
        return now[0]

    def slow(step):
        now[0] += 10
        seen.append(len(path.read_bytes().splitlines()))
        return load(step)

    monkeypatch.setattr("lnp.checkpoints.results.time", types.SimpleNamespace(perf_counter=clock))
    lnp.measure_checkpoints(slow, STEPS, (X, Y), path)
    assert seen == [0, 0, 2, 2]
    assert list(lnp.History.read(path)["step"]) == STEPS


def test_seeds_are_those_of_a_tracker_and_others_for_each_batch(monkeypatch):
    seeds, decompose = [], lnp.api.decompose

    @functools.wraps(decompose)
    def seen(*given, seed, **options):
        seeds.append(seed)
        return decompose(*given, seed=seed, **options)

    monkeypatch.setattr("lnp.api.decompose", seen)
    lnp.measure_checkpoints(load, [0, 1], thirds(), seed=3)
    assert seeds[0::3] == [3, 4]
    assert len(set(seeds)) == 6
    lnp.measure_checkpoints(load, [5], (X, Y))
    assert seeds[6:] == [5]


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_lose_nothing_but_the_measurement_in_flight(tmp_path):
    program = Path(__file__).with_name("killed_measuring.py")
    paths = os.pathsep.join([str(program.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", str(program), str(tmp_path / "run.jsonl"), "50"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["lost"] == 0
    assert 10 < seen["interrupted"] <= 50  # in flight, and nothing of it is left


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "run.jsonl"
    for arguments, options, error, match in (
        ((load, [], (X, Y)), {}, ValueError, "Expected one integer or more"),
        ((load, None, (X, Y)), {}, ValueError, "received no steps"),
        ((load, [-1], (X, Y)), {}, ValueError, "none below 0"),
        ((load, STEPS), {}, ValueError, "received no batches"),
        ((load, STEPS, []), {}, ValueError, "received no batches"),
        ((load, STEPS, (X, Y)), {"colour": 1}, TypeError, "colour"),
        ((load, STEPS, (X, Y)), {"tags": {"loss": 1}}, ValueError, "loss"),
        ((load, STEPS, (X, Y)), {"on_error": "stop"}, ValueError, "on_error"),
    ):
        with pytest.raises(error, match=match):
            lnp.measure_checkpoints(*arguments, **({"path": path} | options))
    assert not list(tmp_path.iterdir())
