"""Cross responses and nested batches of checkpoints are what `lnp` measures of the same model by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp import cli
from lnp.batches.gram import gradient_gram, mean_of_pairs
from lnp.checkpoints.asked import asked

RNG = np.random.default_rng(11)
X, Y = RNG.standard_normal((36, 3)), RNG.standard_normal((36, 2))
BATCHES = [(X[i::3], Y[i::3]) for i in range(3)]


def load(step):
    return lnp_numpy.LinearModel(weight=np.full((3, 2), step / 10) * [[1.0, -1.0]])


def test_responses_are_those_of_each_pair():
    history = lnp.measure_checkpoints(load, [2, 4], BATCHES, responses=True).history
    for step, row in zip((2, 4), history.rows(), strict=True):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            pair = lnp.cross_response(load(step), BATCHES[a], BATCHES[b])
            assert row[f"cross/{a}-{b}/rate"] == pytest.approx(pair.rate, rel=1e-9)
            assert row[f"cross/{a}-{b}/chi_pos"] == pytest.approx(pair.chi_pos, rel=1e-9)
        for name in ("rate", "chi_pos"):
            values = np.array([row[f"cross/{pair}/{name}"] for pair in ("0-1", "0-2", "1-2")])
            assert row[f"cross/{name}"] == pytest.approx(values.mean())
            error = np.sqrt(2 / 3 * ((values - values.mean()) ** 2).sum())  # without 2, 1 or 0 one pair is left
            assert row[f"cross/{name}_stderr"] == pytest.approx(error)


def test_notes_on_gradients_are_said_beside_others_and_each_once(monkeypatch):
    own = "means over 3 batches of 12 samples, and errors over these batches"
    monkeypatch.setattr(
        "lnp.checkpoints.asked.gradient_gram",
        lambda *given, **options: replace(gradient_gram(*given, **options), notes=("of gradients", own)),
    )
    (notes,) = lnp.measure_checkpoints(load, [2], BATCHES, responses=True).history["notes"]
    assert notes.endswith(f"{own}; of gradients")
    assert notes.count(own) == 1


def test_opposite_batches_have_the_position_minus_one():
    model = lnp_numpy.LinearModel(weight=np.zeros((1, 1)))
    one, other = (np.ones((1, 1)), np.ones((1, 1))), (np.ones((1, 1)), -np.ones((1, 1)))
    row = lnp.measure_checkpoints(lambda step: model, [0], [one, other], responses=True).history.rows()[0]
    assert (row["cross/rate"], row["cross/chi_pos"]) == (pytest.approx(-4.0), pytest.approx(-1.0))
    assert np.isnan(row["cross/rate_stderr"])  # of two batches there is no spread


@pytest.mark.parametrize("count", [4, 8])
def test_the_mean_over_pairs_has_no_floor_and_its_error_covers_the_truth(count):
    """Gradients with mean m and noise: E of the mean over pairs is ||m||^2, and the error is not too small."""
    rng, truth = np.random.default_rng(count), np.array([1.0, -2.0, 0.5])
    found = []
    for _ in range(1000):
        gradients = truth + rng.standard_normal((count, 3))
        found.append(mean_of_pairs(gradients @ gradients.T))
    means, errors = np.array(found).T
    assert means.mean() == pytest.approx(truth @ truth, abs=4 * means.std() / 1000**0.5)
    t = {4: 1.197, 8: 1.077}[count]  # Student's t, count - 1 degrees of freedom, of 68.3%
    hits = (abs(means - truth @ truth) < t * errors).mean()
    assert 0.63 < hits < 0.80
    assert 0.95 < np.sqrt((errors**2).mean()) / means.std() < 1.15


def test_where_noise_is_all_there_is_the_error_of_the_mean_over_pairs_is_too_large_by_a_known_factor():
    rng, count = np.random.default_rng(0), 4
    drawn = rng.standard_normal((4000, count, 3))
    means, errors = np.array([mean_of_pairs(gradients @ gradients.T) for gradients in drawn]).T
    factor = np.sqrt(2 * (count - 1) / (count - 2))
    assert np.sqrt((errors**2).mean()) / means.std() == pytest.approx(factor, rel=0.06)


def test_nested_sizes_are_those_of_the_first_samples():
    history = lnp.measure_checkpoints(load, [2], (X, Y), nested=True, estimator="exact").history
    row = history.rows()[0]
    assert [name for name in row if name.endswith("chi_pos") and name.startswith("nested")] == [
        f"nested/{size}/chi_pos" for size in (8, 16, 32)
    ]
    for size in (8, 16, 32):
        d = lnp.decompose(load(2), (X[:size], Y[:size]), estimator="exact")
        for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
            assert row[f"nested/{size}/{name}"] == pytest.approx(getattr(d, name)), (size, name)


def test_nested_sizes_of_several_batches_are_means_with_errors():
    history = lnp.measure_checkpoints(load, [2], BATCHES, nested=[1, 4], responses=True).history
    for size in (1, 4):
        rates = [lnp.decompose(load(2), (x[:size], y[:size])).rate for x, y in BATCHES]
        assert history[f"nested/{size}/rate"][0] == pytest.approx(np.mean(rates))
        assert history[f"nested/{size}/rate_stderr"][0] == pytest.approx(np.std(rates, ddof=1) / 3**0.5)
    assert history["cross/rate"][0] < history["rate"][0]


def test_sizes_that_are_not_listed_stay_below_the_batch():
    for samples, sizes in ((16, (8,)), (17, (8, 16))):
        assert asked(False, True, [(X[:samples], Y[:samples])], {}).sizes == sizes


def test_the_floor_falls_with_the_size():
    """Late in training a batch's rate is its noise, tr Cov / b: a quarter of the samples has four times the rate."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16 * 64, 3))
    batches = [(x[i::16], rng.standard_normal((64, 2))) for i in range(16)]  # nothing can be learnt: the optimum is 0
    row = lnp.measure_checkpoints(load, [0], batches, nested=[16], responses=True).history.rows()[0]
    assert 3 < row["nested/16/rate"] / row["rate"] < 5
    assert abs(row["cross/rate"]) < 3 * row["cross/rate_stderr"] < row["rate"]


