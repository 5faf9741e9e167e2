"""How the conformance kit compares, and how it follows a network that changes its mind."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import lnp_numpy
from contract.test_numpy import kit
from lnp.testing import CHECKS, COMPILED_CHECKS, check_change, scenarios
from lnp.testing.batches import BATCH_CHECKS
from lnp.testing.changing import ATTEMPTS, Changing
from lnp.testing.record import RECORD_CHECKS

DOUBLE, SINGLE = kit.cases(scenarios.LINEAR)


def agrees(case, actual, expected, *tolerance):
    try:
        case.equal("a value", actual, expected, *tolerance)
    except AssertionError as error:
        assert str(error).startswith(f"numpy, linear, {case.dtype}: a value ")  # noqa: PT017
        return False
    return True


def test_tolerances_are_those_of_the_dtype():
    eps = np.finfo("float64").eps
    assert (DOUBLE.rounding, DOUBLE.tolerance) == (500 * eps, 4 * eps**0.5)
    assert SINGLE.rounding == 500 * 2.0**-23
    assert SINGLE.tolerance == 4 * 2.0**-11.5


@pytest.mark.parametrize("expected", [[3.0, -4.0], [-4.0, 1e-9], [-4.0, -3.0], [0.25, -0.01], -4.0])
def test_values_agree_relative_to_the_largest(expected):
    largest = np.abs(expected).max()
    for sign in (1, -1):
        assert agrees(DOUBLE, np.add(expected, sign * 0.9 * DOUBLE.rounding * largest), expected)
        assert not agrees(DOUBLE, np.add(expected, sign * 1.2 * DOUBLE.rounding * largest), expected)
        assert agrees(DOUBLE, np.add(expected, sign * 0.09 * largest), expected, 0.1)
        assert not agrees(DOUBLE, np.add(expected, sign * 0.11 * largest), expected, 0.1)


def test_zero_is_compared_absolutely():
    assert agrees(DOUBLE, 0.9 * DOUBLE.rounding, 0.0)
    assert not agrees(DOUBLE, 1.1 * DOUBLE.rounding, 0.0)


def test_values_that_are_not_finite_agree_with_their_like():
    nan, inf = np.nan, np.inf
    assert agrees(DOUBLE, [nan, 1.0, inf, -inf], [nan, 1.0, inf, -inf])
    for actual, expected in ((nan, 1.0), (1.0, nan), (inf, -inf), (inf, 1.0), (1.0, inf), (nan, inf)):
        assert not agrees(DOUBLE, actual, expected)
    assert not agrees(DOUBLE, [inf, 1.1], [inf, 1.0])  # infinity is not what others are compared with


def test_shapes_have_to_be_equal():
    assert not agrees(DOUBLE, [1.0], 1.0)
    assert not agrees(DOUBLE, [[1.0, 2.0]], [1.0, 2.0])


def test_an_error_of_the_type_asked_for():
    def fails():
        raise KeyError("a")

    DOUBLE.raises("a call", KeyError, fails)
    DOUBLE.raises("a call", LookupError, fails)
    with pytest.raises(KeyError):
        DOUBLE.raises("a call", ValueError, fails)
    with pytest.raises(AssertionError, match="a call did not raise ValueError"):
        DOUBLE.raises("a call", ValueError, lambda: None)


def test_cases_in_each_dtype_or_in_the_first_few():
    def kept(**options):
        return [(c.scenario.name, c.dtype, c.truth.scenario is not None) for c in kit.cases(*given, **options)]

    given = scenarios.LINEAR, scenarios.TOKENS
    names = [("linear", "float64", True), ("linear", "float32", True)]
    assert kept() == [*names, ("tokens", "float64", True), ("tokens", "float32", True)]
    assert kept(dtypes=1) == [names[0], ("tokens", "float64", True)]


NEAR = replace(scenarios.LINEAR, name="early")
FAR = replace(NEAR, name="late", inputs=2 * NEAR.inputs)


@dataclass
class Numbers:
    """A kit's measurements, of which those that `wrong` names are wrong, and those that `refused` names are refused."""

    wrong: tuple = ()
    refused: tuple = ()
    not_finite: tuple = ()
    names: tuple = ("rate", "chi_loss", "chi_net", "chi_pos")
    made: list = field(default_factory=list)

    def __call__(self, model, batch, loss, **options):
        number = len(self.made)
        self.made.append(options)
        if number in self.refused:
            raise ValueError("the samples meet")
        d = kit.decompose(model, batch, loss, **options)
        if number in self.wrong:
            return replace(d, chi_net=2 * d.chi_net)
        return replace(d, **dict.fromkeys(self.names, np.nan)) if number in self.not_finite else d


