"""Nested batches, Gram matrices of gradients, and cross responses of two losses, in NumPy."""

import itertools
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.batches import gram
from lnp.batches.cutting import part, samples_of

RNG = np.random.default_rng(0)
MODEL = lnp_numpy.LinearModel(RNG.normal(size=(3, 2)), RNG.normal(size=2))
BATCH = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 2))


def some(index):
    return tuple(array[list(index)] for array in BATCH)


def gradients(batch=BATCH):
    """(N, P) gradients of single samples."""
    (x, y), bias = batch, np.ones((len(batch[0]), 1))
    error = 2 * (x @ MODEL.weight + MODEL.bias - y) / y.shape[1]
    return np.einsum("ni,nk->nik", np.hstack([x, bias]), error).reshape(len(x), -1)


class TestNestedBatches:
    def test_each_size_is_the_first_samples_alone(self):
        nested = lnp.decompose_nested(MODEL, BATCH, batch_sizes=[6, 2, 4, 4], seed=3)
        assert nested.batch_sizes == (2, 4, 6)
        for size, d in zip(nested.batch_sizes, nested.decompositions, strict=True):
            assert d == lnp.decompose(MODEL, some(range(size)), seed=3)

    def test_sizes_double_up_to_the_whole(self):
        batch = RNG.normal(size=(20, 3)), RNG.normal(size=(20, 2))
        assert lnp.decompose_nested(MODEL, batch).batch_sizes == (8, 16, 20)
        assert lnp.decompose_nested(MODEL, BATCH).batch_sizes == (6,)
        assert lnp.decompose_nested(MODEL, BATCH, batch_sizes=[1]).decompositions == (lnp.decompose(MODEL, some([0])),)
        assert lnp.decompose_nested(MODEL, tuple(array[:16] for array in batch)).batch_sizes == (8, 16)

    @pytest.mark.parametrize("size", [1, 2, 4, 5])
    def test_the_floor_is_the_mean_over_all_parts_of_that_size(self, size):
        """Over all parts of b samples the rate is the population's plus noise / b, exactly, as estimated from all."""
        nested = lnp.decompose_nested(MODEL, BATCH, batch_sizes=(3, 6))
        rates = [lnp.decompose(MODEL, some(index)).rate for index in itertools.combinations(range(6), size)]
        whole = nested.decompositions[-1]
        expected = nested.expected_chi_pos(size) * whole.chi_loss * whole.chi_net
        assert np.mean(rates) == pytest.approx(expected, rel=1e-12)

    def test_prints_a_row_for_each_size_and_notes_once(self):
        nested = lnp.decompose_nested(MODEL, BATCH, batch_sizes=(2, 4, 6))
        lines = str(nested).splitlines()
        assert [line.split()[0] for line in lines[1:4]] == ["2", "4", "6"]
        assert lines[4:] == [
            "",
            "note (2 samples): no population values: fewer than three samples tell nothing about their spread",
        ]

    def test_without_population_values_nothing_is_expected(self):
        nested = lnp.decompose_nested(MODEL, BATCH, population=False)
        assert nested.population is None
        assert np.isnan(nested.expected_chi_pos(4))

    @pytest.mark.parametrize("sizes", [(), (0, 2), (4, 7), (2, 4, 7), (-1,), (2.5,), 4])
    def test_sizes_that_the_batch_does_not_have(self, sizes):
        with pytest.raises(ValueError, match=r"for a batch of 6 samples\. Expected a list of integers from 1 to 6"):
            lnp.decompose_nested(MODEL, BATCH, batch_sizes=sizes)


Pair = namedtuple("Pair", "left right")


@dataclass
class Held:
    x: np.ndarray
    scale: float


