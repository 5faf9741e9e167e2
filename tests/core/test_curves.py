"""What figures and tables say about a run is what its rows say."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

import lnp
from lnp import cli
from lnp.cli import main
from lnp.runs.curves import MOST_POINTS, compute, curve, is_frozen, reach, stall_step, summary
from lnp.runs.open_runs import open_runs
from lnp.runs.table import compare, number, to_text, with_error
from lnp.tracking.history import History


def row(step, **more):
    return {"step": step, "loss": 1 / (1 + step), "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 0.5} | more


def history(column, values, **more):
    return History([{"step": step, column: value, **more} for step, value in enumerate(values)])


def test_windows_are_averaged_with_the_error_of_their_mean():
    values = [1.0, 2.0, 6.0, 10.0, 20.0]
    windows = [0, 1, 1, 1, 4]
    rows = [
        {"step": s, "chi_net": v, "window": w, "chi_net_stderr": 0.5}
        for s, (v, w) in enumerate(zip(values, windows, strict=True))
    ]
    line = curve(History(rows), "chi_net")
    assert line.step.tolist() == [0, 2, 4]
    assert line.mean.tolist() == [1.0, 6.0, 20.0]
    assert line.stderr == pytest.approx([0.5, np.std([2, 6, 10], ddof=1) / math.sqrt(3), 0.5])
    assert (line.first.tolist(), line.last.tolist()) == ([0, 1, 4], [0, 3, 4])
    assert (line.low.tolist(), line.high.tolist()) == ((line.mean - line.stderr).tolist(), [1.5, line.high[1], 20.5])
    assert line.high[1] == line.mean[1] + line.stderr[1]


def in_windows(rates, error):
    """Windows of three rows, each of which says the same error."""
    rows = [{"step": s, "window": s // 3, "population/rate": float(v)} for s, v in enumerate(rates)]
    return curve(History([row | {"population/rate_stderr": error} for row in rows]), "population/rate")


def test_windows_of_the_same_samples_have_the_error_of_those():
    """On a tracker's own batch rows scatter little, and their mean is as uncertain as one."""
    scatter = np.random.default_rng(0).normal(size=36)
    spread = scatter.reshape(-1, 3).std(axis=1, ddof=1) / 3**0.5
    alike = in_windows(1 + 0.01 * scatter, 0.5)
    assert alike.stderr == pytest.approx(np.hypot(0.5, 0.01 * spread))
    assert in_windows(1 + 0.5 * scatter, 0.5).stderr == pytest.approx(0.5 * spread)
    assert in_windows(1 + 0.5 * scatter, 0.0).stderr == pytest.approx(0.5 * spread)
    scatter[:9] = 0.0  # three windows of twelve, by chance
    assert in_windows(1 + 0.5 * scatter, 0.5).stderr == pytest.approx(np.r_[0, 0, 0, 0.5 * spread[3:]])


