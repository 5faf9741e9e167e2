"""The conformance kit notices what a backend gets wrong: each check fails for a backend that breaks it."""

import itertools
import random
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import lnp
from contract.test_numpy import kit
from lnp.contract.gradient_pass import gradient_pass
from lnp.testing import CHECKS, Kit, estimators, numbers, record, safety, scenarios

RECORDS = itertools.count()
"""Numbers the records of the test that looks at several of them."""
PLACES = 6
"""Numbers of each check that are falsified, one at a time."""
LOOSE = ("signs_are_independent", "record_holds_values")
"""Checks to which a number may be another one: one of 200 signs, and arrays of which only the dtype is looked at."""


@dataclass(frozen=True)
class Falsified:
    """NumPy arrays as the kit gets them, of which number `place` is another one."""

    place: int
    seen: list

    def __call__(self, array):
        array = np.asarray(array)
        self.seen.append(array)
        return other(array) if len(self.seen) == self.place + 1 else array


def other(array):
    if array.dtype == bool:
        return ~array
    if not np.issubdtype(array.dtype, np.floating):
        return array + 1
    return np.where(np.isfinite(array), 3 * array + 1, 1).astype(array.dtype)


@pytest.mark.parametrize("check", [c for c in CHECKS if c.__name__ not in LOOSE], ids=lambda check: check.__name__)
def test_each_number_that_is_looked_at_counts(check):
    seen: list = []
    check(replace(kit, to_numpy=Falsified(-2, seen)))
    unnoticed = []
    for place in np.unique(np.linspace(0, len(seen) - 1, PLACES).astype(int)) if seen else ():
        try:
            check(replace(kit, to_numpy=Falsified(place, [])))
        except (AssertionError, IndexError, ValueError):  # those of a partner that does not exist
            continue
        unnoticed.append(place)
    assert not unnoticed, f"of {len(seen)} numbers"


@dataclass(frozen=True)
class Broken(Kit):
    """A kit whose records are others: (record, scenario, options) -> what is replaced in it."""

    broken: Any = None

    def record(self, scenario, **options):
        lin = Kit.record(self, scenario, **options)
        return replace(lin, **self.broken(lin, scenario=scenario, **options))


def recording(broken):
    return Broken(**{field.name: getattr(kit, field.name) for field in fields(kit)}, broken=broken)


def measuring(falsify, **given):
    """A kit whose decompositions are others: decomposition -> what is replaced in it."""

    def decompose(model, batch, loss, **options):
        d = lnp.decompose(model, batch, loss, **options)
        return replace(d, **falsify(d, **options))

    return replace(kit, decompose=decompose, **given)


def calling(decompose):
    return replace(kit, decompose=decompose)


def scaled(function, factor):
    """A function whose array, or dictionary of arrays, is multiplied by a number."""

    def made(*args):
        found = function(*args)
        return {name: factor * part for name, part in found.items()} if isinstance(found, dict) else factor * found

    return made


