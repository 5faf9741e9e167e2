"""Thousands of models, batches, losses, options, history files and command lines: a right answer, or an error of lnp's.

    pytest -c pyproject.toml tests/fuzzing.py          # LNP_FUZZ=5000 for so many cases of each test

A right answer is one whose factors multiply to the rate, and a rate that is the square of the gradient where NumPy can
tell it. A named error is a TypeError or ValueError that lnp raises itself, with a sentence that says what was expected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import tempfile
import warnings
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lnp
import lnp_numpy
from lnp.cli import main
from lnp.contract.foreign import is_own
from lnp.runs.table import compare, to_text

SETTINGS = hypothesis.settings(
    max_examples=int(os.environ.get("LNP_FUZZ", "300")),
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
NAMED = (TypeError, ValueError)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=4),
    st.lists(st.integers(), max_size=3),
    st.sampled_from([lambda *args: 0.0, {}, object(), np.float64(0.1), np.array([1, 2])]),
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from(
    ["float64", "float32", "float16", "int64", "int8", "uint8", "bool", "complex64", "object", "U3"]
)
ARRAYS = st.builds(lambda shape, dtype, seed: array(shape, dtype, seed), SHAPES, DTYPES, st.integers(0, 9))
PLAIN = st.tuples(
    st.integers(1, 6), st.integers(1, 4), st.sampled_from(["float64", "float32", "int64", "int8", "uint8"])
)
LOSSES = st.one_of(
    st.sampled_from([None, "mse", "huber", "cross_entropy", "binary_cross_entropy", "nll", "MSE", np.sum, len]),
    ANYTHING,
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        [
            "estimator",
            "rtol",
            "max_probes",
            "seed",
            "loss_terms",
            "microbatch",
            "by_layer",
            "population",
            "parameters",
            "preconditioner",
            "batch_statistics",
            "sample_losses",
            "batches",
            "group",
            "forward",
        ]
    ),
    st.one_of(ANYTHING, st.sampled_from(["auto", "exact", "per_sample", "joint", "grouped", "frozen", "coupled"])),
    max_size=2,
)


def array(shape, dtype, seed=0):
    """Small numbers, in some type, of which some are extreme."""
    rng = np.random.default_rng(seed)
    values = np.array(rng.normal(size=shape) * (1e30 if seed == 7 else 1.0))
    if seed == 8 and values.size:
        values.flat[0] = math.nan
    with np.errstate(all="ignore"):
        return np.asarray(np.abs(values * 3) if dtype[0] in "iub" else values).astype(dtype)


def measured(model, batch, loss, options):
    """The decomposition, None where lnp refuses."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            return lnp.decompose(model, batch, loss, **options)
        except NAMED as error:
            if not callable(loss) and not any(map(callable, options.values())):
                named(error)
            return None


def named(error):
    """Whether lnp says what is wrong."""
    if not is_own(error) or len(str(error)) < 20:
        raise error


def right(d):
    assert isinstance(d, lnp.Decomposition)
    product = d.chi_loss * d.chi_net * d.chi_pos
    finite = all(map(math.isfinite, (product, d.rate, d.chi_loss, d.chi_net)))
    assert not finite or product == pytest.approx(d.rate, rel=1e-3, abs=1e-30)
    assert str(d)
    assert d._repr_html_()
    json.dumps({name: value for name, value in d.to_dict().items() if not isinstance(value, np.ndarray)})


@SETTINGS
@given(ARRAYS, ARRAYS, ARRAYS, LOSSES, OPTIONS)
def test_anything_for_numpy(weight, inputs, targets, loss, options):
    try:
        model = lnp_numpy.LinearModel(weight)
    except ValueError as error:
        named(error)
        return
    d = measured(model, (inputs, targets), loss, options)
    if d is not None:
        right(d)


