"""The one self-check: every part of it sees its fault, on networks given by Jacobians, in two namespaces."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import array_api_strict
import numpy as np
import pytest

from lnp.contract.linearization import unit
from lnp.per_sample import differences, self_check
from lnp.per_sample.self_check import Alone, Differences, Pulled
from lnp.per_sample.verdict import Verdict

SAMPLES, OUTPUTS = 12, 3
GENERATOR = np.random.default_rng(0)
JACOBIAN = {name: GENERATOR.normal(size=(SAMPLES, OUTPUTS, size)) for name, size in (("weight", 5), ("bias", 3))}

F = GENERATOR.normal(size=(SAMPLES, OUTPUTS))
TOLERANCE = 1e-6


@dataclass
class Network:
    """A network's operations, and what may be wrong with them."""

    xp: object = np
    custom_backward: bool = True
    gradient: object = None
    norms: object = None
    alone_outputs: object = None
    alone_scale: float = 1.0
    met: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    pulled: list = field(default_factory=list)

    @property
    def outputs(self):
        return self.xp.asarray(F)

    def pull(self, v):
        v = np.asarray(v)
        self.pulled.append(v)
        each = {name: np.einsum("nkp,nk->np", j, v) for name, j in JACOBIAN.items()}
        gradient = {name: part.sum(0) for name, part in each.items()}
        norms = {name: (part**2).sum(1) for name, part in each.items() if name not in self.missing}
        gradient = gradient if self.gradient is None else self.gradient(gradient, v)
        norms = norms if self.norms is None else self.norms(norms)
        wrap = lambda arrays: {name: self.xp.asarray(array) for name, array in arrays.items()}
        return Pulled(wrap(gradient), wrap(norms), self.missing)

    def outputs_alone(self):
        outputs = F.copy()
        for sample, difference in self.met.items():
            outputs[sample] += difference
        return self.xp.asarray(outputs)

    def alone(self, index, v):
        v = self.alone_scale * np.asarray(v)
        each = {name: np.einsum("ckp,ck->cp", j[index], v) for name, j in JACOBIAN.items()}
        outputs = F[index] if self.alone_outputs is None else self.alone_outputs(F[index])
        wrap = self.xp.asarray
        norms = {name: wrap((part**2).sum(1)) for name, part in each.items()}
        return Alone(wrap(outputs), {name: wrap(part.sum(0)) for name, part in each.items()}, norms)


def verdict(network):
    differences, missing = self_check.compare(network)
    numbers = Differences(
        float(differences.outputs),
        float(differences.gradient),
        {name: float(value) for name, value in differences.rules.items()},
        float(differences.bend),
        float(differences.batch),
    )
    return numbers.verdict(TOLERANCE, missing)


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_a_network_that_keeps_its_samples_apart(xp):
    network = Network(xp)
    found = verdict(network)
    assert (found.reason, found.general, found.bent, found.sure) == ("", (), False, True)
    first = network.pulled[0]
    lengths = np.abs(first).max(1)
    assert set(np.flatnonzero(lengths)) == set(self_check.compared_samples(SAMPLES))
    assert len(set(lengths[lengths > 0])) == 6  # all differ
    assert {np.abs(v).max() for v in network.pulled} == {lengths.max(), lengths.max() / 1024, 4 * lengths.max()}


def leaking(norms):
    """What belongs to a sample whose cotangent is zero."""
    moved = dict(norms)
    moved["bias"] = norms["bias"].copy()
    moved["bias"][1] += 1e-3 * norms["bias"].max()
    return moved


