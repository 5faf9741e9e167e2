"""The spectral measure and the density of eigenvalues against dense eigen-decompositions."""

import itertools
import math
from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import lnp
import lnp_numpy
from core.dense import kernel, network, record
from lnp.spectral.lanczos import quadrature, tridiagonalize
from lnp.spectral.spectrum import RunLanczos, from_lanczos

SAMPLES, OUTPUTS, PARAMETERS = 8, 3, 40
SIZE = SAMPLES * OUTPUTS
SPECTRA = {
    "decaying": 0.6 ** np.arange(SIZE),
    "clustered": np.repeat([5.0, 1.0, 0.25], [2, 10, 12]),
    "tight": np.concatenate([3.0 + 1e-13 * np.arange(6), np.linspace(0.1, 1.0, 18)]),
    "low rank": np.concatenate([[4.0, 2.0, 1.0, 0.5], np.zeros(SIZE - 4)]),
    "wide": np.geomspace(1e3, 1e-3, SIZE),
    "one": np.concatenate([[7.0], np.zeros(SIZE - 1)]),
}


def operator(eigenvalues, seed=0):
    """(model, batch, dense kernel, loss gradient) with prescribed eigenvalues of the kernel."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    right = np.linalg.qr(rng.normal(size=(PARAMETERS, SIZE)))[0]
    jacobian = left * np.sqrt(eigenvalues) @ right.T
    targets = rng.normal(size=(SAMPLES, OUTPUTS))
    model = lnp_numpy.OperatorModel(np.zeros((SAMPLES, OUTPUTS)), jacobian)
    return model, (None, targets), (left * eigenvalues) @ left.T, -2 * targets.reshape(-1) / SIZE


def measure(theta, g):
    """(distinct eigenvalues, weights of g), from the dense kernel."""
    values, vectors = np.linalg.eigh((theta + theta.T) / 2)
    return merged(values, (vectors.T @ g) ** 2 / (g @ g))


def merged(values, weights):
    """The same measure from the largest value down; what lies closer than 1e-9 of the largest is one."""
    order = np.argsort(values)[::-1]
    values, weights = values[order], weights[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values) < -1e-9 * values[0]]))
    return values[starts], np.add.reduceat(weights, starts)


@pytest.mark.parametrize("name", SPECTRA)
def test_measure_is_the_dense_one(name):
    model, batch, theta, g = operator(SPECTRA[name])
    s = lnp.spectrum(model, batch, steps=SIZE + 5)
    values, weights = measure(theta, g)
    assert s.exhausted
    found, found_weights = merged(s.eigenvalues, s.weights)
    assert found == pytest.approx(values, abs=1e-8 * values[0])
    assert found_weights == pytest.approx(weights, abs=1e-8)
    assert merged(s.eigenvalues, s.shares)[1] == pytest.approx(weights * values / (weights @ values), abs=1e-8)
    assert s.lambda_max == pytest.approx(values[0], rel=1e-8)
    assert np.all(s.residuals < 1e-8 * values[0])


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_moments_are_exact(name, steps):
    """Of an m-point Gauss quadrature up to order 2 m - 1, and not the next one unless the space is spanned."""
    model, batch, theta, g = operator(SPECTRA[name])
    s = lnp.spectrum(model, batch, steps=steps)
    q = g / np.linalg.norm(g)
    scale = np.linalg.norm(theta, 2)
    moments = [q @ np.linalg.matrix_power(theta / scale, k) @ q for k in range(2 * steps + 1)]
    found = [np.sum(s.weights * (s.eigenvalues / scale) ** k) for k in range(2 * steps + 1)]
    assert found[:-1] == pytest.approx(moments[:-1], rel=1e-10)
    distinct = len(measure(theta, g)[0])
    assert s.exhausted == (steps >= distinct)
    assert (found[-1] == pytest.approx(moments[-1], rel=1e-10)) == s.exhausted


@pytest.mark.parametrize("name", SPECTRA)
def test_the_mean_is_the_position(name):
    model, batch, theta, g = operator(SPECTRA[name])
    for steps in (1, 3, 30):
        s = lnp.spectrum(model, batch, steps=steps, estimator="exact")
        assert s.chi_pos == pytest.approx(g @ theta @ g / (g @ g) / np.trace(theta), rel=1e-10)
        assert s.chi_pos == pytest.approx(lnp.decompose(model, batch, estimator="exact").chi_pos, rel=1e-10)
        assert s.trace == pytest.approx(np.trace(theta), rel=1e-10)
        assert s.first_moment == pytest.approx(g @ theta @ g / (g @ g), rel=1e-10)
        assert s.moment_error < 1e-12
        assert (s.weights.sum(), s.shares.sum()) == pytest.approx((1, 1), rel=1e-12)
        assert s.notes == ()


@given(
    eigenvalues=arrays(float, SIZE, elements=st.floats(0, 1e3).map(lambda x: round(x, 3))),
    steps=st.integers(1, SIZE + 3),
    seed=st.integers(0, 9),
)
def test_a_measure_whatever_the_spectrum(eigenvalues, steps, seed):
    """Weights that add to one, on nodes between the smallest and the largest eigenvalue, with the dense mean."""
    model, batch, theta, g = operator(eigenvalues, seed)
    s = lnp.spectrum(model, batch, steps=steps)
    largest = eigenvalues.max()
    assert s.weights.sum() == pytest.approx(1, rel=1e-12)
    assert s.eigenvalues.size <= min(steps, SIZE)
    assert np.all(s.eigenvalues <= largest * (1 + 1e-10))
    assert np.all(s.eigenvalues >= eigenvalues.min() - 1e-10 * largest)
    assert s.first_moment == pytest.approx(g @ theta @ g / (g @ g), rel=1e-9, abs=1e-12 * largest)
    assert s.moment_error < 1e-9 or largest == 0


def test_residuals_bound_the_distance_to_an_eigenvalue():
    model, batch, theta, _ = operator(SPECTRA["wide"])
    values = np.linalg.eigvalsh(theta)
    s = lnp.spectrum(model, batch, steps=6)
    distances = np.min(np.abs(s.eigenvalues[:, None] - values), axis=1)
    assert np.all(distances <= s.residuals * (1 + 1e-10) + 1e-10)
    assert np.any(s.residuals > 1e-3)
    assert np.all(np.diff(s.eigenvalues) < 0)


def test_the_measure_of_a_preconditioned_kernel():
    """Of J M J^T, whose mean is the preconditioned position."""
    rng = np.random.default_rng(3)
    model = lnp_numpy.LinearModel(rng.normal(size=(4, 3)))
    batch, diagonal = (rng.normal(size=(5, 4)), rng.normal(size=(5, 3))), rng.uniform(0.1, 3, size=(4, 3))
    g = (2 * (batch[0] @ model.weight - batch[1]) / 15).reshape(-1)
    jacobian = np.einsum("ni,kl->nkil", batch[0], np.eye(3)).reshape(15, 12)
    theta = jacobian * diagonal.reshape(-1) @ jacobian.T
    s = lnp.spectrum(model, batch, steps=20, probes=2, preconditioner={"weight": diagonal}, estimator="exact")
    values, weights = measure(theta, g)
    found, found_weights = merged(s.eigenvalues, s.weights)
    carried = weights > 1e-12
    assert found[:12] == pytest.approx(values[carried][:12], rel=1e-8)
    assert found_weights[:12] == pytest.approx(weights[carried][:12], abs=1e-8)
    d = lnp.decompose(model, batch, preconditioner={"weight": diagonal}, estimator="exact")
    assert s.chi_pos == pytest.approx(d.chi_pos, rel=1e-10)
    assert s.chi_pos == pytest.approx(g @ theta @ g / (g @ g) / np.trace(theta), rel=1e-10)
    assert s.notes == ()
    assert s.lambda_max == pytest.approx(values[0], rel=1e-8)
    assert math.isnan(lnp.spectrum(model, batch, preconditioner={"weight": -diagonal}).chi_pos)


def test_parts_of_the_spectrum():
    model, batch, theta, g = operator(SPECTRA["low rank"])
    s = lnp.spectrum(model, batch)
    values, weights = measure(theta, g)
    assert s.share_above(1.5) == pytest.approx(weights[:2] @ values[:2] / (weights @ values), rel=1e-10)
    assert s.weight_above(1.5) == pytest.approx(weights[:2].sum(), rel=1e-10)
    assert s.share_above(values[0] * 1.01) == 0
    assert s.share_above(-1.0) == pytest.approx(1)
    text = str(s)
    assert f"{values[0]:.4g}" in text
    assert f"{s.chi_pos:.4g}   spectral position, from" in text
    assert f"<code>trace</code></td><td style='text-align:right'>{s.trace:.4g}</td>" in s._repr_html_()


def test_the_largest_node_of_the_measure_and_of_the_density():
    """A gradient along the smallest eigenvalue sees no other; random starts see all."""
    model = lnp_numpy.OperatorModel(np.zeros((2, 1)), np.diag([3.0, 1.0]))
    batch = (None, np.array([[0.0], [1.0]]))
    assert lnp.spectrum(model, batch).lambda_max == pytest.approx(1)
    s = lnp.spectrum(model, batch, probes=1)
    assert s.lambda_max == pytest.approx(9)
    assert (s.weight_above(s.eigenvalues[0]), s.share_above(s.eigenvalues[0])) == pytest.approx((1, 1))


@pytest.mark.parametrize("steps", [2, 4, SIZE])
def test_the_basis_stays_orthogonal(steps):
    """T from many steps has no eigenvalue twice, which Lanczos without reorthogonalisation has."""
    model, batch, theta, _ = operator(np.concatenate([[100.0], np.geomspace(1.0, 1e-3, SIZE - 1)]))
    s = lnp.spectrum(model, batch, steps=steps)
    head = s.eigenvalues > 10
    assert head.sum() == 1
    if steps == SIZE:
        assert s.eigenvalues[::-1] == pytest.approx(np.linalg.eigvalsh(theta), abs=1e-8)


def test_the_density_over_all_signs_has_the_kernels_moments():
    """Averaged over every sign vector, v^T f(Theta) v is the trace: no statistics."""
    jacobian, g = network(2, 2, sizes=(3, 2))
    theta = kernel(jacobian)
    every = [np.reshape(s, g.shape) for s in itertools.product((-1.0, 1.0), repeat=4)]
    lin = record(jacobian, g, signs=lambda index: every[int(index)])
    s = from_lanczos(RunLanczos("exact", 0.0, 1, 4, len(every))(lin_as_floats(lin)))
    for order in (0, 1, 2, 5):
        expected = np.trace(np.linalg.matrix_power(theta, order)) / 4
        assert s.density.moment(order)[0] == pytest.approx(expected, rel=1e-10)
    values = np.linalg.eigvalsh(theta)
    for cut in (values[1:] + values[:-1]) / 2:
        assert s.density.number_above(cut)[0] == pytest.approx(np.sum(values > cut), rel=1e-9)
    grid = np.geomspace(values[0] / 3, 3 * values[-1], 20)
    bumps = np.exp(-0.5 * (np.log10(grid[:, None] / values) / 0.2) ** 2) / (0.2 * np.sqrt(2 * np.pi))
    assert s.density.per_decade(grid)[0] == pytest.approx(bumps.mean(axis=1), rel=1e-8)


def lin_as_floats(lin):
    """A record whose loss is a float already, as a backend's evaluate would leave it."""
    return type(lin)(**{**vars(lin), "loss": 0.0})