@pytest.mark.parametrize(("size", "count"), [(2, 12), (3, 1)])
def test_any_windows_of_the_same_samples_have_the_error_of_those(size, count):
    """Of two rows, or one window alone; of a fifth of the errors' size, whose square is below a tenth."""
    scatter = np.resize([-0.1, 0.1, 0.1], (count, size))
    rows = [
        {"step": s, "window": s // size, "population/rate": float(v), "population/rate_stderr": 0.5}
        for s, v in enumerate(1 + scatter.reshape(-1))
    ]
    spread = scatter.std(axis=1, ddof=1) / size**0.5
    assert curve(History(rows), "population/rate").stderr == pytest.approx(np.hypot(0.5, spread))


def test_rows_without_the_value_are_left_out():
    rows = [{"step": 0, "a": 1.0}, {"step": 1}, {"step": 2, "a": math.nan}, {"step": 3, "a": 5.0}]
    assert curve(History(rows), "a").step.tolist() == [0, 3]
    assert curve(History(rows), "b").step.tolist() == []
    assert curve(History(), "a").step.tolist() == []


def noisy(rates, scales, windows, **more):
    names = ("population/rate", "population/gradient_noise", "window")
    values = (np.array(rates), np.array(scales) * np.array(rates), windows)
    return History(
        {"step": i, **dict(zip(names, row, strict=True)), "population/noise_scale": 0.0, **more}
        for i, row in enumerate(zip(*(np.asarray(v).tolist() for v in values), strict=True))
    )


def test_the_noise_scale_is_a_ratio_of_means():
    rate, scale = np.array([1.0, 1.1, -0.5, 0.2]), np.array([10.0, 9.0, -40.0, 100.0])
    run = noisy(rate, scale, [0, 0, 2, 2])
    line = curve(run, "population/noise_scale")
    # the second window's rate is not above its error, so that only a lower limit is known
    assert line.mean[0] == pytest.approx((10.0 + 9.9) / 2.1)
    assert line.mean[1] == math.inf
    whole = rate * (1 + scale)
    share = 2.1 / whole[:2].sum()
    error = np.std((rate - share * whole)[:2], ddof=1) / math.sqrt(2) / whole[:2].mean()
    assert (line.low[0], line.high[0]) == pytest.approx((1 / (share + error) - 1, 1 / (share - error) - 1))
    assert line.stderr[0] == pytest.approx((line.high[0] - line.low[0]) / 2)
    share = -0.3 / whole[2:].sum()
    error = np.std((rate - share * whole)[2:], ddof=1) / math.sqrt(2) / whole[2:].mean()
    assert line.low[1] == pytest.approx(1 / (2 * error) - 1)


def test_a_noise_scale_within_two_errors_of_the_rate_is_a_limit():
    for stderr, expected, low in ((0.4, 8.0, 9 / 1.4 - 1), (0.6, math.inf, 9 / 2.2 - 1)):
        line = curve(noisy([1.0], [8.0], [0], **{"population/rate_stderr": stderr}), "population/noise_scale")
        assert (line.mean[0], line.low[0]) == pytest.approx((expected, low))


def test_a_rate_below_zero_without_an_error_has_no_noise_scale():
    rows = [{"step": 0, "population/rate": -1.0, "population/gradient_noise": 8.0, "population/noise_scale": -8.0}]
    with warnings.catch_warnings(action="error"):
        line = curve(History(rows), "population/noise_scale")
    assert line.mean.tolist() == [math.inf]


def test_the_error_of_rows_that_scatter_is_that_of_their_spread():
    rows = np.array([1.0, 1.4, 0.6])
    without, having = (
        curve(noisy(rows, 8 / rows, [0, 0, 0], **more), "population/noise_scale")
        for more in ({}, {"population/rate_stderr": 0.1})
    )
    assert (having.low[0], having.high[0]) == (without.low[0], without.high[0])


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_noise_scale_of_any_size(scale):
    assert curve(noisy([2.0], [scale], [0]), "population/noise_scale").mean[0] == pytest.approx(scale)


def test_files_without_the_gradient_noise():
    rows = [{"step": 0, "population/rate": 2.0, "population/noise_scale": 8.0, "population/rate_stderr": 0.1}]
    assert curve(History(rows), "population/noise_scale").mean[0] == pytest.approx(8.0)


def test_windows_of_a_noise_scale_cover_where_noise_dominates():
    """Windows of 20 measurements whose rate is a tenth to twice its error: the truth is in the interval of one standard
    error, or above the limit, in 60% and more."""
    rng, hits = np.random.default_rng(0), []
    for scale in (30.0, 100.0, 1000.0):
        for _ in range(60):
            rates = 1 + scale / 16 * rng.standard_normal(20)
            run = noisy(rates, (scale * (1 + 0.1 * rng.standard_normal(20))) / rates, [0] * 20)
            line = curve(run, "population/noise_scale")
            assert line.mean[0] >= 0
            hits.append(line.low[0] <= scale and (math.isinf(line.mean[0]) or scale <= line.high[0]))
    assert np.mean(hits) > 0.62


def test_long_histories_become_few_points():
    line = curve(history("loss", np.arange(50_000.0)), "loss")
    assert len(line.step) <= MOST_POINTS + 1
    assert np.average(line.mean, weights=line.last - line.first + 1) == pytest.approx(24_999.5)


def test_stretches_are_even_in_the_logarithm_of_the_step():
    steps = [*range(500), 10**6]
    line = curve(History([{"step": step, "loss": 1.0} for step in steps]), "loss")
    places = [int(MOST_POINTS * math.log1p(step) / math.log1p(10**6)) for step in steps]
    firsts = [step for i, step in enumerate(steps) if i == 0 or places[i] > places[i - 1]]
    assert line.first.tolist() == firsts
    assert MOST_POINTS / 4 < len(firsts) < MOST_POINTS


def test_reach_is_that_of_the_population_where_it_is_known():
    values = [1.0, 0.5, 0.0, 0.4, 0.3, 0.9, 1.0]
    both = history("population/chi_pos", values, chi_pos=7.0, **{"population/chi_pos_stderr": 0.3})
    assert reach(both) == lnp.reach(range(7), values, [0.3] * 7)
    assert reach(history("chi_pos", [0.5, 0.2])).chi_pos == pytest.approx(0.35)
    assert reach(history("loss", [1.0])).window == 0
    assert math.isnan(reach(history("loss", [1.0])).chi_pos)


def test_a_reach_that_is_no_value_is_shown_as_a_limit():
    values = [1.0, 0.5, 0.1, -0.1, 0.1, 0.0, -0.1, 0.1]
    run = history("population/chi_pos", values, loss=1.0, chi_loss=1.0, **{"population/chi_pos_stderr": 0.2})
    assert compare({"a": run})[0][4] == f"below {number(run.reach().limit)}"


def test_compute_is_six_n_d():
    run = history("loss", [1.0, 0.5, 0.2], parameters=1000, tokens_per_step=50)
    assert compute(run) == 6 * 1000 * 50 * 2
    assert math.isnan(compute(history("loss", [1.0], parameters=1000)))
    assert math.isnan(compute(history("loss", [1.0], tokens_per_step=50)))
    assert math.isnan(compute(history("loss", [1.0], parameters=1000, tokens_per_step="many")))
    assert math.isnan(compute(history("loss", [1.0], parameters="many", tokens_per_step=50)))
    assert math.isnan(compute(History()))


def test_a_factor_stalls_where_it_stops_changing():
    moving = np.exp(-np.arange(40) / 2.0)
    assert math.isnan(stall_step(history("chi_loss", moving), "chi_loss"))
    settled = np.where(np.arange(40) < 10, moving, moving[10])
    # within 25% of the end from step 10 on; averaged over three points, one step later
    assert stall_step(history("chi_loss", settled), "chi_loss") in (9, 10, 11)
    assert stall_step(history("chi_loss", 1 / settled), "chi_loss") in (9, 10, 11)
    assert stall_step(history("chi_loss", np.ones(40)), "chi_loss") == 1
    assert stall_step(history("chi_loss", np.ones(4)), "chi_loss") == 1  # two points, where three are averaged
    late = np.where(np.arange(40) < 30, np.exp(-np.arange(40) / 20.0), np.exp(-1.5))
    assert math.isnan(stall_step(history("chi_loss", late), "chi_loss"))  # seen for less than half as long again
    assert math.isnan(stall_step(history("chi_loss", [1.0]), "chi_loss"))
    assert math.isnan(stall_step(history("chi_loss", -np.ones(9)), "chi_loss"))
    assert math.isnan(stall_step(history("loss", np.ones(9)), "chi_loss"))


def test_a_run_says_by_its_tag_that_it_is_frozen():
    assert is_frozen(history("loss", [1.0], frozen=True))
    assert not is_frozen(history("loss", [1.0], frozen=False))
    assert not is_frozen(history("loss", [1.0]))
    assert is_frozen(History([{"step": 0, "frozen": 0}, {"step": 1, "frozen": 1}]))
    assert not is_frozen(History([{"step": 0, "frozen": 1}, {"step": 1, "frozen": 0}]))
    assert not is_frozen(history("loss", [1.0], frozen=2))
    assert not is_frozen(history("loss", [1.0], frozen="yes"))
    assert not is_frozen(History())


def test_summary():
    rows = [
        {"step": s, "loss": 2.0 - s, "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 0.5, "parameters": 7} for s in (0, 1)
    ]
    s = summary(History(rows))
    assert (s.rows, s.last_step, s.parameters, s.first_loss, s.loss, s.reach.chi_pos) == (2, 1, 7.0, 2.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="no rows"):
        summary(History())


def test_numbers_as_people_read_them():
    values = (0.0, 1.5, 1234.5, 2.93e-5, 1e9, -0.25, math.nan, math.inf)
    assert [number(v) for v in values] == ["0", "1.5", "1,234", "2.9e-05", "1.0e+09", "-0.25", "-", "-"]
    values = (-5000.0, 1.2e7, 0.0012, -2e-4)
    assert [number(v) for v in values] == ["-5,000", "1.2e+07", "0.0012", "-2.0e-04"]
    assert with_error(0.5, 0.01) == "0.500 ± 0.010"
    assert with_error(0.5, math.nan) == "0.5"
    assert with_error(1234.5, 0.0) == "1,234"


def write(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"step": s, "loss": 1.0 / (1 + s), "chi_loss": 1.0, "chi_net": 2.0, "chi_pos": 0.5}
            for s in range(5 + index)
        ]
        History(rows).to_jsonl(folder / name)


def test_files_of_one_name_are_named_with_as_many_folders_as_it_takes(tmp_path):
    deep = "/".join(map(str, range(len(tmp_path.parts) + 3)))
    paths = [f"x/{deep}/run.jsonl", f"y/{deep}/run.jsonl", "run.jsonl"]
    write(tmp_path, *paths)
    names = list(open_runs([tmp_path / path for path in paths]))
    assert names[:2] == [f"x/{deep}/run", f"y/{deep}/run"]
    assert names[2].endswith("/run")


def test_runs_are_named_after_their_files(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, "w16.jsonl", "w2.jsonl", "a/run.jsonl", "b/run.jsonl")
    assert list(open_runs(tmp_path)) == ["w2", "w16"]
    assert list(open_runs([tmp_path / "a" / "run.jsonl", str(tmp_path / "b")])) == ["a/run", "b/run"]
    assert list(open_runs({"x": History()})) == ["x"]
    assert list(open_runs(History())) == ["run 0"]
    with pytest.raises(FileNotFoundError, match=r"no .jsonl file"):
        open_runs(tmp_path / "empty")
    with pytest.raises(TypeError, match="A run is of type int"):
        open_runs([3])


def test_compare_prints_a_table(tmp_path, capsys):
    write(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "c.jsonl").touch()
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "a", "b"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "nothing has been measured yet in c" in printed.err
    assert to_text(compare(tmp_path)) in printed.out


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path):
    """As in `lnp compare runs | head -1`."""
    write(tmp_path, "a.jsonl")
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lnp", "compare", str(tmp_path)]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, check=False)
    os.close(written)
    assert (done.stderr, done.returncode) == (b"", 141)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_command_that_is_left_has_the_status_of_a_closed_pipe():
    assert cli.LEFT == 128 + signal.SIGPIPE


def test_what_cannot_be_read_is_said(tmp_path, capsys, monkeypatch):
    assert main(["compare", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert main(["plot", str(tmp_path / "empty.jsonl")]) == 1
    assert "no measurements to show" in capsys.readouterr().err
    write(tmp_path, "a.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "a.png")]) == 1
    assert "pip install 'lnp[plot]'" in capsys.readouterr().err
