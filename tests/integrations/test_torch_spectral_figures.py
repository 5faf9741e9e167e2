"""Spectra, densities and kernels as figures: which share stands at which eigenvalue, which colour is which entry."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color

import lnp
import lnp.plot
import lnp_numpy
from integrations.drawn_runs import below, edges, legend, marks, points, texts
from lnp.plot import style
from lnp.spectral.density import Density


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    pyplot.close("all")


def batch():
    """A kernel with the eigenvalues 4 and 1, and a loss gradient of equal weight on both."""
    model = lnp_numpy.LinearModel(weight=np.zeros((2, 1)))
    return model, (np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[1.0], [1.0]]))


def spectrum():
    return lnp.spectrum(*batch())


def test_bars_are_shares_of_the_decrease_and_the_line_is_the_gradient():
    s = replace(spectrum(), weights=np.array([0.3, 0.7]))
    ax = pyplot.figure().subplots()
    assert lnp.plot.spectrum(s, ax, decades=2, bins=8) is ax
    at = np.logspace(-2, 0, 9)
    bars = ax.containers[0].patches
    assert [bar.get_x() for bar in bars] == pytest.approx(at[:-1])
    assert [bar.get_width() for bar in bars] == pytest.approx(np.diff(at))
    assert [bar.get_y() for bar in bars] == [0] * 8
    assert [bar.get_height() for bar in bars] == pytest.approx(
        [0, 0, 0, 0, 0, 0.2, 0, 0.8]
    )  # at 0.2 and 0.8 of trace 5
    (line,) = [line for line in ax.get_lines() if line.get_drawstyle() == "steps-pre"]
    assert line.get_xdata() == pytest.approx([*at, 1.0])
    assert line.get_ydata() == pytest.approx([0, 0, 0, 0, 0, 0, 0.7, 0, 0.3, 0])
    (mark,) = [line for line in ax.get_lines() if line.get_marker() == "^"]
    assert points(mark) == [(pytest.approx(0.5), 0)]
    assert not mark.get_clip_on()
    told = dict(zip(legend(ax), ax.get_legend().legend_handles, strict=True))
    assert same_color(told["share of the loss decrease"].get_facecolor(), bars[0].get_facecolor())
    assert told["share of $||g||^2$"].get_color() == line.get_color()
    assert told[r"$\chi_{pos}$"].get_marker() == "^"
    assert len(told) == 3
    assert texts(ax) == [r"$\chi_{pos}$ = 0.5"]
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_yticks().tolist()) == ("log", "eigenvalue / trace", [])
    assert [ax.spines[side].get_visible() for side in ("top", "right", "left", "bottom")] == [False] * 3 + [True]


def test_what_lies_below_the_axis_is_in_its_first_bin_and_the_trace_in_its_last():
    s = replace(spectrum(), eigenvalues=np.array([5.0, 1e-9]), shares=np.array([0.9, 0.1]))
    heights = [bar.get_height() for bar in lnp.plot.spectrum(s).containers[0].patches]
    assert heights == pytest.approx([0.1, *[0] * 22, 0.9])
    assert lnp.plot.spectrum(s).containers[0].patches[0].get_x() == pytest.approx(1e-6)


def test_each_spectrum_has_a_frame_below_the_one_before_it():
    ax = lnp.plot.spectrum({1000: spectrum(), np.int64(2000): spectrum(), "end": spectrum()}, decades=2, bins=8)
    names = ["step 1,000", "step 2,000", "end"]
    assert texts(ax) == [rf"{name}:  $\chi_{{pos}}$ = 0.5" for name in names]
    bases = [container.patches[0].get_y() for container in ax.containers]
    heights = [text.get_position()[1] for text in ax.texts]
    lines = [line.get_ydata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert bases == lines
    steps = [line.get_ydata() for line in ax.get_lines() if line.get_drawstyle() == "steps-pre"]
    assert [line.min() for line in steps] == bases
    assert [line.max() - line.min() for line in steps] == pytest.approx([0.5] * 3)
    assert [points(line)[0][1] for line in ax.get_lines() if line.get_marker() == "^"] == bases
    assert bases[0] == 0
    assert bases[1] <= -1  # a share of 1 has room below the frame before
    assert bases[2] == 2 * bases[1]
    assert all(base < height < base + 1 for base, height in zip(bases, heights, strict=True))
    low, high = ax.get_ylim()
    assert bases[2] - 0.1 <= low < bases[2]
    assert high > 1
    assert len(legend(ax)) == 3
    one = lnp.plot.spectrum(spectrum()).figure
    assert ax.figure.get_figheight() > one.get_figheight()
    assert all(0.01 < text.get_position()[0] < 0.1 for text in ax.texts)


def test_densities_are_per_decade_with_bands_of_their_errors():
    nodes, weights = np.array([[4.0, 1.0], [4.0, 2.0]]), np.array([[0.5, 0.5], [0.3, 0.7]])
    found = {3: replace(spectrum(), density=Density(nodes, weights, 2)), "end": lnp.spectrum(*batch(), probes=2)}
    ax = pyplot.figure().subplots()
    assert lnp.plot.density(found, ax, decades=3) is ax
    assert legend(ax) == ["step 3", "end"]
    for index, (line, s) in enumerate(zip(ax.get_lines(), found.values(), strict=True)):
        x = line.get_xdata()
        assert x[[0, -1]] == pytest.approx([4e-3, 4 * 10**0.3])
        share, error = s.density.per_decade(x)
        assert line.get_ydata() == pytest.approx(share)
        assert (error.max() > 0.1) == (index == 0)
        band = marks(ax, style.ERROR)[index]
        drawn = edges(band)
        assert [drawn[at] for at in x] == [
            pytest.approx(ends) for ends in zip(share - error, share + error, strict=True)
        ]
        assert same_color(line.get_color(), f"C{index}")
        assert band.get_facecolor()[0, :3] == pytest.approx(pyplot.matplotlib.colors.to_rgb(f"C{index}"))
    assert len(line.get_xdata()) >= 50
    assert ax.get_xscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("eigenvalue", "share of the eigenvalues per decade")
    ax = lnp.plot.density(found["end"])
    assert legend(ax) is None
    assert ax.get_lines()[0].get_xdata()[0] == pytest.approx(4e-6)
    assert below(ax) == ["one standard error"]
    with pytest.raises(ValueError, match=r"without probes \(one\)"):
        lnp.plot.density(spectrum())
    with pytest.raises(ValueError, match=r"without probes \(step 1, b\)"):
        lnp.plot.density({1: spectrum(), "a": found["end"], "b": spectrum()})


def kernel(matrix, kind="traced"):
    return lnp.Kernel(np.array(matrix, dtype=float), kind, np.zeros((2, 1)), 0.0)


def test_the_kernels_entries_are_colours_around_zero():
    ax = pyplot.figure().subplots()
    assert lnp.plot.kernel(kernel([[1.0, -3.0], [-3.0, math.inf]]), ax) is ax
    (image,) = ax.images
    assert np.array_equal(np.asarray(image.get_array())[0], [1.0, -3.0])
    assert image.get_clim() == (-3, 3)
    red, _, blue, _ = image.cmap(image.norm(3.0))
    assert red > blue
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sample", "sample")
    assert image.colorbar.ax.get_ylabel() == r"$\Theta$"
    assert image.get_interpolation() == "nearest"
    ax = lnp.plot.kernel(kernel([[0.0, math.nan], [math.nan, 0.0]], "full"))
    assert ax.images[0].get_clim() == (-1, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sample and output",) * 2
    assert lnp.plot.kernel(kernel([[0.5]])).images[0].get_clim() == (-0.5, 0.5)


def test_a_class_has_its_own_kernel():
    classes = kernel([[[1.0]], [[2.0]], [[3.0]]], "per_class")
    for number in range(3):
        ax = lnp.plot.kernel(classes, of_class=number)
        assert np.asarray(ax.images[0].get_array()).tolist() == [[1.0 + number]]
        assert ax.images[0].colorbar.ax.get_ylabel() == rf"$\Theta_{{{number}}}$"
        assert ax.get_xlabel() == "sample"
    for wrong in (None, -1, 3):
        with pytest.raises(ValueError, match=f"of_class is {wrong} .* Expected of_class= from 0 to 2"):
            lnp.plot.kernel(classes, of_class=wrong)
