"""Spectral reach of runs: unbiased under the choice of the window, with an error that covers the truth."""

import inspect

import numpy as np
import pytest

import lnp
from lnp.runs import curves
from lnp.tracking.history import History

STEPS = [1, 10, 100, 1000, 10000, 100000]


def windows_of(positions, window):
    """For each half that chooses: the rows of the other half in the lowest window."""
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(len(positions)), window)
    found = []
    for half in (0, 1):
        own = np.where(windows % 2 == half, np.asarray(positions)[windows], np.nan)
        lowest = windows[np.argmin(np.nanmean(own, axis=1))]
        found.append(lowest[lowest % 2 != half])
    return found


def test_one_half_chooses_the_other_is_averaged():
    rng = np.random.default_rng(0)
    for window in (2, 3, 4, 7):
        y = rng.normal(size=12)
        rows = windows_of(y, window)
        r = lnp.reach(np.arange(1, 13), y, np.full(12, 1.2), window=window)
        assert r.chi_pos == pytest.approx(np.mean([y[own].mean() for own in rows]))
        one, other = (1.2 / len(own) ** 0.5 for own in rows)
        assert r.stderr == pytest.approx((one**2 + other**2 + 0.72 * one * other) ** 0.5 / 2)
        assert r.step == pytest.approx(np.exp(np.mean([np.mean(np.log(own + 1)) for own in rows])))
        assert (r.window, r.runs) == (window, 1)


def test_a_window_that_is_fixed():
    """The last one, or all measurements: plain means with plain errors."""
    y, e = [0.5, 0.1, 0.4, 0.2, 0.26, 0.2], [0.1, 0.3, 0.3, 0.4, 0.3, 0.3]
    last = lnp.reach(STEPS, y, e, window="last", size=2)
    assert (last.chi_pos, last.stderr, last.window) == pytest.approx((0.23, 0.18**0.5 / 2, 2))
    assert last.step == pytest.approx(10**4.5)
    whole = lnp.reach(STEPS, y, e, window=6)
    assert (whole.chi_pos, whole.stderr) == pytest.approx((np.mean(y), np.sum(np.square(e)) ** 0.5 / 6))
    assert lnp.reach(STEPS, y, e, window="last").window == 5
    assert lnp.reach([3], [0.1], [0.02], window=1).stderr == pytest.approx(0.02)
    assert np.isnan(lnp.reach([3], [0.1], window=1).stderr)


def test_errors_are_raised_where_neighbours_scatter_more():
    y = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    square = np.mean(np.diff(y, n=2) ** 2)
    scattered = lnp.reach(STEPS, y, [0.1] * 6, window=6)
    assert scattered.stderr == pytest.approx((square / 6 / 6) ** 0.5)
    assert lnp.reach(STEPS, y, window=6).stderr == pytest.approx((square / 6 / 6) ** 0.5)
    for unknown in (np.nan, 0.0):
        assert lnp.reach(STEPS, y, [0.1, 0.1, unknown, 0.1, 0.1, 0.1], window=6).stderr == scattered.stderr
    line, zigzag = np.arange(6.0, 0.0, -1.0), 0.05 * np.array([1, -1, 1, -1, 1, -1])
    assert lnp.reach(STEPS, line + zigzag, [0.1] * 6, window=6).stderr == pytest.approx(0.1 / 6**0.5)  # no trend's


def test_measurements_of_the_same_samples_have_one_error():
    """Which their scatter shows: a window has the error of a single one then, however many it averages."""
    line, zigzag = np.arange(6.0, 0.0, -1.0), 0.01 * np.array([1, -1, 1, -1, 1, -1])
    assert lnp.reach(STEPS, line, [0.1] * 6, window=6).stderr == pytest.approx(0.1)
    scattered = 16 * 0.01**2 / 6 / 6  # second differences of 4 x 0.01, of variance 6, in a mean over 6
    found = lnp.reach(STEPS, line + zigzag, [0.1] * 6, window="last", size=6).stderr
    assert found == pytest.approx((0.1**2 + scattered) ** 0.5)
    rng = np.random.default_rng(0)
    truth, inside = 10 ** -np.linspace(0, 1, 40), 0
    for _ in range(300):
        y = truth + rng.normal(0, 0.03) + rng.normal(0, 0.002, 40)
        found = lnp.reach(range(1, 41), y, [0.03] * 40)
        inside += abs(found.chi_pos - 0.107) < found.stderr
    assert 0.6 < inside / 300 < 0.76
    assert lnp.reach([1, 2], [1.0, 3.0], window=2).stderr == pytest.approx(1.0)