def followed(numbers, early=NEAR, late=FAR, compiled=False, **change):
    """How often was measured until both moments were right."""

    def moved(model, parameters):
        return lnp_numpy.JacobianModel(model.function, model.jacobian, parameters)

    check_change(replace(kit, moved=moved, decompose=numbers, compiled=compiled), Changing(early, late, **change))
    assert all(options == {"estimator": "exact"} for options in numbers.made)
    return len(numbers.made)


def test_both_moments_are_measured():
    assert followed(Numbers()) == 2


def test_a_wrong_number_is_an_error_at_either_moment():
    with pytest.raises(AssertionError, match="numpy, early, float64: chi_net, with the notes"):
        followed(Numbers(wrong=(0,)))
    with pytest.raises(AssertionError, match="numpy, late, float64: chi_net"):
        followed(Numbers(wrong=(1,)))


def test_a_refusal_is_right_at_either_moment():
    assert followed(Numbers(refused=(0, 1))) == 2


def test_what_concerns_some_samples_may_be_noticed_later():
    last = ATTEMPTS  # the first measurement is of the early moment
    assert followed(Numbers(wrong=tuple(range(1, last))), concerned=0.5) == last + 1
    numbers = Numbers(wrong=tuple(range(1, last + 1)))
    with pytest.raises(AssertionError, match="numpy, late"):
        followed(numbers, concerned=0.5)
    assert len(numbers.made) == last + 1


@pytest.mark.parametrize("moment", [0, 1])
def test_compiled_code_may_give_nan_for_all_numbers(moment):
    assert followed(Numbers(not_finite=(moment,)), compiled=True) == 2
    with pytest.raises(AssertionError, match="rate"):
        followed(Numbers(not_finite=(moment,)), compiled=False)
    with pytest.raises(AssertionError, match="chi_net"):
        followed(Numbers(not_finite=(moment,), names=("chi_net",)), compiled=True)
    with pytest.raises(AssertionError, match="chi_net"):
        followed(Numbers(wrong=(moment,)), compiled=True)


def test_what_happens_in_between_happens_in_between():
    numbers = Numbers()
    seen = []
    followed(numbers, between=lambda: seen.append(len(numbers.made)))
    assert seen == [1]


def test_the_dtype_and_the_tolerance_are_the_networks():
    seen = []

    def decompose(model, batch, loss, **options):
        seen.append(batch[0].dtype)
        d = kit.decompose(model, batch, loss, **options)
        return replace(d, chi_net=1.01 * d.chi_net)

    followed_by = replace(kit, moved=lambda model, parameters: model, decompose=decompose)
    check_change(followed_by, Changing(NEAR, NEAR, dtype="float32", tolerance=0.02))
    assert seen == [np.float32, np.float32]
    with pytest.raises(AssertionError, match="float32"):
        check_change(followed_by, Changing(NEAR, NEAR, dtype="float32", tolerance=0.005))


def test_a_change_needs_a_kit_that_moves_models():
    with pytest.raises(TypeError, match=r"kit numpy cannot move.*Kit\(moved="):
        check_change(kit, Changing(NEAR, FAR))


def test_compiled_checks_are_those_that_decompose():
    left_out = {check.__name__ for check in {*CHECKS} - {*COMPILED_CHECKS}}
    assert left_out == {
        *(check.__name__ for check in (*RECORD_CHECKS, *BATCH_CHECKS)),
        "enumerated_signs_give_trace_and_variance",
        "cross_response_is_the_dense_one",
        "loss_changes_are_those_of_the_step",
        "spectrum_is_the_dense_measure",
    }
    assert len(COMPILED_CHECKS) == len(CHECKS) - len(left_out)


def test_compiled_checks_measure_by_what_the_kit_compiles():
    class Measured(Exception):
        pass

    def decompose(*args, **options):
        raise Measured

    for check in COMPILED_CHECKS:
        with pytest.raises(Measured):
            check(replace(kit, decompose=decompose))