class TestCutting:
    x, y = np.arange(8.0).reshape(4, 2), np.arange(4)

    @pytest.mark.parametrize("wrap", [lambda x: {"x": x}, lambda x: [x, x], lambda x: Pair(x, {"deep": (x,)})])
    def test_containers_keep_their_kind(self, wrap):
        inputs, targets = part((wrap(self.x), self.y), slice(1, 3), 4)
        assert str(inputs) == str(wrap(self.x[1:3]))
        assert type(inputs) is type(wrap(self.x))
        assert targets.tolist() == [1, 2]

    def test_what_is_no_array_or_counts_once_stays(self):
        once = np.zeros((1, 9))
        held, other, flag = part(((Held(self.x, 2.0), once, None), self.y), slice(0, 2), 4)[0]
        assert held.x.tolist() == self.x[:2].tolist()
        assert held.scale == 2.0
        assert other is once
        assert flag is None

    def test_a_dictionary_with_labels(self):
        batch = {"tokens": self.x, "labels": self.y}
        assert samples_of(batch) == 4
        assert part(batch, slice(0, 1), 4)["labels"].tolist() == [0]
        assert samples_of(batch | {"scale": np.ones((1, 2))}) == 4
        assert samples_of({"tokens": self.x}) == 4

    @pytest.mark.parametrize("shapes", [[(4, 4)], [(1, 1), (1, 3)], [(2, 3), (2, 4, 2)]])
    def test_lengths_that_can_be_read_in_one_way_alone(self, shapes):
        """A kernel's rows are the only array, and a single sample cannot be cut along another axis."""
        arrays = [np.arange(np.prod(shape)).reshape(shape) for shape in shapes]
        cut = part((arrays, np.zeros(shapes[0][0])), slice(0, 1), shapes[0][0])[0]
        assert [array.tolist() for array in cut] == [array[:1].tolist() for array in arrays]

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            ((x, np.zeros((3, 2))), r"arrays of shapes \[\(4, 2\), \(3, 2\)\]"),  # such as the edges of a graph
            ((x, np.zeros((4, 4))), r"arrays of shapes \[\(4, 2\), \(4, 4\)\]"),  # such as an attention mask
            ((x, np.zeros((4, 4, 2))), r"arrays of shapes \[\(4, 2\), \(4, 4, 2\)\]"),
            (np.zeros((3, 4)), r"arrays of shapes \[\(3, 4\)\]"),  # the sample axis is not the first one
            (SimpleNamespace(x=x), "hold no arrays"),
            ((x, SimpleNamespace(edges=3)), "holds a SimpleNamespace, which has no slices"),
            ((x, SimpleNamespace(shape=(4, 3))), "holds a SimpleNamespace, which has no slices"),  # as sparse arrays
        ],
    )
    def test_a_batch_that_cannot_be_cut_is_refused(self, inputs, words):
        with pytest.raises(ValueError, match=words):
            part((inputs, self.y), slice(0, 2), 4)

    def test_a_mask_between_two_samples_is_refused(self):
        with pytest.raises(ValueError, match="each runs over the samples along its first axis alone"):
            part(([self.x[:2], np.zeros((2, 2))], self.y[:2]), slice(0, 1), 2)

    @pytest.mark.parametrize("targets", [None, 3.0, (np.zeros(4), np.zeros(3))])
    def test_targets_that_do_not_tell_the_samples(self, targets):
        with pytest.raises(ValueError, match=r"its targets are of (type|lengths \[3, 4\]).*Expected arrays"):
            samples_of((self.x, targets))

    def test_outputs_of_another_number_of_samples(self, monkeypatch):
        """Such as of a model that runs over windows of its inputs."""
        whole = lnp.decompose(MODEL, BATCH)
        monkeypatch.setattr("lnp.batches.nested.decompose", lambda *args, **options: whole)
        with pytest.raises(ValueError, match="cut to its first 2 samples, and the model returned 6"):
            lnp.decompose_nested(MODEL, BATCH, batch_sizes=(2, 6))