@pytest.mark.parametrize(("size", "around"), [(3, 6), (4, 6), (8, 8)])
@pytest.mark.parametrize("count", [60, 12])
def test_the_error_comes_from_the_neighbours_around_the_window(size, around, count):
    """From second differences of the window and as many again to each side, or of 15 in all."""
    y = np.random.default_rng(0).normal(size=count)
    found = lnp.reach(range(1, count + 1), y, window="last", size=size)
    second = np.diff(y[max(0, count - size - around) :], 2)
    assert found.stderr == pytest.approx((np.mean(second**2) / 6 / size) ** 0.5, rel=1e-12)
    assert found.chi_pos == pytest.approx(np.mean(y[-size:]), rel=1e-12)


def test_windows_of_one_measurement_choose_nothing():
    """The lowest stands alone in its group, so that no half of it is left: the two others decide."""
    found = lnp.reach(range(5), [1.0, 1.2, -9.0, 0.5, 0.7], [0.1] * 5, window=1, groups=[0, 0, 1, 2, 2])
    assert found.chi_pos == pytest.approx(0.6)


def test_below_two_errors_it_is_a_limit():
    for value, text, limit in ((0.3, "0.30 ± 0.10", np.nan), (0.19, "below 0.39", 0.39), (-0.5, "below 0.2", 0.2)):
        found = lnp.Reach(value, 0.1, 10.0, 5)
        assert (str(found), found.resolved) == (text, np.isnan(limit))
        assert found.limit == pytest.approx(limit, nan_ok=True)
    assert str(lnp.Reach(0.5, np.nan, 1.0, 1)) == "0.5"


def test_a_reach_of_two_errors_is_a_value():
    assert lnp.Reach(0.2, 0.1, 1.0, 5).resolved
    assert not lnp.Reach(0.19, 0.1, 1.0, 5).resolved


def test_missing_positions():
    y = [0.5, 0.1, -0.02, np.nan, -0.01, -0.03]
    kept = [i for i in range(6) if i != 3]
    expected = lnp.reach(np.array(STEPS)[kept], np.array(y)[kept], [0.01] * 5, window=3)
    assert lnp.reach(STEPS, y, [0.01] * 6, window=3) == expected
    assert np.isnan(lnp.reach(STEPS, [np.nan] * 6, window=2).chi_pos)
    assert lnp.reach([0, 2, 4], [3, 2, 1], window=3).step == 2  # step 0 has no logarithm


def test_windows_of_the_schedule_are_what_counts():
    y = np.random.default_rng(1).normal(size=12)
    groups = np.repeat([0, 10, 100, 1000], 3)
    found = lnp.reach(np.arange(12), y, np.full(12, 9.0), window=2, groups=groups)
    halves = np.arange(12) % 2
    starts, chosen = (0, 3, 6), []
    for half in (0, 1):
        lowest = min((np.arange(s, s + 6) for s in starts), key=lambda own: y[own[halves[own] == half]].mean())
        chosen.append(y[lowest[halves[lowest] != half]].mean())
    assert found.chi_pos == pytest.approx(np.mean(chosen))
    alone = lnp.reach(np.arange(12), y, np.full(12, 9.0), window="last", size=1, groups=groups)
    assert alone.chi_pos == pytest.approx(y[9:].mean())
    assert lnp.reach(np.arange(12), y, window=1, groups=groups).window == 1  # three measurements in each


