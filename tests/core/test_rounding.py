"""Values and their errors are printed to one and the same digit; tables in text and HTML have the same cells."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lnp
import lnp_numpy
from lnp.results.rounding import rounded, with_error
from lnp.results.tables import Page

CASES = {
    (7356.2, 104.0): "7360 ± 100",
    (7356.2, 96.0): "7356 ± 96",
    (7356.2, 160.0): "7400 ± 200",
    (76.79, 0.104): "76.79 ± 0.10",
    (0.002009, 3e-6): "0.002009 ± 0.000003",
    (0.0012364, 0.00034): "0.0012 ± 0.0003",
    (-0.008, 0.03): "-0.01 ± 0.03",
    (-0.001, 0.03): "0.00 ± 0.03",
    (0.0, 0.1): "0.00 ± 0.10",
    (1.2345e-9, 2e-11): "1.23e-09 ± 0.02e-09",
    (9.8e-9, 3e-9): "1.0e-08 ± 0.3e-08",
    (9.8e-5, 3e-5): "0.00010 ± 0.00003",
    (1e7, 2e5): "1.00e+07 ± 0.02e+07",
    (123456.0, 2e3): "123000 ± 2000",
    (1234567.0, 2e4): "1.23e+06 ± 0.02e+06",
    (2e290, 3e289): "2.0e+290 ± 0.3e+290",
    (2e291, 3e290): "2e+291 ± 3e+290",
    (5.0, 1e-12): "5 ± 1e-12",
    (5e-324, 5e-324): "4.9406565e-324 ± 5e-324",
    (1.0, 0.0): "1",
    (1.0, None): "1",
    (1.0, math.nan): "1 ± nan",
    (math.nan, 0.1): "nan ± 0.1",
    (math.inf, math.inf): "inf ± inf",
}


@pytest.mark.parametrize("case", CASES)
def test_known_texts(case):
    assert with_error(*case) == CASES[case]


def test_an_error_that_is_rounded_up_to_the_next_power_of_ten():
    assert rounded(1.0, 0.0996) == ("1.00", "0.10")
    assert rounded(1.0, 0.96) == ("1.00", "0.96")


@pytest.mark.parametrize(("stderr", "texts"), [(2e-7, ("2.3456784", "0.0000002")), (2e-8, ("2.3456784", "2e-08"))])
def test_an_error_far_below_its_value(stderr, texts):
    """Both have its last digit up to eight digits, and each its own beyond."""
    assert rounded(2.34567841, stderr) == texts


def test_arrays_are_printed_as_they_are():
    assert with_error(np.ones(()), np.zeros(())) == "1.0 ± 0.0"


@given(st.floats(-1e250, 1e250), st.floats(1e-250, 1e250))
def test_what_is_printed_is_what_was_measured(value, stderr):
    shown, error = rounded(value, stderr)
    assert abs(float(error) - stderr) <= 0.34 * stderr
    assert abs(float(shown) - value) <= max(0.51 * stderr, 1e-7 * abs(value))


@given(st.floats(-999, 999), st.floats(1e-3, 1e3))
def test_both_have_the_same_decimals(value, stderr):
    shown, error = rounded(value, stderr)
    assert len(shown.partition(".")[2]) == len(error.partition(".")[2])


def test_a_page_has_the_same_cells_in_text_and_html():
    page = Page([("rate", "1", "± 0.1", "a & b")], ("layer", "x"), [["<head>", "2"]], ("a note",))
    assert page.to_text() == "rate  1 ± 0.1   a & b\n\nlayer   x\n<head>  2\n\na note"
    shown = page.to_html()
    assert ">1 ± 0.1</td>" in shown
    assert "a &amp; b" in shown
    assert "&lt;head&gt;</td><td style='text-align:right'>2</td>" in shown
    assert shown.endswith("<small>a note</small>")


def test_results_print_their_values_with_a_line_for_each_name():
    generator = np.random.default_rng(0)
    model = lnp_numpy.LinearModel(weight=generator.normal(size=(5, 3)))
    batch, other = ((generator.normal(size=(8, 5)), generator.integers(0, 3, 8)) for _ in range(2))
    cross, kernel = lnp.cross_response(model, batch, other), lnp.kernel(model, batch)
    text = str(cross)
    assert f"chi_pos   {rounded(cross.chi_pos)[0]:>8}"[:8] in text
    assert [line.split()[0] for line in text.splitlines()[5:8]] == ["batch", "trained", "measured"]
    assert f"{cross.measured.loss:.4g}" in text.splitlines()[7]
    text = str(kernel)
    assert f"{kernel.chi_pos:.4g}" in text
    assert len(text.splitlines()) == 5 + 1 + 1 + 8
    assert "per_class kernel, 3 x 8 x 8" in str(lnp.kernel(model, batch, kind="per_class"))
    for result in (cross, kernel, lnp.spectrum(model, batch), lnp.decompose_nested(model, batch, batch_sizes=[4, 8])):
        assert result._repr_html_().count("<table>") >= 1