def test_the_density_of_a_larger_operator_within_its_errors():
    """Fixed seed; five standard errors."""
    model, batch, theta, _ = operator(SPECTRA["wide"])
    s = lnp.spectrum(model, batch, steps=12, probes=40, seed=3)
    values = np.linalg.eigvalsh(theta)
    for order in (1, 2):
        value, error = s.density.moment(order)
        assert abs(value - np.mean(values**order)) < 5 * error
        assert 0 < error < 0.3 * value
    for cut in (1.0, 30.0):
        number, error = s.density.number_above(cut)
        assert abs(number - np.sum(values >= cut)) < 5 * error + 1
    again = lnp.spectrum(model, batch, steps=12, probes=40, seed=3).density
    assert np.array_equal(again.nodes, s.density.nodes)
    assert s.density.probes == 40


def test_errors_are_those_of_the_mean():
    model, batch, _, _ = operator(SPECTRA["wide"])
    d = lnp.spectrum(model, batch, steps=5, probes=6).density
    values = np.sum(d.weights * d.nodes, axis=1)
    assert d.moment(1) == pytest.approx((values.mean(), values.std(ddof=1) / 6**0.5), rel=1e-12)
    one = lnp.spectrum(model, batch, steps=5, probes=1).density
    assert np.isnan(one.moment(1)[1])
    assert one.moment(0)[0] == pytest.approx(1)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_kernels_scale_is_no_matter(factor):
    """Neither for the measure nor for where it ends."""
    for name in ("low rank", "wide"):
        found = [lnp.spectrum(*operator(scale * SPECTRA[name])[:2], steps=9) for scale in (1.0, factor)]
        assert found[1].eigenvalues == pytest.approx(factor * found[0].eigenvalues, rel=1e-8, abs=1e-10 * factor)
        assert found[1].weights == pytest.approx(found[0].weights, abs=1e-9)
        assert found[1].exhausted == found[0].exhausted == (name == "low rank")