def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    def never(step):
        raise AssertionError("nothing is loaded")

    for batches, options, match in (
        ((X, Y), {"responses": True}, "received 1 batch. Expected two"),
        (BATCHES, {"responses": True, "preconditioner": {}}, "received preconditioner=, .*Expected none"),
        (BATCHES, {"nested": [12]}, r"nested is \[12\] for batches of 12 samples. Expected"),
        (BATCHES, {"nested": [0, 4]}, "integers from 1 to 11"),
        ([*BATCHES, (X[:5], Y[:5])], {"nested": [8]}, "for batches of 5 samples"),
        (BATCHES, {"nested": "many"}, "nested is 'many'"),
        ((X[:8], Y[:8]), {"nested": True}, "nested is True for batches of 8 samples"),
    ):
        with pytest.raises(ValueError, match=match):
            lnp.measure_checkpoints(never, [0], batches, tmp_path / "run.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_files_that_were_measured_without_are_not_mixed(tmp_path):
    path = tmp_path / "run.jsonl"
    lnp.measure_checkpoints(load, [0], BATCHES, path)
    with pytest.raises(ValueError, match=r"other settings \(responses: default before, True now"):
        lnp.measure_checkpoints(load, [0], BATCHES, path, responses=True)
    with pytest.raises(ValueError, match=r"; nested: default before, \(4,\) now"):
        lnp.measure_checkpoints(load, [0], BATCHES, path, nested=[4])
    with pytest.raises(ValueError, match="'nested/4'"):
        lnp.measure_checkpoints(load, [0], BATCHES, tags={"nested/4": 1})


def test_the_command_line_takes_both(capsys, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("lnp.checkpoints.command.open_checkpoints", lambda folder, **others: Folder())
    monkeypatch.setattr("lnp.checkpoints.command.measure_checkpoints", lambda *a, **options: given.update(options))
    np.savez(tmp_path / "data.npz", inputs=X, targets=Y)
    start = ["measure", "run", "--arrays", str(tmp_path / "data.npz")]
    for more, expected in (
        ([], (False, False)),
        (["--responses", "--nested"], (True, True)),
        (["--nested", "4,8"], (False, [4, 8])),
    ):
        with pytest.raises(AttributeError):  # what measures is replaced by what looks
            cli.main([*start, *more])
        assert (given["responses"], given["nested"]) == expected
    with pytest.raises(SystemExit):
        cli.main([*start, "--nested", "four"])
    assert "expected numbers of samples" in capsys.readouterr().err


class Folder:
    """Stands for a folder of checkpoints."""

    reader, steps, kind = None, (0,), "state_dict"