class TestGradientGram:
    def test_single_samples_against_numpy(self):
        gram = lnp.gradient_gram(MODEL, BATCH, groups=6)
        rows = gradients()
        assert gram.matrix == pytest.approx(rows @ rows.T, rel=1e-12)
        norms = np.linalg.norm(rows, axis=1)
        assert gram.cosines == pytest.approx(rows @ rows.T / np.outer(norms, norms), rel=1e-12)

    def test_groups_are_batches(self):
        bounds = ((0, 1), (1, 3), (3, 4), (4, 6))
        grouped = lnp.gradient_gram(MODEL, BATCH, groups=4)
        listed = lnp.gradient_gram(MODEL, (some(range(*bound)) for bound in bounds))
        assert grouped.matrix.tolist() == listed.matrix.tolist()
        assert grouped.losses == pytest.approx([lnp.decompose(MODEL, some(range(*bound))).loss for bound in bounds])

    def test_entries_are_rates_and_cross_responses(self):
        one, other = some((0, 1)), some((2, 3, 4))
        gram = lnp.gradient_gram(MODEL, [one, other])
        rates = [lnp.decompose(MODEL, batch).rate for batch in (one, other)]
        assert gram.rates == pytest.approx(rates, rel=1e-12)
        assert gram.matrix[0, 1] == pytest.approx(lnp.cross_response(MODEL, one, other).rate, rel=1e-12)
        assert gram.matrix[1, 0] == gram.matrix[0, 1]

    def test_pairs_estimate_the_population(self):
        """Over all pairs of samples, drawn with replacement, the mean is ||grad L||^2 of the pool."""
        found = [
            lnp.gradient_gram(MODEL, [some([a]), some([b])]).population_rate
            for a, b in itertools.product(range(6), repeat=2)
        ]
        assert np.mean(found) == pytest.approx(np.sum(gradients().mean(axis=0) ** 2), rel=1e-12)
        assert np.isnan(lnp.gradient_gram(MODEL, [BATCH]).population_rate)

    def test_the_error_is_that_of_batches_left_out(self):
        """SE^2 = (m - 1)/m sum_b (mean over pairs without b - their mean)^2."""
        batches = [some([a]) for a in range(5)]
        found = lnp.gradient_gram(MODEL, batches)
        without = [lnp.gradient_gram(MODEL, batches[:a] + batches[a + 1 :]).population_rate for a in range(5)]
        assert found.population_rate_stderr == pytest.approx((4 * np.var(without)) ** 0.5, rel=1e-12)
        assert np.isnan(lnp.gradient_gram(MODEL, batches[:2]).population_rate_stderr)

    def test_one_group_is_the_batch(self):
        assert lnp.gradient_gram(MODEL, BATCH, groups=1).rates == pytest.approx([lnp.decompose(MODEL, BATCH).rate])

    @pytest.mark.parametrize("microbatch", [None, 2])
    def test_nothing_but_the_gradient_is_asked_for(self, monkeypatch, microbatch):
        asked, evaluate = [], gram.evaluate_gradient
        monkeypatch.setattr(gram, "evaluate_gradient", lambda *given: asked.append(given[-1]) or evaluate(*given))
        lnp.gradient_gram(MODEL, [BATCH], microbatch=microbatch)
        assert [(options.split, options.population) for options in asked] == [(microbatch is not None, False)]

    def test_it_is_shown_as_text_and_as_html(self):
        notes = ("a < b",)
        assert "of which" not in str(lnp.GradientGram(np.eye(12), np.ones(12)))
        gram = lnp.GradientGram(np.diag([4.0] * 13) + 1e-9, np.full(13, 0.25), notes)
        lines = str(gram).splitlines()
        assert [line.split()[0] for line in lines[1:13]] == [str(index) for index in range(12)]
        assert not lines[13]
        assert lines[0].split() == ["batch", "loss", "rate", *map(str, range(12))]
        assert lines[2].split() == ["1", "0.25", "4", "0.00", "1.00", *["0.00"] * 10]
        assert "13 batches in all, of which 12 are shown" in lines
        assert lines[-1] == "note: a < b"
        assert "<th style='text-align:right'>11</th>" in gram._repr_html_()
        assert "note: a &lt; b" in gram._repr_html_()

    def test_one_loss_for_each_batch(self):
        gram = lnp.gradient_gram(MODEL, [BATCH, BATCH], ["mse", _thrice])
        assert gram.matrix == pytest.approx(gram.matrix[0, 0] * np.array([[1, 3], [3, 9]]), rel=1e-12)
        assert gram.notes == ()

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_squares_stay_in_range(self, scale):
        model = lnp_numpy.LinearModel(MODEL.weight.astype("float32"))
        batch = tuple(array.astype("float32") for array in BATCH)
        plain, scaled = (lnp.gradient_gram(model, batch, _times(s), groups=2) for s in (1.0, scale))
        assert scaled.cosines == pytest.approx(plain.cosines, rel=1e-5)
        assert scaled.matrix / scale / scale == pytest.approx(plain.matrix, rel=1e-5)

    def test_a_gradient_of_zero_has_no_cosine(self):
        solved = BATCH[0], BATCH[0] @ MODEL.weight + MODEL.bias
        cosines = lnp.gradient_gram(MODEL, [BATCH, solved]).cosines
        assert np.isnan(cosines).tolist() == [[False, True], [True, True]]

    @pytest.mark.parametrize(
        ("batches", "options", "words"),
        [
            ([], {}, "batches is empty. Expected a list of batches"),
            (BATCH, {}, "batches is a tuple of ndarray. Expected a list of batches.*pass groups="),
            ({"labels": 1}, {}, "batches is a dict. Expected"),
            ([BATCH], {"loss": ["mse", "mse"]}, "loss= has 2 entries for 1 batches"),
            (BATCH, {"groups": 7}, "groups is 7 for 6 samples. Expected an integer from 1 to 6"),
            (BATCH, {"groups": 0}, "groups is 0 for 6 samples"),
            (BATCH, {"groups": "3"}, "groups is '3' for 6 samples"),
            (None, {}, "batches is a NoneType. Expected"),
        ],
    )
    def test_misuse(self, batches, options, words):
        with pytest.raises(ValueError, match=words):
            lnp.gradient_gram(MODEL, batches, **options)


