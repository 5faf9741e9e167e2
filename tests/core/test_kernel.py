"""Dense kernels, their modes and what they are compared by, against NumPy on explicit Jacobians."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.contract import registry
from lnp.contract.options import Options
from lnp.spectral import eager, pages
from lnp.spectral import kernel as module
from lnp.spectral.kernel import with_progress
from lnp.spectral.similarity import effective_rank, entropy, participation_ratio

SAMPLES, OUTPUTS, PARAMETERS = 5, 3, 40
RNG = np.random.default_rng(0)
JACOBIAN = RNG.normal(size=(SAMPLES * OUTPUTS, PARAMETERS))
TARGETS = RNG.normal(size=(SAMPLES, OUTPUTS))
MODEL, BATCH = lnp_numpy.OperatorModel(np.zeros((SAMPLES, OUTPUTS)), JACOBIAN), (None, TARGETS)
THETA = JACOBIAN @ JACOBIAN.T
G = -2 * TARGETS.reshape(-1) / TARGETS.size
BLOCKS = THETA.reshape(SAMPLES, OUTPUTS, SAMPLES, OUTPUTS)


def psd(size, seed):
    a = np.random.default_rng(seed).normal(size=(size, size + 2))
    return a @ a.T


@pytest.mark.parametrize("block", [1, 4, 64])
def test_rows_of_each_kind(block, monkeypatch):
    """Whatever the size of the blocks they are formed in."""
    plain = eager.kernel_rows
    monkeypatch.setattr(eager, "kernel_rows", lambda lin, most: plain(lin, block))
    expected = {
        "full": THETA,
        "per_class": np.stack([BLOCKS[:, k, :, k] for k in range(OUTPUTS)]),
        "traced": np.einsum("nkmk->nm", BLOCKS),
    }
    for kind, matrix in expected.items():
        k = lnp.kernel(MODEL, BATCH, kind=kind)
        assert k.matrix == pytest.approx(matrix, rel=1e-12)
        assert k.trace == pytest.approx(np.trace(THETA), rel=1e-12)
        assert k.asymmetry < 1e-14
        assert k.loss_gradient == pytest.approx(G.reshape(SAMPLES, OUTPUTS))
        assert np.array_equal(k.matrix, np.swapaxes(k.matrix, -1, -2))


@pytest.mark.parametrize(("size", "expected"), [(4 * 8 * 15, [4, 4]), (1, [1, 15])])
def test_blocks_are_as_large_as_their_bytes(size, expected, monkeypatch):
    """Rows of a block, one at least, and how many blocks the 15 rows make."""
    seen, plain = [], eager.kernel_rows
    monkeypatch.setattr(module, "BLOCK_BYTES", size)
    monkeypatch.setattr(eager, "kernel_rows", lambda lin, most: seen.append(most) or plain(lin, most))
    monkeypatch.setattr(module, "with_progress", lambda items, total, progress: seen.append(total) or items)
    assert lnp.kernel(MODEL, BATCH).matrix == pytest.approx(THETA, rel=1e-12)
    assert seen == expected


def test_a_block_takes_64_mebibytes_at_most(monkeypatch):
    seen, lin = [], SimpleNamespace(outputs=np.broadcast_to(0.0, (1, 2**18)))
    monkeypatch.setattr(eager, "kernel_rows", lambda lin, most: seen.append(most) or [])
    module._fill_matrix(lin, "per_class", 2**28, False)
    assert seen == [2**26 // (8 * 2**18)]


def test_a_kernel_takes_two_gibibytes_at_most(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_fill_matrix", lambda lin, kind, most, progress: seen.append(most) or THETA)
    lnp.kernel(MODEL, BATCH)
    assert seen == [2 * 1024**3]


@pytest.mark.parametrize("block", [4, 15, 64])
def test_each_row_costs_one_product(block):
    lin, asked = eager.linearize(MODEL, BATCH, Options()), []
    counted = type(lin)(**{**vars(lin), "jvp": lambda u: asked.append(1) or lin.jvp(u)})
    rows = np.concatenate([rows for _, rows in eager.kernel_rows(counted, block)])
    assert rows.reshape(THETA.shape) == pytest.approx(THETA, rel=1e-12)
    assert len(asked) == len(THETA)


@pytest.mark.parametrize(("rows", "shown"), [(2048, True), (2049, False)])
def test_modes_are_printed_of_small_kernels(rows, shown):
    numbers = dict.fromkeys(("rate", "trace", "chi_pos", "preference", "participation_ratio"), 1.0)
    modes = {"eigenvalues": [7.5], "weights": [0.25], "contributions": [0.5]}
    k = SimpleNamespace(matrix=np.empty((rows, 0)), kind="full", notes=(), **numbers, **modes)
    assert ("7.5" in pages.kernel_page(k).to_text()) is shown


def test_rate_position_and_modes():
    k = lnp.kernel(MODEL, BATCH)
    values, vectors = np.linalg.eigh(THETA)
    weights = (vectors.T @ G) ** 2 / (G @ G)
    assert k.eigenvalues[::-1] == pytest.approx(values, rel=1e-10)
    assert THETA @ k.eigenvectors == pytest.approx(k.eigenvectors * k.eigenvalues, abs=1e-10)
    assert k.weights[::-1] == pytest.approx(weights, abs=1e-10)
    assert k.contributions[::-1] == pytest.approx(weights * values / (weights @ values), abs=1e-10)
    assert k.rate == pytest.approx(G @ THETA @ G, rel=1e-12)
    assert k.chi_pos == pytest.approx(G @ THETA @ G / (G @ G) / np.trace(THETA), rel=1e-12)


def test_position_from_the_kernel_the_measure_and_the_decomposition():
    k, s = lnp.kernel(MODEL, BATCH), lnp.spectrum(MODEL, BATCH, estimator="exact")
    d = lnp.decompose(MODEL, BATCH, estimator="exact")
    assert (k.chi_pos, s.chi_pos) == pytest.approx((d.chi_pos, d.chi_pos), rel=1e-12)
    assert (k.rate, k.trace) == pytest.approx((d.rate, d.chi_net * d.loss_terms), rel=1e-12)
    assert k.eigenvalues == pytest.approx(s.eigenvalues, rel=1e-8)
    assert k.contributions == pytest.approx(s.shares, abs=1e-8)


def test_modes_need_the_full_kernel():
    for kind in ("per_class", "traced"):
        k = lnp.kernel(MODEL, BATCH, kind=kind)
        for name in ("rate", "chi_pos", "weights", "contributions"):
            with pytest.raises(ValueError, match='kind="full"'):
                getattr(k, name)
    single = lnp_numpy.OperatorModel(np.zeros((SAMPLES, 1)), JACOBIAN[:SAMPLES])
    traced, full = (lnp.kernel(single, (None, TARGETS[:, :1]), kind=kind) for kind in ("traced", "full"))
    assert traced.chi_pos == pytest.approx(full.chi_pos, rel=1e-12)
    with pytest.raises(ValueError, match="per_class"):
        lnp.kernel(single, (None, TARGETS[:, :1]), kind="per_class").rate  # noqa: B018


def test_zero_gradient_and_zero_kernel():
    k = lnp.kernel(MODEL, (None, np.zeros((SAMPLES, OUTPUTS))))
    assert np.isnan(k.chi_pos)
    assert np.all(np.isnan(k.weights))
    assert np.all(np.isnan(k.contributions))
    none = lnp_numpy.OperatorModel(np.zeros((SAMPLES, OUTPUTS)), 0 * JACOBIAN)
    k = lnp.kernel(none, BATCH)
    assert (k.trace, k.asymmetry) == (0, 0)
    assert np.isnan(k.chi_pos)
    assert np.isnan(k.entropy)
    assert np.all(np.isnan(k.contributions))


@pytest.mark.parametrize("scale", [1.0, 1e-6, -1.0])
def test_asymmetry_is_reported(scale):
    lin = eager.linearize(MODEL, BATCH, Options())
    skew = type(lin)(**{**vars(lin), "jvp": lambda u: lin.jvp(u) * scale * (1 + 0.5 * np.arange(SAMPLES))[:, None]})
    wrong = np.concatenate([rows for _, rows in eager.kernel_rows(skew, 7)]).reshape(THETA.shape)
    asked = []
    backend = type("B", (), {"linearize": staticmethod(lambda *given: asked.append(given[-1]) or skew)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "find", lambda model: backend)
        k = lnp.kernel(MODEL, BATCH)
    assert [(options.split, options.population) for options in asked] == [(False, False)]  # which nothing needs
    assert k.asymmetry == pytest.approx(np.abs(wrong - wrong.T).max() / np.abs(wrong).max(), rel=1e-12)
    assert k.matrix == pytest.approx((wrong + wrong.T) / 2, rel=1e-12)


def test_bad_options():
    with pytest.raises(ValueError, match="kind of kernel 'dense'"):
        lnp.kernel(MODEL, BATCH, kind="dense")
    with pytest.raises(ValueError, match="full kernel of 5 samples x 3 outputs"):
        lnp.kernel(MODEL, BATCH, max_bytes=8 * 4 * 15 * 15 - 1)
    assert lnp.kernel(MODEL, BATCH, max_bytes=8 * 4 * 15 * 15).matrix.shape == THETA.shape
    lin = eager.linearize(MODEL, BATCH, Options())
    for changes, error, words in (
        ({"jvp": None}, TypeError, "no Jacobian-vector products"),
        ({"violations": ((np.asarray(False), "fine"), (np.asarray(True), "a label is 9"))}, ValueError, "a label is 9"),
    ):
        changed = type(lin)(**{**vars(lin), **changes})
        backend = type("B", (), {"linearize": staticmethod(lambda *_: changed)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "find", lambda model: backend)
            with pytest.raises(error, match=words):
                lnp.kernel(MODEL, BATCH)


def test_progress_is_quiet_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert list(with_progress([1, 2], 2, None)) == list(with_progress([1, 2], 2, False)) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("asked", "terminal", "bar"), [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False),
])  # fmt: skip
def test_progress_where_it_is_asked_for_or_seen(asked, terminal, bar, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=lambda items, **options: ["a bar", *items]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(with_progress([1, 2], 2, asked)) == (["a bar", 1, 2] if bar else [1, 2])


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_progress([1, 2], 2, None)) == [1, 2]
    with pytest.raises(ImportError, match=r"lnp\[spectrum\]"):
        with_progress([1, 2], 2, True)


def test_alignment():
    a, b = psd(4, 1), psd(4, 2)
    expected = np.trace(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert lnp.alignment(a, b) == pytest.approx(expected, rel=1e-12)
    assert lnp.alignment(a, 7 * a) == pytest.approx(1)
    h = np.eye(4) - 0.25
    centred = [h @ m @ h for m in (a, b)]
    expected = np.sum(centred[0] * centred[1]) / np.linalg.norm(centred[0]) / np.linalg.norm(centred[1])
    assert lnp.alignment(a, b, centered=True) == pytest.approx(expected, rel=1e-12)
    many = lnp.alignment(np.stack([a, a, b]), np.stack([b, b, a]), centered=True)
    assert many == pytest.approx([expected] * 3, rel=1e-12)
    both = lnp.alignment(np.stack([a, b]), np.stack([b, b]))
    assert both == pytest.approx([lnp.alignment(a, b), 1])
    with pytest.raises(ValueError, match="one number of rows"):
        lnp.alignment(a, psd(3, 0))
    with pytest.raises(ValueError, match="Expected square matrices"):
        lnp.alignment(a, np.ones(3))
    with pytest.raises(ValueError, match="Expected square matrices"):
        lnp.alignment(np.ones((2, 2, 3)), np.ones((2, 2, 3)))
    with pytest.raises(ValueError, match="Expected one number of rows"):
        lnp.alignment(np.ones((2, 2, 2)), np.ones((2, 3, 3)))


def test_target_alignment():
    k = psd(6, 1)
    labels = np.array([0, 1, 2, 0, 1, 2])
    y = (labels[:, None] == np.arange(3)).astype(float)
    expected = np.sum(k * (y @ y.T)) / np.linalg.norm(k) / np.linalg.norm(y @ y.T)
    assert lnp.target_alignment(k, labels) == pytest.approx(expected, rel=1e-12)
    assert lnp.target_alignment(k, y) == pytest.approx(expected, rel=1e-12)
    assert lnp.target_alignment(y @ y.T, labels) == pytest.approx(1)
    full, flat = lnp.kernel(MODEL, BATCH), TARGETS.reshape(-1)
    expected = flat @ THETA @ flat / np.linalg.norm(THETA) / (flat @ flat)
    assert lnp.target_alignment(full, TARGETS) == pytest.approx(expected, rel=1e-12)
    # labels against a full kernel: one-hot over its outputs, also where the last class does not occur
    one_hot = np.eye(3)[[0, 1, 0, 0, 1]].reshape(-1)
    expected = one_hot @ THETA @ one_hot / np.linalg.norm(THETA) / (one_hot @ one_hot)
    assert lnp.target_alignment(full, [0, 1, 0, 0, 1]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="The kernel has 6 rows"):
        lnp.target_alignment(k, labels[:5])


def test_labels_against_a_full_kernel_of_few_rows():
    """One sample; one output, whose only class is 0; none of the targets is taken for more classes than outputs."""
    one_sample, one_output = psd(3, 1), psd(4, 1)
    norm = np.linalg.norm(one_sample)
    assert lnp.target_alignment(one_sample, [1]) == pytest.approx(one_sample[1, 1] / norm, rel=1e-12)
    expected = one_output.sum() / np.linalg.norm(one_output) / 4
    assert lnp.target_alignment(one_output, [0, 0, 0, 0]) == pytest.approx(expected, rel=1e-12)
    two_outputs = psd(4, 2)
    picked = two_outputs[[0, 0, 3, 3], [0, 3, 0, 3]].sum()
    assert lnp.target_alignment(two_outputs, [0, 1]) == pytest.approx(picked / np.linalg.norm(two_outputs) / 2)


@pytest.mark.parametrize("targets", [[0.5, 2.0, -1.0, 1.5], [[0, 1], [2, 5], [1, 1], [0, 3]]])
def test_targets_that_are_no_labels_are_taken_as_they_are(targets):
    k, y = psd(4, 0), np.asarray(targets, dtype=float).reshape(4, -1)
    expected = np.sum(k * (y @ y.T)) / np.linalg.norm(k) / np.linalg.norm(y @ y.T)
    assert lnp.target_alignment(k, targets) == pytest.approx(expected, rel=1e-12)


def test_entropy_and_ranks():
    values = np.array([4.0, 3.0, 2.99, 0.01, 0.0])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    k, p = (q * values) @ q.T, values[:4] / 10
    assert entropy(k) == pytest.approx(-np.sum(p * np.log(p)), rel=1e-10)
    assert effective_rank(k) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-10)
    assert participation_ratio(k) == pytest.approx(100 / np.sum(values**2), rel=1e-10)
    assert (entropy(5 * k), participation_ratio(5 * k)) == pytest.approx((entropy(k), participation_ratio(k)))
    one = np.outer(q[0], q[0])
    assert (entropy(one), effective_rank(one), participation_ratio(one)) == pytest.approx((0, 1, 1), abs=1e-10)
    assert effective_rank(np.stack([k, one])) == pytest.approx([effective_rank(k), 1])
    assert participation_ratio(np.stack([k, one])) == pytest.approx([participation_ratio(k), 1])
    full = lnp.kernel(MODEL, BATCH)
    assert full.entropy == pytest.approx(entropy(THETA), rel=1e-12)
    assert full.effective_rank == pytest.approx(effective_rank(THETA), rel=1e-12)
    assert full.participation_ratio == pytest.approx(participation_ratio(THETA), rel=1e-12)


def test_eigenvalues_below_a_share_of_the_largest_are_rounding():
    assert entropy(np.diag([1.0, 0.9e-12])) == 0
    assert entropy(np.diag([1.0, 1.1e-12])) > 0
    assert entropy(1e-20 * np.eye(2)) == pytest.approx(np.log(2))


def test_kernel_velocity():
    a, b = psd(4, 1), psd(4, 2)
    v = lnp.kernel_velocity(a, b, interval=4.0)
    assert v.distance == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert v.rotation == pytest.approx(1 - lnp.alignment(a, b), rel=1e-12)
    assert (v.speed, v.rotation_speed) == (v.distance / 4, v.rotation / 4)
    assert lnp.kernel_velocity(a, b).interval == 1
    assert lnp.kernel_velocity(a, a).rotation == pytest.approx(0, abs=1e-12)
    many = lnp.kernel_velocity(np.stack([a, b]), np.stack([b, a]))
    assert many.distance == pytest.approx([v.distance, np.linalg.norm(b - a) / np.linalg.norm(b)])
    with pytest.raises(ValueError, match="interval is 0"):
        lnp.kernel_velocity(a, b, interval=0)
