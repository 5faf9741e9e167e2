"""The core keeps to the array API: the strict namespace gives what NumPy gives."""

from functools import partial

import array_api_strict
import numpy as np
import pytest

from core.dense import kernel, network, record
from lnp.results.cross_response import cross_response_of
from lnp.results.decomposition import decompose, decomposed

JACOBIAN, GRADIENT = network()
NUMBERS = ("rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr")


def same(strict, plain):
    for name in filter(lambda name: hasattr(plain, name), NUMBERS):
        value = getattr(strict, name)
        assert isinstance(value, array_api_strict._array_object.Array)
        assert (value.shape, value.dtype) == ((), array_api_strict.float64)
        assert float(value) == pytest.approx(float(getattr(plain, name)), rel=1e-12, nan_ok=True), name


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("estimator", ["auto", "exact", "per_sample", "grouped", "joint"])
def test_decompose(estimator, independent, by_layer):
    terms = array_api_strict.asarray(6, dtype=array_api_strict.int32)
    strict = record(JACOBIAN, GRADIENT, array_api_strict, independent=independent, terms=terms)
    plain = record(JACOBIAN, GRADIENT, independent=independent)
    results = [decompose(lin, estimator=estimator, by_layer=by_layer, rtol=0.1) for lin in (strict, plain)]
    same(*results)
    assert results[0].estimator == results[1].estimator
    assert int(results[0].probes) == int(results[1].probes)
    for layer in results[1].layers or {}:
        same(results[0].layers[layer], results[1].layers[layer])


@pytest.mark.parametrize("max_probes", [1, 2, 5])
@pytest.mark.parametrize("estimator", ["per_sample", "grouped", "joint"])
def test_few_probes(estimator, max_probes):
    lins = [record(JACOBIAN, GRADIENT, xp) for xp in (array_api_strict, np)]
    same(*(decompose(lin, estimator=estimator, rtol=0.0, max_probes=max_probes) for lin in lins))


def test_cross_response():
    other = network(seed=3)
    pairs = [[record(*batch, xp) for batch in ((JACOBIAN, GRADIENT), other)] for xp in (array_api_strict, np)]
    same(*(cross_response_of(*pair, partial(decomposed, estimator="joint", vector=True)) for pair in pairs))


def test_population():
    lins = [record(JACOBIAN, GRADIENT, xp, separable=True) for xp in (array_api_strict, np)]
    strict, plain = (decompose(lin, population=True).population for lin in lins)
    for name in plain.__dataclass_fields__:
        assert float(getattr(strict, name)) == pytest.approx(float(getattr(plain, name)), rel=1e-12), name


def test_failed_checks_give_nan():
    flag = array_api_strict.asarray(True)
    for changes in ({"coupled": lambda: flag}, {"violations": ((~flag, "fine"), (flag, "wrong"))}):
        d = decompose(record(JACOBIAN, GRADIENT, array_api_strict, **changes))
        assert all(np.isnan(float(getattr(d, name))) for name in ("rate", "chi_loss", "chi_net", "chi_pos"))
    d = decompose(record(JACOBIAN, GRADIENT, array_api_strict, coupled=lambda: ~flag, violations=((~flag, "fine"),)))
    assert float(d.chi_net) == pytest.approx(np.trace(kernel(JACOBIAN)) / 6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_keep_the_dtype(dtype):
    d = decompose(record(JACOBIAN, GRADIENT, array_api_strict, dtype=dtype), estimator="joint")
    assert {str(getattr(d, name).dtype) for name in NUMBERS} == {f"array_api_strict.{dtype}"}