def test_probes_that_end_early_are_filled_up():
    model, batch, _, _ = operator(SPECTRA["low rank"])
    d = lnp.spectrum(model, batch, steps=SIZE, probes=5).density
    assert d.nodes.shape == d.weights.shape
    assert d.weights.sum(axis=1) == pytest.approx(np.ones(5))
    assert d.number_above(d.nodes.max())[0] > 0  # at or above
    assert d.number_above(0.25)[0] == pytest.approx(np.sum(d.weights[d.nodes > 0.25]) * SIZE / 5)
    counts = SIZE * np.sum(d.weights * (d.nodes > 0.75), axis=1)
    assert d.number_above(0.75)[1] == pytest.approx(counts.std(ddof=1) / 5**0.5, rel=1e-10)
    ones = np.sum(np.where(abs(d.nodes - 1) < 1e-8, d.weights, 0), axis=1)  # a narrow bump at 1 sees no other node
    assert d.per_decade(np.array([1.0]), width=1e-3)[0] == pytest.approx(ones.mean() * 1e3 / (2 * np.pi) ** 0.5)
    with pytest.raises(ValueError, match="width 0 "):
        d.per_decade(np.array([1.0]), width=0)
    with pytest.raises(ValueError, match="down to 0"):
        d.per_decade(np.array([0.0, 1.0]))