def grouped(lin, microbatch=2, factor=1.0, **_):
    """The squared norms of groups, which NumPy's records leave to the core."""
    starts = range(0, len(lin.outputs), microbatch)

    def group_square_norms(v):
        inside = [(np.arange(len(v)) // microbatch == number)[:, None] for number in range(len(starts))]
        pulled = [lin.vjp(np.where(rows, v, 0)) for rows in inside]
        norms = [lin.inner_products(u, u) for u in pulled]
        return {name: factor * np.stack([norm[name] for norm in norms]) for name in norms[0]}

    return {"group_square_norms": group_square_norms, "groups": len(starts)}


def larger(value):
    return {name: 1.01 * part for name, part in value.items()} if isinstance(value, dict) else 1.01 * value


def passing(lin, field, change=larger, only=lambda *_: True, **_):
    """A gradient pass of which one field is another one, for all wishes or `only` for some."""

    def gradient_pass_of(per_sample, products, vector):
        wished = {"per_sample": per_sample, "products": products, "vector": vector}
        found = gradient_pass(replace(lin, gradient_pass=None), **wished)
        value = getattr(found, field)
        if value is None or not only(per_sample, products, vector):
            return found
        return replace(found, **{field: change(value)})

    return {"gradient_pass": gradient_pass_of}


def signed(change):
    """A kit whose signs are others: (signs, probe's index) -> signs."""
    return recording(lambda lin, **options: {"signs": lambda index: change(lin.signs(index), index)})


def alike(first, second, sign=1):
    """Signs of one output that are those of another, or their opposite; of samples and outputs (3, 2)."""

    def made(v, index):
        v[first] = sign * v[second]
        return v

    return made


def mostly(sign, *output):
    """Signs that are mostly of one kind, of one output or of all."""

    def made(v, index):
        v[output] = v[output] if index % 2 else sign
        return v

    return made


def without(notes, text):
    return {"notes": tuple(note for note in notes if text not in note)}


def lenient(model, batch, loss, **options):
    """Takes any name and any selection."""
    try:
        return lnp.decompose(model, batch, loss, **options)
    except ValueError:
        return lnp.decompose(model, batch, "mse" if loss == "mse" else "cross_entropy", estimator="exact")


def joint_in_silence(model, batch, loss, estimator="auto", **options):
    estimator = "joint" if estimator == "per_sample" else estimator
    return lnp.decompose(model, batch, loss, estimator=estimator, **options)


def joint_with_notes(*args, **options):
    d = joint_in_silence(*args, **options)
    return replace(d, notes=("one thing", "the joint estimator replaces it", "another thing"))


def draw(model):
    random.random()


def move(model):
    next(iter(model.parameters.values()))[...] += 1e-9


def leaving(change, concerns=lambda loss, options: True):
    """A decomposition that leaves a trace, change(model), for some losses and options."""

    def decompose(model, batch, loss, **options):
        d = lnp.decompose(model, batch, loss, **options)
        if concerns(loss, options):
            change(model)
        return d

    return decompose


def seeding(of_seed):
    """A decomposition whose seed is another one."""
    return lambda m, b, loss, seed=0, **options: lnp.decompose(m, b, loss, seed=of_seed(seed), **options)


def swallowing(model, batch, loss, **options):
    try:
        return lnp.decompose(model, batch, loss, **options)
    except safety.Failure:
        return None


def leaving_at_an_error(model, batch, loss, **options):
    try:
        return lnp.decompose(model, batch, loss, **options)
    except safety.Failure:
        random.random()
        raise


def population(d, **others):
    return {} if d.population is None else {"population": replace(d.population, **others)}


DAMAGES = {
    "outputs of another dtype": (
        record.record_holds_values,
        recording(lambda lin, **_: {"outputs": lin.outputs.astype("longdouble")}),
        "outputs has dtype",
    ),
    "a loss gradient of another dtype": (
        record.record_holds_values,
        recording(lambda lin, **_: {"loss_gradient": lin.loss_gradient.astype("longdouble")}),
        "loss_gradient has dtype",
    ),
    "another number of terms": (
        record.record_holds_values,
        recording(lambda lin, **_: {"loss_terms": lin.loss_terms + 1}),
        "loss_terms is",
    ),
    "losses of samples that do not add up": (
        record.record_holds_values,
        recording(
            lambda lin, scenario, **_: (
                {} if scenario.interacts else {"sample_terms": np.arange(len(lin.outputs)) + 1.0, "separable": True}
            )
        ),
        "parts of the loss|shares in the loss",
    ),
    "another loss is inferred": (
        record.loss_is_inferred,
        recording(lambda lin, loss, **_: {"loss": 2 * lin.loss} if loss is None else {}),
        "loss is",
    ),
    "a parameter that is missing": (
        record.vjp_is_the_jacobian,
        recording(lambda lin, **_: {"inner_products": lambda u, w: dict([*lin.inner_products(u, w).items()][1:])}),
        "parameters are",
    ),
    "a pull-back that is not linear": (
        record.vjp_is_the_jacobian,
        recording(lambda lin, **_: {"vjp": lambda v: scaled(lin.vjp, np.abs(v).max())(v)}),
        r"J J\^T v of",
    ),
    "a square norm of a whole batch": (
        record.vjp_is_the_jacobian,
        recording(
            lambda lin, **_: {
                "group_square_norms": lambda v: {
                    name: 1.01 * norm[None] for name, norm in lin.inner_products(lin.vjp(v), lin.vjp(v)).items()
                }
            }
        ),
        "square norm of",
    ),
    "a push-forward": (
        record.jvp_is_the_jacobian,
        recording(lambda lin, **_: {"jvp": scaled(lin.jvp, 1.01)}),
        "jvp",
    ),
    **{
        f"a gradient pass with other {field}": (
            record.gradient_pass_yields_what_is_asked_for,
            recording(partial(passing, field=field)),
            message,
        )
        for field, message in {
            "square_norms": r"gradient_pass\(\{\}\) of weight",
            "sample_square_norms": r"gradient_pass\(\{'per_sample': True\}\), samples of weight",
            "products": r"gradient_pass\(\{'products': 2\}\), products",
            "vector": r"gradient_pass\(\{'vector': True\}\), J\^T g of weight",
        }.items()
    },
    "a gradient pass that leaves out a parameter": (
        record.gradient_pass_yields_what_is_asked_for,
        recording(partial(passing, field="square_norms", change=lambda norms: dict([*norms.items()][1:]))),
        "names",
    ),
    "a gradient of samples that interact": (
        record.gradient_pass_yields_what_is_asked_for,
        recording(lambda lin, scenario, **_: passing(lin, "vector") if scenario.interacts else {}),
        r"centred.*gradient_pass\(\{'vector': True\}\), J\^T g of weight",
    ),
    "a gradient pass that cannot do all at once": (
        record.gradient_pass_yields_what_is_asked_for,
        recording(lambda lin, **_: passing(lin, "vector", only=lambda per_sample, products, _: per_sample * products)),
        r"gradient_pass\(\{'per_sample': True, 'products': 2, 'vector': True\}\), J",
    ),
    "single samples that are not taken apart": (
        record.sample_square_norms_are_those_of_single_samples,
        recording(lambda lin, **_: {"sample_square_norms": None}),
        "the record has no sample_square_norms",
    ),
    "samples that are said to interact": (
        record.sample_square_norms_are_those_of_single_samples,
        recording(lambda lin, **_: {"coupled": lambda: np.asarray(True)}),
        "found to interact",
    ),
    "square norms of single samples": (
        record.sample_square_norms_are_those_of_single_samples,
        recording(lambda lin, **_: {"sample_square_norms": scaled(lin.sample_square_norms, 1.01)}),
        "sample_square_norms of",
    ),
    "groups that are counted wrongly": (
        record.group_square_norms_are_those_of_groups,
        recording(lambda lin, **options: {**grouped(lin, **options), "groups": 3}),
        "groups is",
    ),
    "square norms of groups": (
        record.group_square_norms_are_those_of_groups,
        recording(lambda lin, **options: grouped(lin, factor=1.01, **options)),
        "group_square_norms of",
    ),
    "a whole that is not the sum of its groups": (
        record.group_square_norms_are_those_of_groups,
        recording(lambda lin, **_: {"vjp": scaled(lin.vjp, 1.01)}),
        r"J\^T v",
    ),
    "samples that interact and are taken apart all the same": (
        record.interacting_samples_are_noticed,
        recording(
            lambda lin, **_: {
                "coupled": lambda: np.asarray(False),
                "sample_square_norms": lambda v: {"weight": np.ones(len(v))},
            }
        ),
        "sample_square_norms",
    ),
    "signs of another shape": (record.signs_are_independent, signed(lambda v, i: v.T), "shape"),
    "signs of another dtype": (record.signs_are_independent, signed(lambda v, i: v.astype("f2")), "dtype"),
    "signs that are no signs": (record.signs_are_independent, signed(lambda v, i: 1.01 * v), "not all"),
    "signs with a zero": (record.signs_are_independent, signed(lambda v, i: v * (i != 150)), "not all"),
    "signs that are drawn anew": (
        record.signs_are_independent,
        signed(lambda v, i: np.where(np.random.default_rng().random(v.shape) < 0.5, v, -v)),
        r"signs\(7\) again",
    ),
    "signs that know no seed": (
        record.signs_are_independent,
        recording(lambda lin, seed=0, **_: {"signs": Kit.record(kit, scenarios.LINEAR, seed=3).signs}),
        "another seed",
    ),
    "signs of another record that are others": (
        record.signs_are_independent,
        recording(lambda lin, **_: {"signs": scaled(lin.signs, (-1.0) ** next(RECORDS))}),
        r"signs\(7\) of another record",
    ),
    **{
        f"signs that are {what}": (record.signs_are_independent, signed(change), "signs are correlated")
        for what, change in {
            "mostly positive": mostly(1, slice(None)),
            "mostly negative": mostly(-1, slice(None)),
            "mostly positive in one output": mostly(1, 1, 1),
            "mostly negative in one output": mostly(-1, 1, 1),
            "alike in two samples": alike((0, 0), (-1, -1)),
            "alike in two outputs of a sample": alike((0, 0), (0, 1)),
            "opposite in two outputs of a sample": alike((0, 0), (0, 1), -1),
            "opposite in two samples": alike((0, 0), (1, 0), -1),
        }.items()
    },
    "signs that follow one another": (
        record.signs_are_independent,
        recording(lambda lin, **_: {"signs": lambda index: lin.signs(index // 2)}),
        "correlated",
    ),
    "signs that turn with each probe": (
        record.signs_are_independent,
        recording(lambda lin, **_: {"signs": lambda index: lin.signs(index // 2) * (-1.0) ** index}),
        "correlated",
    ),
    "signs of one sample that turn with each probe": (
        record.signs_are_independent,
        recording(
            lambda lin, **_: {
                "signs": lambda index: np.concatenate(
                    [lin.signs(index // 2)[:1] * (-1.0) ** index, lin.signs(index)[1:]]
                ).astype(lin.outputs.dtype)
            }
        ),
        "correlated",
    ),
    "a loss along a step of zero": (
        record.loss_along_moves_the_parameters,
        recording(lambda lin, **_: {"loss_along": lambda u, step: lin.loss_along(u, step + 0.01)}),
        r"loss_along\(u, 0\)",
    ),
    "a loss along a step": (
        record.loss_along_moves_the_parameters,
        recording(lambda lin, **_: {"loss_along": lambda u, step: lin.loss_along(u, -step)}),
        r"loss_along\(u, 0.25\)",
    ),
    "an estimator that is not the one asked for": (
        estimators.estimators_average_their_probes,
        measuring(lambda d, **_: {"estimator": "joint"}),
        "estimator is 'joint', expected 'per_sample'",
    ),
    "probes that are counted wrongly": (
        estimators.estimators_average_their_probes,
        measuring(lambda d, **_: {"probes": d.probes + 1}),
        "per_sample: probes",
    ),
    "another estimator for few outputs": (
        estimators.auto_chooses,
        measuring(lambda d, **_: {"estimator": "per_sample"}),
        "expected 'exact'",
    ),
    "another estimator for many outputs": (
        estimators.auto_chooses,
        measuring(lambda d, **_: {"estimator": "exact"}),
        "expected 'per_sample'",
    ),
    "a seed that does not count": (estimators.seeds_decide, calling(seeding(lambda _: 0)), "another seed"),
    "a seed that is another one each time": (
        estimators.seeds_decide,
        calling(seeding(lambda seed: random.randrange(10**9))),
        "same seed",
    ),
    "no word on the joint estimator": (
        estimators.interacting_samples_are_measured_jointly,
        calling(joint_in_silence),
        "no note on the joint one",
    ),
    "exact numbers of samples that interact": (
        estimators.interacting_samples_are_measured_jointly,
        measuring(lambda d, estimator, **_: {"chi_net": 1.01 * d.chi_net} if estimator == "exact" else {}),
        "exact: chi_net",
    ),
    "exact numbers of compiled code": (
        estimators.interacting_samples_are_measured_jointly,
        measuring(
            lambda d, estimator, **_: {"chi_net": 1.01 * d.chi_net} if estimator == "exact" else {}, compiled=True
        ),
        "exact: chi_net",
    ),
    **{
        f"nan for samples that interact, {estimator}": (
            estimators.interacting_samples_are_measured_jointly,
            measuring(lambda d, estimator, only=estimator, **_: {"chi_net": np.nan} if estimator == only else {}),
            f"{estimator}: chi_net is",
        )
        for estimator in ("exact", "per_sample")
    },
    "a rate of samples that interact, of compiled code": (
        estimators.interacting_samples_are_measured_jointly,
        measuring(
            lambda d, estimator, **_: {"rate": 1.01 * d.rate} if estimator == "per_sample" else {}, compiled=True
        ),
        "rate is",
    ),
    "an error bar that leaves out the truth": (
        estimators.microbatches_change_nothing,
        measuring(lambda d, **_: {"chi_net_stderr": d.chi_net_stderr / 100}),
        "grouped: chi_net",
    ),
    "another number of samples": (
        numbers.exact_factors_are_those_of_the_dense_kernel,
        measuring(lambda d, **_: {"samples": d.samples + 1}),
        "samples and outputs",
    ),
    "another number of outputs": (
        numbers.exact_factors_are_those_of_the_dense_kernel,
        measuring(lambda d, **_: {"outputs": d.outputs + 1}),
        "samples and outputs",
    ),
    "an estimator that is not exact": (
        numbers.exact_factors_are_those_of_the_dense_kernel,
        measuring(lambda d, **_: {"estimator": "joint"}),
        "estimator is 'joint'",
    ),
    "an error bar of what is exact": (
        numbers.exact_factors_are_those_of_the_dense_kernel,
        measuring(lambda d, **_: {"chi_net_stderr": 1e-9}),
        "chi_net_stderr",
    ),
    "a position with an error": (
        numbers.exact_factors_are_those_of_the_dense_kernel,
        measuring(lambda d, **_: {"chi_pos_stderr": 1e-9}),
        "chi_pos_stderr",
    ),
    "a layer that is missing": (
        numbers.layers_add_up,
        measuring(lambda d, **_: {"layers": dict([*d.layers.items()][1:])} if d.layers else {}),
        "layers are",
    ),
    "layers that nobody asked for": (
        numbers.layers_add_up,
        calling(lambda *args, by_layer=True, **options: lnp.decompose(*args, by_layer=by_layer, **options)),
        "without being asked for",
    ),
    "a range that leaves out the noise scale": (
        numbers.population_is_the_mean_over_pairs,
        measuring(lambda d, **_: population(d, noise_scale_low=d.population and 2 * d.population.noise_scale)),
        "is not within",
    ),
    "a range that ends below the noise scale": (
        numbers.population_is_the_mean_over_pairs,
        measuring(lambda d, **_: population(d, noise_scale_high=d.population and d.population.noise_scale / 2)),
        "is not within",
    ),
    "a range that begins below zero": (
        numbers.population_is_the_mean_over_pairs,
        measuring(lambda d, **_: population(d, noise_scale_low=-1.0)),
        "is not within",
    ),
    "a population's rate without an error": (
        numbers.population_is_the_mean_over_pairs,
        measuring(lambda d, **_: population(d, rate_stderr=0.0)),
        "standard errors are",
    ),
    "no word on a population that is not known": (
        numbers.population_is_the_mean_over_pairs,
        measuring(lambda d, **_: without(d.notes, "population")),
        "no note on it",
    ),
    "seeds of 32 bits": (
        numbers.batches_of_a_stream_are_one,
        calling(seeding(lambda seed: seed % 2**32)),
        "upper 32",
    ),
    "any selection of parameters": (numbers.parameters_are_selected, calling(lenient), "did not raise ValueError"),
    "a word on terms that were given": (
        numbers.losses_may_be_callables,
        measuring(lambda d, loss_terms=None, **_: {"notes": ("another", "loss_terms is 2")} if loss_terms else {}),
        "a note on loss_terms that was given",
    ),
    **{
        f"a word on a loss of an uncommon size: {text}": (
            numbers.squares_stay_in_range,
            measuring(lambda d, text=text, **_: {"notes": (*d.notes, text)}),
            "notes of a loss times",
        )
        for text in ("the rate is zero", "not finite", "few digits")
    },
    "a network scale of zero at a gradient of zero": (
        safety.zero_gradient_is_no_error,
        measuring(lambda d, **_: {"chi_net": 0.0}),
        "chi_net",
    ),
    "a loss scale of zero without a Jacobian": (
        safety.zero_jacobian_is_no_error,
        measuring(lambda d, **_: {"chi_loss": 0.0}),
        "chi_loss",
    ),
    "no word on what is not finite": (
        safety.non_finite_values_are_passed_on,
        measuring(lambda d, **_: without(d.notes, "finite")),
        "no note on it",
    ),
    "a rate of ignored labels": (
        safety.nothing_is_left_when_all_labels_are_ignored,
        measuring(lambda d, **_: {"rate": 1.0}),
        "rate is 1.0",
    ),
    "wrong labels that pass": (safety.wrong_labels_are_an_error, calling(lambda *_, **__: None), "label out of range"),
    "misuse that passes": (safety.misuse_is_an_error, calling(lambda *_, **__: None), "did not raise"),
    "names of losses and estimators that pass": (safety.misuse_is_an_error, calling(lenient), "did not raise"),
    "a parameter that is moved": (safety.no_trace_is_left, calling(leaving(move)), r"changed \['"),
    **{
        f"random numbers that are drawn {where}": (
            safety.no_trace_is_left,
            calling(leaving(draw, concerns)),
            rf"{message} changed \['python'\]",
        )
        for where, concerns, message in (
            ("of a batch in parts", lambda loss, options: "microbatch" in options, "layers.*microbatch"),
            ("for samples that interact", lambda loss, options: loss == "mse", "centred.*auto"),
            ("of layers", lambda loss, options: options.get("by_layer"), "layers.*auto"),
            ("at the fourth", lambda loss, options: options.get("estimator") == "grouped", "layers.*grouped"),
        )
    },
    "random numbers that are drawn": (
        safety.no_trace_is_left,
        calling(leaving(draw)),
        r"layers.*auto changed \['python'\]",
    ),
    "an error that is swallowed": (
        safety.no_trace_is_left_by_an_error,
        calling(swallowing),
        "at call 0, auto: the error did not pass through",
    ),
    "random numbers that are drawn at an error": (
        safety.no_trace_is_left_by_an_error,
        calling(leaving_at_an_error),
        r"failing at call 0, auto changed \['python'\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backend_fails(damage):
    check, damaged, message = DAMAGES[damage]
    with pytest.raises(AssertionError, match=message):
        check(damaged)


def test_what_a_backend_may_do():
    """Groups of its own, samples that it knows to meet, other notes, and nan from compiled code."""
    record.group_square_norms_are_those_of_groups(recording(grouped))
    wrong = {"sample_square_norms": lambda v: {"weight": np.ones(len(v))}}
    record.interacting_samples_are_noticed(recording(lambda lin, **_: {**wrong, "coupled": lambda: np.asarray(True)}))
    record.interacting_samples_are_noticed(recording(lambda lin, **_: {"sample_square_norms": None}))
    check = estimators.interacting_samples_are_measured_jointly
    check(calling(joint_with_notes))
    check(measuring(lambda d, estimator, **_: {"chi_net": np.nan} if estimator == "exact" else {}, compiled=True))
    check(measuring(lambda d, estimator, **_: {"chi_net": np.nan} if estimator == "per_sample" else {}, compiled=True))