def _times(scale):
    return lambda f, y: (scale * np.mean((f - y) ** 2), (scale * 2 / f.size * (f - y)).astype(f.dtype))


_thrice = _times(3.0)


class TestTwoLosses:
    def test_the_measured_loss_falls_as_fast_as_a_step_says(self):
        one, other = some((0, 1, 2)), some((3, 4, 5))
        r = lnp.cross_response(MODEL, one, other, "mse", measured_loss="huber", estimator="exact")
        lin = lnp.load("numpy").linearize(MODEL, one, lnp.Options("mse"))
        step = {name: -1e-5 * part for name, part in lin.vjp(lin.loss_gradient).items()}
        falls = lnp.measured_loss_change(MODEL, other, "huber", update=step) / -1e-5
        assert r.rate == pytest.approx(falls, rel=1e-3)
        assert r.rate == pytest.approx(lnp.gradient_gram(MODEL, [one, other], ["mse", "huber"]).matrix[0, 1], rel=1e-12)
        assert r.rate == pytest.approx(r.chi_loss * r.chi_net * r.chi_pos, rel=1e-12)
        assert abs(r.chi_pos) <= (r.trained.chi_pos * r.measured.chi_pos) ** 0.5

    def test_the_same_loss_twice_is_the_cross_response(self):
        one, other = some((0, 1, 2)), some((3, 4, 5))
        options = {"estimator": "joint", "max_probes": 3, "rtol": 0.0, "by_layer": True}
        once = lnp.cross_response(MODEL, one, other, "mse", **options)
        twice = lnp.cross_response(MODEL, one, other, "mse", measured_loss="mse", **options)
        for name in ("rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr"):
            assert type(getattr(twice, name)) is float
            assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-12)
        assert twice.trained == once.trained
        assert twice.measured == once.measured

    def test_the_number_of_terms_is_that_of_the_trained_loss(self):
        r = lnp.cross_response(MODEL, BATCH, BATCH, "mse", measured_loss="mse", loss_terms=3)
        assert (r.trained.loss_terms, r.measured.loss_terms) == (3, 12)