def test_zero_gradient():
    model, (inputs, targets), _, _ = operator(SPECTRA["wide"])
    s = lnp.spectrum(model, (inputs, np.zeros_like(targets)), probes=2)
    assert all(np.isnan(a).tolist() == [True] for a in (s.eigenvalues, s.weights, s.shares, s.residuals))
    assert np.isnan(s.chi_pos)
    assert np.isnan(s.first_moment)
    assert any("gradient is zero" in note for note in s.notes)
    assert np.isfinite(s.density.moment(1)[0])  # the kernel has a spectrum all the same


def test_zero_kernel():
    model = lnp_numpy.OperatorModel(np.zeros((SAMPLES, OUTPUTS)), np.zeros((SIZE, PARAMETERS)))
    s = lnp.spectrum(model, (None, np.ones((SAMPLES, OUTPUTS))))
    assert (s.eigenvalues.tolist(), s.weights.tolist(), s.exhausted) == ([0], [1], True)
    assert np.isnan([s.chi_pos, *s.shares]).all()


def test_values_that_are_not_finite():
    model = lnp_numpy.OperatorModel(np.zeros((SAMPLES, OUTPUTS)), np.full((SIZE, PARAMETERS), np.nan))
    s = lnp.spectrum(model, (None, np.ones((SAMPLES, OUTPUTS))), probes=2)
    assert np.isnan(s.chi_pos)
    assert any("not finite" in note for note in s.decomposition.notes)


def test_a_backend_whose_products_do_not_belong_together_is_noticed():
    jacobian, g = network()
    lin = lin_as_floats(record(jacobian, g))
    wrong = type(lin)(**{**vars(lin), "jvp": lambda u: 1.01 * lin.jvp(u)})
    s = from_lanczos(RunLanczos("exact", 0.0, 1, 5, 0)(wrong))
    assert s.moment_error == pytest.approx(0.01, rel=1e-6)
    assert any("off by 0.01" in note for note in s.notes)


@pytest.mark.parametrize(("factor", "noted"), [(1.0009, False), (1.0011, True), (0.9991, False), (0.9989, True)])
def test_a_mean_that_is_off_by_more_than_a_thousandth_is_noted(factor, noted):
    jacobian, g = network()
    lin = lin_as_floats(record(jacobian, g))
    s = from_lanczos(RunLanczos("exact", 0.0, 1, 5, 0)(replace(lin, jvp=lambda u: factor * lin.jvp(u))))
    assert bool(s.notes) is noted
    assert s.moment_error == pytest.approx(abs(factor - 1), rel=1e-6)