CLIPPED = lambda gradient, v: {name: np.clip(part, -3, 3) for name, part in gradient.items()}
FAULTS = {
    "outputs": ({"alone_outputs": lambda f: f + 1e-3}, "interact"),
    "shape of the outputs": ({"alone_outputs": lambda f: f[:, :2]}, "interact"),
    "sum of gradients": ({"alone_scale": 1.001}, "interact"),
    "the outputs of one other sample": ({"met": {1: 1e-3}}, "interact"),
    "outputs that are no numbers": ({"alone_outputs": lambda f: f * np.nan}, "not finite"),
    "a long backward pass": ({"gradient": CLIPPED}, "bent"),
    "a short backward pass": ({"gradient": lambda g, v: {n: p + 1e-5 for n, p in g.items()}}, "bent"),
    "squared norms": ({"norms": lambda norms: {**norms, "bias": norms["bias"] * 1.001}}, "bias"),
    "swapped norms": ({"norms": lambda norms: {**norms, "weight": norms["weight"][::-1]}}, "weight"),
    "norms that are no numbers": ({"norms": lambda norms: {**norms, "bias": norms["bias"] * np.nan}}, "bias"),
    "leakage": ({"norms": leaking}, "bias"),
    "no rule": ({"missing": {"weight": "no rule for einsum"}}, "weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_seen(fault):
    changes, expected = FAULTS[fault]
    found = verdict(Network(**changes))
    if expected == "interact":
        assert "the samples interact" in found.reason
        assert found.sure
    elif expected == "not finite":
        assert "not finite" in found.reason
    elif expected == "bent":
        assert found.bent
        assert not found.reason
    else:
        assert [name for name, _ in found.general] == [expected]
        assert expected in found.notes[0]
        assert not found.reason


def test_signs_of_one_length_would_miss_swapped_biases():
    """The reason for lengths that differ: of equal ones, biases of all samples have the same norm."""
    v = self_check.cotangents(np, F, 4)
    norms = (v**2).sum(1)
    assert len(set(norms)) == 4
    assert set(np.sign(v).ravel()) == {-1.0, 1.0}


def test_sums_over_positions_differ_between_samples():
    """Signs add up to small integers over few positions, and so to the same ones in samples that were mixed up."""
    v = self_check.cotangents(np, np.zeros((16, 8 * 3)), 8).reshape(8, 8, 3)
    sums = np.stack([v.sum(1), v[:, :2].sum(1), v[:, 2:].sum(1)]).reshape(3, -1)
    assert (sums != 0).mean() > 0.9  # of signs, 0.3
    assert min(len(set(row)) for row in sums) > 0.7 * sums.shape[1]  # 4 to 10 of 24
    assert (v == v.astype(np.float16)).all()


def test_cotangents_are_eighths_between_one_and_two_times_lengths():
    v = self_check.cotangents(np, np.zeros((16, 40)), 8)
    eighths = 8 * np.abs(v) / (0.5 + np.arange(8) / 8)[:, None]
    assert set(eighths.ravel()) == set(range(8, 16))
    assert min(len(set(row)) for row in eighths) > 5


def test_what_is_not_finite_everywhere_shows_nothing(monkeypatch):
    monkeypatch.setattr(f"{__name__}.F", F * np.nan)
    found = verdict(Network())
    assert not found.sure
    assert not found.reason


def test_a_look_compares_all_that_ran_apart():
    alone = F.copy()
    assert self_check.look(np, F, alone) == 0
    alone[7, 2] += 1e-3
    assert self_check.look(np, F, alone) == pytest.approx(1e-3 / np.abs(F).max(), rel=1e-6)
    norms = {"bias": np.ones(2), "weight": np.full(2, 4.0)}
    wrong = {"bias": np.asarray([1.0, 1.01]), "weight": np.full(2, 4.0)}
    assert self_check.look(np, F, F, [(norms, norms)]) == 0
    assert self_check.look(np, F, F, [(wrong, norms)]) == pytest.approx(0.005, rel=0.01)


def test_squares_that_have_lost_their_digits_tell_nothing():
    """Gradients of 1e-22 in float32, as of a sample that a cross-entropy has done with."""
    norms, wrong = ({"bias": np.asarray([size, 1.0], np.float32)} for size in (0.0, 1e-38))
    assert self_check.look(np, F, F, [(norms, wrong)]) < 1e-6


def test_moved_parameters_are_other_ones_without_a_pattern():
    parameters = {"gate": np.zeros(()), "weight": np.ones((3, 4), np.float32), "other": np.ones((3, 4), np.float32)}
    moved = self_check.moved(np, parameters)
    assert {name: (p.shape, p.dtype) for name, p in moved.items()} == {
        name: (p.shape, p.dtype) for name, p in parameters.items()
    }
    assert moved["gate"] != 0
    assert len(np.unique(moved["weight"])) == 12
    assert not np.allclose(moved["weight"], moved["other"])
    for size in (1, 10):  # by a tenth of their size and a tenth, at most
        away = np.abs(self_check.moved(np, {"weight": np.full((3, 4), -float(size))})["weight"] + size)
        most = 0.1 * size + 0.1
        assert 0.7 * most < away.max() <= most


def test_a_parameter_is_moved_piece_by_piece_as_it_is_whole():
    whole = np.linspace(-1, 2, 12)
    pieces = [self_check.moved_entries(np, whole[p : p + 5], np.mean(whole**2), 3, p) for p in (0, 5, 10)]
    assert np.array_equal(np.concatenate(pieces), self_check.moved_parameter(np, whole.reshape(3, 4), 3).reshape(-1))


@pytest.mark.parametrize("number", [self_check.BESIDE, differences.TURN])
def test_numbers_that_no_layer_has_as_its_size_are_prime(number):
    assert all(number % divisor for divisor in range(2, number))


def test_verdicts_of_two_sets_of_parameters_are_joined():
    one = Verdict(general=(("a", "no rule"),))
    other = Verdict(general=(("b", "no rule"),), bent=True, sure=False)
    assert one.joined(other) == Verdict("", (("b", "no rule"), ("a", "no rule")), True, False)
    assert one.joined(one) == Verdict("", (("a", "no rule"),), False, True)
    assert one.joined(Verdict("they interact")).reason == "they interact"
    assert hash(one) == hash(Verdict(general=(("a", "no rule"),)))


def test_whatever_a_network_raises_is_a_reason():
    class Own(BaseException):
        pass

    def fails(error):
        def way():
            raise error

        return way

    for error in (AssertionError("pairs only\nmore"), KeyError("x"), RuntimeError()):
        assert self_check.first_that_runs([fails(error), lambda: 3], ()) == (3, "")
        found, reason = self_check.first_that_runs([fails(error)], ())
        assert found is None
        assert type(error).__name__ in reason
        assert str(error).partition("\n")[0] in reason
        assert "more" not in reason
    for fatal in (MemoryError, Own):
        with pytest.raises(fatal):
            self_check.first_that_runs([fails(fatal()), lambda: 3], (MemoryError,))


def test_sums_of_gradients_are_compared_by_the_size_of_what_they_add():
    """A gate whose gradient comes from the neighbours shows; rounding in a sum that has cancelled does not."""
    norms = {"gate": np.full(4, 1.0), "weight": np.full(4, 9.0)}
    batch = {"gate": np.asarray([1e-9]), "weight": np.zeros(3)}
    assert differences.sums_apart(np, {"gate": np.asarray([0.0])}, batch, norms) < 1e-8
    assert differences.sums_apart(np, {"gate": np.asarray([0.4])}, batch, norms) == pytest.approx(0.1, rel=0.1)


def test_differences_by_hand():
    one, other = ({"w": np.array(w), "v": np.array(v)} for w, v in (([3.0, 5.0], [1e-3]), ([3.0, 4.0], [0.0])))
    found = differences.gradients_apart(np, one, other)
    assert found == pytest.approx({"w": 1 / (5 + 0.03 * 5), "v": 1e-3 / (0.03 * 5)}, rel=1e-12)
    norms = {"gate": np.full(4, 1.0), "weight": np.full(4, 9.0)}  # sqrt(N sum) is 4 and 12
    alone, batch = ({"gate": np.array([0.0, a]), "weight": np.zeros(3)} for a in (0.4, 0.1))
    expected = 0.3 / (4 + 0.03 * np.hypot(4, 12))
    assert differences.sums_apart(np, alone, batch, norms) == pytest.approx(expected, rel=1e-12)
    assert differences.finite(np, [np.array([3.0, -1.0])]) == 0
    assert np.isnan(differences.finite(np, [np.array([3.0]), np.array([np.nan, 1.0])]))


@pytest.mark.parametrize("less", [0.75, 1.25])
def test_differences_of_square_norms_by_hand(less):
    """Where one is less than the other or more, and what arrives at samples whose cotangent is zero."""
    alone = {"w": np.array([2.0, 4.0]), "v": np.array([1.0, 1.0])}
    in_batch = {"w": np.array([2.0 * less, 4.0]), "v": np.array([1.0, 1.0])}
    found = differences.square_norms_apart(np, in_batch, alone, None)
    assert found == pytest.approx({"w": 0.5 / (2 + 0.03**2 * 3), "v": 0.0}, rel=1e-12)
    in_batch = {"w": np.array([4.0, 0.1, 2.0 * less]), "v": np.array([1.0, 0.7, 1.0])}
    found = differences.square_norms_apart(np, in_batch, alone, [2, 0])
    assert found == pytest.approx({"w": 0.5 / (2 + 0.03**2 * 3), "v": 0.7 / 5}, rel=1e-12)
    tiny = {"w": np.array([1e-36], np.float32)}
    info = np.finfo(np.float32)
    found = differences.square_norms_apart(np, {"w": 0 * tiny["w"]}, tiny, None)["w"]
    assert found == pytest.approx(1e-36 / (info.smallest_normal / info.eps**2), rel=1e-5)


def test_which_samples_are_compared():
    """Half of a batch at most, from its first sample to its last."""
    assert [self_check.compared_samples(n, 4) for n in (1, 2, 3, 4, 5)] == [[0], [0], [0], [0, 3], [0, 4]]
    assert self_check.compared_samples(100, 4) == [0, 33, 66, 99]


def test_the_larger_difference_is_told():
    for outputs, gradient in ((0.5, 0.01), (0.01, 0.5)):
        assert "changes by 0.5 (relative)" in Differences(outputs, gradient, {}, 0.0, 0.0).verdict(1e-3, {}).reason


def test_a_rule_may_differ_by_twice_the_tolerance():
    of = lambda **rules: Differences(0.0, 0.0, rules, 0.0, 0.0)
    found = of(a=1.9e-3, b=2.1e-3).verdict(1e-3, {"c": "no rule"})
    assert found.general == (("c", "no rule"), ("b", "its rules differ from single samples"))
    assert not of(a=1.9e-3).exceed(np, 1e-3)
    assert of(a=2.1e-3).exceed(np, 1e-3)


def test_the_first_few_parameters_are_named():
    several = [(f"p{i}", "no rule") for i in range(5)]
    (few,), (more,) = (Verdict(general=tuple(several[:count])).notes for count in (4, 5))
    assert few.endswith("p3 (no rule)")
    assert more == f"{few} and 1 more"


def test_inside_compiled_code_differences_are_a_flag():
    none = Differences(0.0, 0.0, {"a": 0.0}, 0.0, 0.0)
    exceeding = lambda **found: bool(replace(none, **found).exceed(np, 1e-3))
    assert not exceeding()
    assert not exceeding(rules={"a": 1.5e-3})
    assert exceeding(rules={"a": 3e-3})
    assert exceeding(outputs=2e-3)
    assert exceeding(gradient=2e-3)
    assert exceeding(bend=2e-3)


def test_a_whole_batch_shows_whether_its_backward_pass_is_linear():
    clipped = lambda gradient, v: {name: np.clip(part, -2, 2) for name, part in gradient.items()}
    assert self_check.bend_of_batch(Network()) < 1e-12
    assert self_check.bend_of_batch(Network(gradient=clipped)) > 0.1


PULLS = {
    "linear": (lambda v: v, 1e-300, False),
    "linear, and far away": (lambda v: v, 1e30, False),
    "clipped beyond the signs": (lambda v: np.clip(v, -500, 500), 1e5, True),
    "clipped beyond everything": (lambda v: np.clip(v, -500, 500), 100.0, False),
    "clipped as it is": (lambda v: np.clip(v, -0.4, 0.4), 1.0, True),
    "small ones dropped": (lambda v: np.where(np.abs(v) < 1e-6, 0, v), 1e-7, True),
    "small ones kept": (lambda v: np.where(np.abs(v) < 1e-6, 0, v), 1e-1, False),
}


@pytest.mark.parametrize("name", PULLS)
def test_a_loss_gradient_is_pulled_back_at_the_length_that_it_has_in_training(name):
    pull, largest, bent = PULLS[name]
    g = np.asarray([[0.5, -0.2, 0.1], [1.0, 0.3, -0.7]]) * largest
    found = self_check.bend_of_loss(np, lambda v: {"a": pull(v)}, *unit(np, g))
    assert found > 0.1 if bent else found < 1e-12


def test_a_batch_is_pulled_back_at_the_length_of_its_loss_gradient():
    clipped = lambda gradient, v: {name: np.clip(part, -1e4, 1e4) for name, part in gradient.items()}
    network = Network(gradient=clipped)
    assert self_check.bend_of_batch(network) < 1e-12
    assert self_check.bend_of_batch(network, np.ones_like(F)) < 1e-12
    assert self_check.bend_of_batch(network, 1e6 * np.ones_like(F)) > 0.1


@pytest.mark.parametrize(("magnitude", "power"), [(1e-300, -30), (1e-3, -10), (1.0, 0), (3e3, 11), (1e60, 100)])
def test_a_loss_gradient_is_made_longer_within_the_range_of_float32(magnitude, power):
    pulled = []
    pull = lambda v: pulled.append(np.abs(v).max()) or {"a": v}
    self_check.bend_of_loss(np, pull, np.ones((2, 3)), np.asarray(magnitude))
    assert set(pulled) == {1.0, self_check.SMALLER, 2.0**power}


@pytest.mark.parametrize(("samples", "longer"), [(2, 4.0), (12, 4.0), (64, 8.0), (512, 16.0)])
def test_signs_are_made_longer_as_the_batch_is_larger_than_what_is_compared(monkeypatch, samples, longer):
    """2 sqrt(N / compared), rounded up to a power of two."""
    monkeypatch.setattr(f"{__name__}.F", np.ones((samples, OUTPUTS)))
    monkeypatch.setattr(f"{__name__}.JACOBIAN", {"weight": np.ones((samples, OUTPUTS, 2))})
    network = Network()
    self_check.bend_of_batch(network)
    assert {np.abs(v).max() for v in network.pulled} == {1.0, self_check.SMALLER, longer}
    assert set(np.sign(network.pulled[0]).ravel()) == {-1.0, 1.0}


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_outputs_tell_whether_statistics_may_be_held_fixed(xp):
    original = xp.asarray(F)
    largest = float(np.abs(F).max())
    assert bool(differences.frozen_agrees(xp, xp.asarray(F + 0.9e-6 * largest), original, TOLERANCE))
    for side in (-1, 1):
        apart = xp.asarray(F + side * 1.1e-6 * largest)
        assert not bool(differences.frozen_agrees(xp, apart, original, TOLERANCE))
    assert not bool(differences.frozen_agrees(xp, xp.asarray(F[:, :2]), original, TOLERANCE))  # another shape
    assert not bool(differences.frozen_agrees(xp, xp.asarray(F * np.nan), original, TOLERANCE))


@pytest.mark.parametrize("kind", ["random", "constant", "rows", "columns", "few"])
def test_a_sketch_stands_for_the_size_of_an_array(kind):
    """Whatever the array: ||S a||^2 = ||a||^2 on average over signs, here of 8 parameters, with a spread of 2%."""
    generator = np.random.default_rng(0)
    columns, rows = generator.standard_normal(300), generator.standard_normal(700)
    a = {
        "random": generator.standard_normal((300, 700)),
        "constant": np.ones((300, 700)),
        "rows": np.outer(np.ones(300), rows),
        "columns": np.outer(columns, np.ones(700)),
        "few": np.eye(300, 700),
    }[kind]
    ratios = [np.sum(differences.sketched(np, a, number) ** 2) / np.sum(a**2) for number in range(8)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.std(ratios) < 0.12
    b = generator.standard_normal(a.shape)
    parts = differences.sketched(np, a, 3) + 2 * differences.sketched(np, b, 3)
    assert parts.shape == (differences.SKETCH,)
    assert parts == pytest.approx(differences.sketched(np, a + 2 * b, 3))
    for place in (0, 1, a.size // 2, a.size - 1):  # each entry counts once
        one = np.zeros(a.size)
        one[place] = 2.0
        assert np.sum(differences.sketched(np, one, 0) ** 2) == 4
    small = a[:4, :5]
    assert np.array_equal(differences.sketched(np, small, 0), small.reshape(-1))


def test_arrays_of_8192_numbers_are_left_as_they_are_and_larger_ones_are_4096_sums():
    assert [differences.sketched(np, np.ones(size), 0).size for size in (8192, 8193)] == [8192, 4096]


def test_signs_of_a_sketch_begin_anew_after_2_to_the_15_numbers():
    first, later = (np.zeros(2**16) for _ in range(2))
    first[5], later[2**15 + 5] = 1.0, 1.0
    turned = np.roll(differences.sketched(np, first, 0), differences.TURN)
    assert np.array_equal(differences.sketched(np, later, 0), turned)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_pieces_of_an_array_do_not_cancel_in_a_sketch(turns):
    """All have the same signs: turned further, equal ones with opposite signs add up to something all the same."""
    piece, none = np.random.default_rng(0).standard_normal(differences.PIECE), np.zeros(differences.PIECE)
    a = np.concatenate([piece, *[none] * (turns - 1), -piece])
    assert np.sum(differences.sketched(np, a, 0) ** 2) == pytest.approx(np.sum(a**2), rel=0.1)