def test_a_history_says_the_same():
    rng = np.random.default_rng(2)
    steps, y, e = np.arange(1, 21), rng.normal(1, 0.3, 20), np.full(20, 0.3)
    rows = [
        {"step": s, "chi_pos": 9.0, "population/chi_pos": v, "population/chi_pos_stderr": 0.3}
        for s, v in zip(steps.tolist(), y.tolist(), strict=True)
    ]
    history = History(rows)
    assert history.reach() == lnp.reach(steps, y, e)
    assert history.reach(window="last", size=3) == lnp.reach(steps, y, e, window="last", size=3)
    windows = [row | {"window": 4 * (n // 4)} for n, row in enumerate(rows)]
    grouped = lnp.reach(steps, y, e, window=2, groups=np.arange(20) // 4)
    assert History(windows).reach(window=2) == grouped
    assert History(rows[:2]).reach().window == 2
    assert History([{"step": 0, "chi_pos": 0.5}]).reach().chi_pos == 0.5
    assert np.isnan(History([{"step": 0, "loss": 0.5}]).reach().chi_pos)


TRUTHS = {"constant": lambda n: np.ones(n), "falling": lambda n: np.geomspace(30.0, 1.0, n)}


@pytest.mark.parametrize(
    ("points", "window", "said"),
    [(10, 5, 1.0), (14, 4, 1.0), (40, 5, 1.0), (200, 5, 1.0), (14, 4, 0.5), (40, 5, 0.5), (40, 5, None)],
)
@pytest.mark.parametrize("truth", TRUTHS)
def test_coverage(truth, points, window, said):
    """Over draws at single errors of 0.2 to 2 of the truth, fixed seed: the mean of the truth in the windows that were
    chosen lies within one standard error in 64% to 88%, within two in 92% or more, and the reach is unbiased for it;
    also where errors are said half as large as they are, or not at all.
    """
    rng, true = np.random.default_rng(points), TRUTHS[truth](points)
    off = []
    for relative in np.tile([0.2, 0.5, 1.0, 2.0], 60):
        y = true * (1 + relative * rng.standard_normal(points))
        errors = None if said is None else said * relative * true
        found = lnp.reach(np.arange(points), y, errors, window=window)
        expected = np.mean([true[rows].mean() for rows in windows_of(y, window)])
        off.append([(found.chi_pos - expected) / relative, (found.chi_pos - expected) / found.stderr])
    off = np.array(off)
    bias = off[:, 0].mean() / (off[:, 0].std() / len(off) ** 0.5)
    assert abs(bias) < 3.5
    least = (0.60, 0.88) if said is None else (0.64, 0.92)
    within = [np.mean(np.abs(off[:, 1]) < k) for k in (1, 2)]
    assert least[0] < within[0] < 0.88, within
    assert least[1] < within[1], within


def test_limits_hold():
    """Where the truth is far below the error, 97% of the limits and more lie above it."""
    rng = np.random.default_rng(5)
    found = [lnp.reach(range(30), rng.normal(0.02, 1.0, 30), np.ones(30)) for _ in range(200)]
    limits = np.array([r.limit if not r.resolved else r.chi_pos for r in found])
    assert np.mean(limits > 0.02) > 0.95
    assert np.mean([not r.resolved for r in found]) > 0.9


def test_runs():
    runs = [lnp.reach(STEPS, np.array([0.5, 0.2, 0.1, 0.2, 0.3, 0.3]) * f, window=2) for f in (1.0, 1.2, 1.4)]
    mean = lnp.reach_of_runs(runs)
    values = [run.chi_pos for run in runs]
    assert mean.chi_pos == pytest.approx(np.mean(values))
    own = sum(run.stderr**2 for run in runs) ** 0.5 / 3
    assert mean.stderr == pytest.approx(max(own, np.std(values, ddof=1) / 3**0.5))
    assert (mean.runs, mean.step) == (3, pytest.approx(runs[0].step))
    assert lnp.reach_of_runs(runs[:1]).stderr == runs[0].stderr
    close = [lnp.Reach(0.1 * f, 0.03, 10.0, 2) for f in (1.0, 1.001, 1.002)]
    assert lnp.reach_of_runs(close).stderr == pytest.approx(0.03 / 3**0.5)
    apart = [lnp.Reach(f, 0.03, 10.0, 2) for f in (1.0, 2.0)]
    assert lnp.reach_of_runs(apart).stderr == pytest.approx(0.5)
    unknown = [lnp.Reach(0.1 * f, np.nan, 10.0, 1) for f in (1.0, 1.1)]
    assert lnp.reach_of_runs(unknown).stderr == pytest.approx(0.005)


def test_three_positions_without_errors_have_that_of_their_second_difference():
    assert lnp.reach([1, 10, 100], [1.0, 3.0, 2.0], window=3).stderr == pytest.approx(abs(1 - 6 + 2) / 18**0.5)


def test_a_reach_without_an_error_is_printed_without():
    assert str(lnp.Reach(0.12345, 0.0, 10.0, 5)) == "0.123"


def test_bad_runs():
    for arguments, options, words in (
        ((STEPS, [1, 2]), {}, "one position for each step"),
        (([1, 3, 2], [1, 2, 3]), {"window": 2}, "do not rise"),
        (([1, 2, 2], [1, 2, 3]), {"window": 2}, "do not rise"),
        (([], []), {"window": 1}, "window is 1 for 0 measurements"),
        ((STEPS, [1] * 6), {"window": 7}, "window is 7 for 6"),
        ((STEPS, [1] * 6), {"window": 2.5}, r"window is 2\.5"),
        ((STEPS, [1] * 6), {"window": 1}, "both choose the window and be averaged"),
        ((STEPS, [1] * 6), {"window": "last", "size": 9}, "window is 9"),
        ((STEPS, [1] * 6), {"window": "first"}, "window is 'first'"),
    ):
        with pytest.raises(ValueError, match=words):
            lnp.reach(*arguments, **options)
    with pytest.raises(ValueError, match="0 runs"):
        lnp.reach_of_runs([])
    with pytest.raises(ValueError, match=r"windows \[2, 3\]"):
        lnp.reach_of_runs([lnp.reach(STEPS, [1] * 6, window=w) for w in (2, 3)])


@pytest.mark.parametrize("function", [lnp.reach, curves.reach, History.reach])
def test_five_windows_are_chosen_and_five_averaged_by_default(function):
    parameters = inspect.signature(function).parameters
    assert (parameters["window"].default, parameters["size"].default) == (5, 5)