@pytest.mark.parametrize(("left", "steps"), [(31, 1), (33, 2)])
def test_what_rounding_leaves_of_a_direction_is_none(left, steps):
    """Of the kernel [[1, b], [b, 1]] the start (1, 0) spans all up to b, here some units of rounding."""
    b = left * np.finfo(float).eps
    jacobian, g = {"w": np.array([[[1.0, 0.0], [b, 1.0]]])}, np.array([[1.0, 0.0]])
    assert tridiagonalize(record(jacobian, g), g, 2).size == steps


def test_nodes_with_less_than_half_a_thousandth_of_the_decrease_are_not_printed():
    model, batch, _, _ = operator(SPECTRA["wide"])
    s = replace(lnp.spectrum(model, batch, steps=3), shares=np.array([0.9989, 6e-4, 4e-4]))
    assert [f"{share:.3g}" in str(s) for share in s.shares] == [True, True, False]


def test_bad_options():
    model, batch, _, _ = operator(SPECTRA["wide"])
    with pytest.raises(ValueError, match="steps is 0"):
        lnp.spectrum(model, batch, steps=0)
    with pytest.raises(ValueError, match="Unknown estimator 'guess'"):
        lnp.spectrum(*operator(SPECTRA["one"])[:2], estimator="guess")
    with pytest.raises(ValueError, match="probes is -1"):
        lnp.spectrum(model, batch, probes=-1)
    jacobian, g = network()
    with pytest.raises(TypeError, match="no Jacobian-vector products"):
        RunLanczos("exact", 0.0, 1, 5, 0)(record(jacobian, g, jvp=None))
    with pytest.raises(TypeError, match="inside a compiled function"):
        from_lanczos(RunLanczos("exact", 0.0, 1, 5, 0)(record(jacobian, g)))


def test_the_array_api_is_enough():
    """The strict namespace gives what NumPy gives."""
    jacobian, g = network()
    results = []
    for xp in (array_api_strict, np):
        measured = RunLanczos("exact", 0.0, 1, 4, 3)(record(jacobian, g, xp))
        entries = [*measured.gradient.diagonal, *measured.gradient.off_diagonal]
        entries += [entry for t in measured.probes for entry in (*t.diagonal, *t.off_diagonal)]
        assert all(entry.shape == () for entry in entries)
        results.append([float(entry) for entry in entries])
    assert results[0] == pytest.approx(results[1], rel=1e-10)


def test_float32_keeps_single_precision():
    jacobian, g = network()
    wide, narrow = (
        quadrature(*map(np.asarray, tridiagonalize(lin, lin.loss_gradient, 6)[:2]), 6)
        for lin in (record(jacobian, g, dtype=dtype) for dtype in ("float64", "float32"))
    )
    # rounding of 6 steps, twice the products; a small node has the rounding of the largest
    rounding = float(np.finfo(np.float32).eps * wide.nodes.max())
    assert narrow.nodes == pytest.approx(wide.nodes, rel=1e-4, abs=rounding)
    assert narrow.weights == pytest.approx(wide.weights, abs=1e-5)


@pytest.mark.parametrize(
    "entries", [([1.0, np.nan], [0.5, 0.0]), ([1.0, 1.0], [np.nan, 0.0]), ([1.0, 1.0], [0.5, np.nan])]
)
def test_one_entry_that_is_not_finite_makes_the_quadrature_nan(entries):
    found = quadrature(*entries, 2)
    assert np.isnan([found.nodes, found.weights, found.residuals]).all()
    assert found.nodes.shape == (2,)


def test_residuals_are_those_of_the_ritz_vectors():
    """||Theta y - theta y|| for y = Q s, of a basis that is formed anew here."""
    jacobian, g = network()
    lin = record(jacobian, g)
    theta = kernel(jacobian)
    steps = 4
    powers = [np.linalg.matrix_power(theta, k) @ g.reshape(-1) for k in range(steps)]
    vectors, _ = np.linalg.qr(np.stack(powers, axis=1))
    values, inner = np.linalg.eigh(vectors.T @ theta @ vectors)
    ritz = vectors @ inner
    t = tridiagonalize(lin, lin.loss_gradient, steps)
    found = quadrature(t.diagonal, t.off_diagonal, steps)
    assert found.nodes == pytest.approx(values[::-1], rel=1e-9)
    distances = np.linalg.norm(theta @ ritz - ritz * values, axis=0)[::-1]
    assert found.residuals == pytest.approx(distances, rel=1e-6)
    assert distances.min() > 1e-3 * values.max()


def test_no_more_steps_than_were_asked_for():
    jacobian, g = network()
    assert tridiagonalize(record(jacobian, g), g, 3).size == 3
