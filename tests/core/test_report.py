"""A decomposition as a dictionary, text, HTML and a data frame."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest

import lnp
from core.dense import network, record
from lnp.results.decomposition import Layer, decompose

D = lnp.Decomposition(
    loss=0.5, rate=6.0, chi_loss=2.0, chi_net=30.0, chi_pos=0.1, chi_net_stderr=1.25, chi_pos_stderr=0.02, loss_terms=4,
    probes=3, degrees_of_freedom=8.0, layers={"<head>": Layer(6.0, 30.0, 0.1, 1.5, 0.0)},
    population=lnp.Population(5.0, 0.0625, 40.0, 1.0, 0.02, 25.0, 90.0, 200.0), samples=4, outputs=3, estimator="joint",
    notes=("a note & more",), loss_name="cross-entropy of logits & more",
)  # fmt: skip


def test_dictionary():
    flat = D.to_dict()
    assert flat["chi_net_stderr"] == 1.25
    assert flat["layer/<head>/chi_net"] == 30.0
    assert (flat["samples"], flat["outputs"], flat["estimator"]) == (4, 3, "joint")
    assert "notes" not in flat
    others = ("layers", "population", "notes", "total", "sample_losses")
    others += ("magnitude", "least", "rtol", "way", "evidence", "contributions")  # of the computation
    fields = {name for name in D.__dataclass_fields__ if name not in others}
    assert fields | {"preference"} == {name for name in flat if "/" not in name}
    assert flat["preference"] == pytest.approx(0.1 * 4 * 3)
    assert flat["population/noise_scale"] == 40.0
    assert not [name for name in replace(D, layers=None, population=None).to_dict() if "/" in name]


def test_text():
    lines = str(D).splitlines()
    values = ["loss", "rate", "chi_loss", "chi_net", "chi_pos", "preference"]
    assert [line.split()[0] for line in lines[: len(values)]] == values
    assert lines[0].endswith("   cross-entropy of logits & more")
    assert lines[5].split()[:2] == ["preference", "1.2"]
    assert lines[3].split()[:4] == ["chi_net", "30.0", "±", "1.2"]
    assert "±" not in lines[2]
    assert any(line.startswith("<head>") for line in lines)
    assert "4 samples x 3 outputs, 4 loss terms; trace: joint, 3 probes" in lines
    assert lines[6].split()[:7] == ["population", "0.06", "±", "0.02", "chi_pos", "of", "the"]
    assert re.fullmatch(r"noise +40 \(25 to 90\) +gradient noise scale, samples", lines[7])
    names = [line.split()[0] for line in lines[:8]]
    assert len(set(names)) == len(names)
    unresolved = replace(D, population=replace(D.population, noise_scale=float("inf"), noise_scale_high=float("inf")))
    assert "above 25" in str(unresolved)
    assert "above 25" in unresolved._repr_html_()
    assert "population" not in str(replace(D, population=None))
    assert lines[-1] == "note: a note & more"
    assert "1 probe\n" in str(replace(D, probes=1))


def test_text_without_numbers():
    """Values inside a compiled function, and nan."""
    d = decompose(record(*network()))
    assert "chi_pos" in str(replace(d, probes=np.asarray(3), loss_terms=np.asarray(6.0)))
    assert "nan" in str(replace(D, chi_pos=float("nan"), loss_terms=float("nan"), probes=float("nan")))


def test_html():
    page = D._repr_html_()
    assert page.startswith("<table>")
    assert "&lt;head&gt;" in page
    assert "<head>" not in page
    assert "a note &amp; more" in page
    assert all(f"<code>{name}</code>" in page for name in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"))
    assert "<td style='text-align:right'>1.2</td>" in page
    assert "cross-entropy of logits &amp; more" in page
    assert "<td style='text-align:right'>30.0 ± 1.2</td>" in page
    assert "<td style='text-align:right'>0.06 ± 0.02</td><td style='text-align:left'>chi_pos of the population" in page
    assert "<td style='text-align:right'>40 (25 to 90)</td>" in page
    assert page.count("<table>") == 2
    assert "<th style='text-align:left'>layer</th><th style='text-align:right'>rate</th>" in page


def test_pandas_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas, which is not installed. Run: pip install pandas"):
        D.to_pandas()


def test_a_data_frame_has_a_row_for_the_whole_and_one_for_each_layer():
    pytest.importorskip("pandas")
    frame = D.to_pandas()
    assert list(frame.index) == ["", *D.layers]
    assert not [name for name in frame.columns if name.startswith("layer/")]
    assert frame.loc["", "chi_net"] == D.chi_net
    assert frame.loc["<head>", "chi_net"] == D.layers["<head>"].chi_net
    assert list(replace(D, layers=None).to_pandas().index) == [""]