@SETTINGS
@given(PLAIN, st.integers(1, 3), st.sampled_from(["mse", "huber", "cross_entropy", None]), st.integers(0, 6), OPTIONS)
def test_right_numbers_for_numpy(sizes, outputs, loss, seed, options):
    samples, width, dtype = sizes
    x, weight = array((samples, width), dtype, seed), array((width, outputs), "float64", seed + 1)
    y = array((samples, outputs), "float64", seed + 2) if loss != "cross_entropy" else np.arange(samples) % outputs
    d = measured(lnp_numpy.LinearModel(weight), (x, y), loss, options)
    if d is None:
        return
    right(d)
    if loss in ("mse", None) and not options:
        gradient = x.astype(float).T @ (2 * (x.astype(float) @ weight - y) / y.size)
        assert d.rate == pytest.approx(np.sum(gradient**2), rel=1e-5, abs=1e-30, nan_ok=True)


@SETTINGS
@given(ANYTHING, ANYTHING, LOSSES, OPTIONS)
def test_anything_for_a_model_and_a_batch(model, batch, loss, options):
    assert measured(model, batch, loss, options) is None


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
)  # fmt: skip
COLUMNS = st.sampled_from(
    ["step", "loss", "chi_pos", "chi_net", "chi_loss", "population/chi_pos", "width", "notes", ""]
)
RECORDS = st.dictionaries(COLUMNS | st.text(max_size=5), VALUES, max_size=5)
LINES = st.one_of(
    RECORDS.map(json.dumps).map(str.encode), st.binary(max_size=30), VALUES.map(json.dumps).map(str.encode),
    st.builds(lambda step, value: json.dumps({"step": step, "loss": value}).encode(), st.integers(0, 9), st.floats()),
)  # fmt: skip
FILES = st.lists(LINES, max_size=8).map(b"\n".join)


@SETTINGS
@given(FILES)
def test_history_files(content):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "run.jsonl")
        path.write_bytes(content)
        try:
            history = lnp.History.read(path)
            str(history), history.columns, [history[name] for name in history.columns]
            if len(history):
                to_text(compare(path))
        except (KeyError, *NAMED) as error:
            named(error)


WORDS = st.one_of(
    st.sampled_from(["plot", "compare", "watch", "report", "measure", "--out", "--title", "--once", "--every", "-1"]),
    st.sampled_from(["run.jsonl", "folder", "gone", "", ".", "--csv", "x.png", "x.html", "--columns", "loss", "--dpi"]),
    st.text(max_size=4),
)


@SETTINGS
@given(st.lists(WORDS, max_size=5), FILES)
def test_command_lines(words, content):
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path("run.jsonl").write_bytes(content)
        Path("folder").mkdir()
        if "watch" in words and "--once" not in words:
            words = [*words, "--once"]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(words)
            except SystemExit as end:
                status = end.code
        assert status in (0, 1, 2)
        assert status == 0 or said.getvalue().strip()


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed.")
class TestTorch:
    @SETTINGS
    @given(ARRAYS, ARRAYS, LOSSES, OPTIONS, st.integers(0, 3), st.booleans())
    def test_anything(self, inputs, targets, loss, options, kind, tensors):
        import torch

        torch.manual_seed(0)
        width = inputs.shape[-1] if inputs.ndim else 1
        layers = [
            lambda: torch.nn.Linear(width, 3),
            lambda: torch.nn.Sequential(torch.nn.Linear(width, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)),
            lambda: torch.nn.Embedding(9, 2),
            lambda: torch.nn.Sequential(torch.nn.Linear(width, 2), torch.nn.Dropout(), torch.nn.Flatten(0)),
        ]
        with contextlib.suppress(TypeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = layers[kind]()
            batch = (torch.as_tensor(inputs), torch.as_tensor(targets)) if tensors else (inputs, targets)
        if "batch" not in locals():
            return
        before = [parameter.detach().clone() for parameter in model.parameters()]
        try:
            d = measured(model, batch, loss, options)
        except (RuntimeError, IndexError, *NAMED) as error:
            if not getattr(error, "__notes__", None):  # of the user's own forward pass: what it was called with
                named(error)
            return
        finally:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if d is not None:
            right(d)
