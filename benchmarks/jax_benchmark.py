"""What a measurement costs in JAX, beside a training step's gradient and beside other ways to the same number.

    python benchmarks/jax_benchmark.py [--quick] [--models mlp,cnn,lm] [--no-growth]

All cases of a model run in turn in one process; times are medians of ratios to the gradient in the same round. Memory
is what XLA says that the compiled programs need: arguments, results, and what lies between. Peers (neural-tangents,
matfree) that are not installed or do not run are named in the notes.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

import lnp
import lnp_jax


@dataclass(frozen=True)
class Problem:
    """A network, its parameters, a batch, and the loss terms that lnp would count."""

    apply: Callable
    parameters: dict[str, Any]
    batch: tuple[jax.Array, jax.Array]

    @property
    def outputs(self) -> int:
        """K."""
        out = jax.eval_shape(self.apply, self.parameters, self.batch[0])
        return out.size // out.shape[0]


def drawn(seed: int = 0) -> Callable[..., jax.Array]:
    """A maker of normal arrays of a given scale."""
    generator = np.random.default_rng(seed)
    return lambda scale, *shape: jnp.asarray(scale * generator.standard_normal(shape), jnp.float32)


def mlp(samples: int = 128, width: int = 512, outputs: int = 10) -> Problem:
    """784 - width - width - outputs, ReLU."""
    normal, sizes = drawn(), (784, width, width, outputs)
    parameters = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        parameters |= {f"w{i}": normal(rows**-0.5, rows, columns), f"b{i}": normal(0.1, columns)}
    return Problem(_mlp, parameters, (normal(1, samples, 784), jnp.arange(samples) % outputs))


def _mlp(p: dict, x: jax.Array) -> jax.Array:
    for i in range(2):
        x = jax.nn.relu(x @ p[f"w{i}"] + p[f"b{i}"])
    return x @ p["w2"] + p["b2"]


def cnn(samples: int = 64, width: int = 32, outputs: int = 10) -> Problem:
    """Three 3x3 convolutions with width, 2 width and 4 width channels on 32x32 images, each pooled by two."""
    normal, channels = drawn(), (3, width, 2 * width, 4 * width)
    features = 16 * channels[-1]
    parameters = {"head": normal(features**-0.5, features, outputs), "bias": normal(0.1, outputs)}
    for i, (rows, columns) in enumerate(itertools.pairwise(channels)):
        parameters |= {f"k{i}": normal((9 * rows) ** -0.5, 3, 3, rows, columns), f"b{i}": normal(0.1, columns)}
    return Problem(_cnn, parameters, (normal(1, samples, 32, 32, 3), jnp.arange(samples) % outputs))


def _cnn(p: dict, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = jax.lax.conv_general_dilated(x, p[f"k{i}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + p[f"b{i}"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ p["head"] + p["bias"]


def lm(samples: int = 16, width: int = 256, layers: int = 4, vocabulary: int = 2000, length: int = 64) -> Problem:
    """A causal transformer with pre-normalisation, four heads, and a head of its own."""
    normal, d = drawn(), width
    parameters = {"embedding": normal(1, vocabulary, d), "position": normal(0.3, length, d)}
    parameters |= {"head": normal(d**-0.5, d, vocabulary), "scale": jnp.ones(d)}
    for i in range(layers):
        parameters |= {
            f"qkv{i}": normal(d**-0.5, d, 3 * d), f"out{i}": normal(0.5 * d**-0.5, d, d),
            f"up{i}": normal(d**-0.5, d, 4 * d), f"down{i}": normal(0.5 * (4 * d) ** -0.5, 4 * d, d),
            f"s{i}": jnp.ones(d), f"t{i}": jnp.ones(d),
        }  # fmt: skip
    tokens = np.random.default_rng(1).integers(0, vocabulary, (samples, length + 1))
    return Problem(partial(_lm, layers), parameters, (jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])))


def _lm(layers: int, p: dict, tokens: jax.Array) -> jax.Array:
    x = p["embedding"][tokens] + p["position"]
    for i in range(layers):
        x = x + _attention(_normalised(x) * p[f"s{i}"], p[f"qkv{i}"]) @ p[f"out{i}"]
        x = x + jax.nn.gelu(_normalised(x) * p[f"t{i}"] @ p[f"up{i}"]) @ p[f"down{i}"]
    return _normalised(x) * p["scale"] @ p["head"]


def _normalised(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _attention(x: jax.Array, weight: jax.Array, heads: int = 4) -> jax.Array:
    n, s, d = x.shape
    q, k, v = jnp.moveaxis((x @ weight).reshape(n, s, 3, heads, d // heads), 2, 0)
    scores = jnp.einsum("nshe,nthe->nhst", q, k) * (d // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf))
    return jnp.einsum("nhst,nthe->nshe", weights, v).reshape(n, s, d)


MODELS = {"mlp": mlp, "cnn": cnn, "lm": lm}
TITLES = {
    "mlp": "MLP 784-512-512-10, N=128",
    "cnn": "CNN 32-64-128 on 32x32, N=64",
    "lm": "transformer LM D=256 L=4 V=2000 S=64, N=16",
}


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over labels."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[..., None], axis=-1))


@dataclass(frozen=True)
class Case:
    """A compiled program: what it costs, and what it finds.

    Attributes
    ----------
    program:
        Called with (parameters, batch, key).
    memory:
        Bytes of arguments, results and what lies between.
    """

    program: Callable
    memory: int

    def run(self, problem: Problem, key: Any) -> Any:
        """The results, once they are there."""
        return jax.block_until_ready(self.program(problem.parameters, problem.batch, key))


def compiled(function: Callable, problem: Problem) -> Case:
    """The function of (parameters, batch, key), compiled for the problem."""
    program = jax.jit(function).lower(problem.parameters, problem.batch, jax.random.key(0)).compile()
    need = program.memory_analysis()
    memory = (
        need.argument_size_in_bytes + need.output_size_in_bytes + need.temp_size_in_bytes - need.alias_size_in_bytes
    )
    return Case(program, memory)


def step(problem: Problem) -> Callable:
    """A training step's loss and gradient."""

    def function(p: Any, batch: Any, key: Any) -> Any:
        return jax.value_and_grad(lambda p: cross_entropy(problem.apply(p, batch[0]), batch[1]))(p)

    return function


def decomposed(problem: Problem, **options: Any) -> Callable:
    """`lnp.decompose` as it runs from the second call on: what was compared at the first is known."""
    lnp_jax.evaluate(_loss_of, (problem.apply, problem.parameters), (problem.batch,), lnp.Options())
    return lambda p, batch, key: lnp.decompose((problem.apply, p), batch, seed=key, **options)


def _loss_of(lin: lnp.Linearization) -> Any:
    return lin.loss


def shared(problem: Problem, **options: Any) -> Callable:
    """Loss, gradient and decomposition of one step in the user's own `jax.jit`, after one call outside of it, which
    looks at the samples.
    """
    decomposed(problem)
    return lnp_jax.value_and_grad(problem.apply, **options)


def never_looked_at(problem: Problem, **options: Any) -> Callable:
    """The same without that call: two samples are compared inside each time."""
    return lnp_jax.value_and_grad(lambda p, x: problem.apply(p, x), **options)


def by_vmap(problem: Problem) -> Callable:
    """One probe for each sample, by the gradients of all samples: `jax.vmap` of vector-Jacobian products."""

    def function(p: Any, batch: Any, key: Any) -> Any:
        def norm(x: jax.Array, key: Any) -> jax.Array:
            out, pullback = jax.vjp(lambda p: problem.apply(p, x[None])[0], p)
            (gradient,) = pullback(jax.random.rademacher(key, out.shape, out.dtype))
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))

        return jnp.sum(jax.vmap(norm)(batch[0], jax.random.split(key, len(batch[0]))))

    return function


def by_shared_signs(problem: Problem) -> Callable:
    """One probe of the whole batch's kernel: the joint estimator, with one vector-Jacobian product."""

    def function(p: Any, batch: Any, key: Any) -> Any:
        out, pullback = jax.vjp(lambda p: problem.apply(p, batch[0]), p)
        (gradient,) = pullback(jax.random.rademacher(key, out.shape, out.dtype))
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))

    return function


def by_matfree(problem: Problem) -> Callable:
    """One sample of matfree's Hutchinson estimator of tr J J^T."""
    from matfree import stochtrace

    def function(p: Any, batch: Any, key: Any) -> Any:
        out, pullback = jax.vjp(lambda p: problem.apply(p, batch[0]).reshape(-1), p)

        def push(u):
            return jax.jvp(lambda p: problem.apply(p, batch[0]).reshape(-1), (p,), (u,))[1]

        sampler = stochtrace.sampler_signs(jnp.zeros_like(out), num=1)
        estimate = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), sampler)
        return estimate(lambda v: push(pullback(v)[0]), key)

    return function


def by_neural_tangents(problem: Problem) -> Callable:
    """The exact trace: neural-tangents' kernel of each sample with itself."""
    import neural_tangents as nt

    kernel = nt.empirical_ntk_fn(
        lambda p, x: problem.apply(p, x), vmap_axes=0, trace_axes=(), implementation=nt.NtkImplementation.AUTO
    )

    def function(p: Any, batch: Any, key: Any) -> Any:
        def trace(x: jax.Array) -> jax.Array:
            return jnp.trace(kernel(x[None], None, p)[0, 0])

        return jnp.sum(jax.lax.map(trace, batch[0]))

    return function


ESTIMATES = {"vmap(vjp), 1 probe": by_vmap, "vjp, 1 probe (joint)": by_shared_signs, "matfree, 1 sample": by_matfree}
"""Peers whose result is an estimate of tr Theta."""


STEP = "training-step gradient"


def cases(problem: Problem, full: bool = True) -> tuple[dict[str, Case], list[str]]:
    """What is measured on a problem, and notes on what could not be; not `full` for the growth with sizes."""
    made = {
        STEP: step(problem),
        "lnp, rtol=1%": decomposed(problem),
        "lnp in a step, rtol=1%": shared(problem),
    }
    if full:
        made["lnp, rtol=1%, no population"] = decomposed(problem, population=False)
        made["lnp in a step, no population"] = shared(problem, population=False)
    if full and problem.outputs <= 10:
        made["lnp in a step, compared inside"] = never_looked_at(problem, population=False)
        made["lnp, exact"] = decomposed(problem, estimator="exact", population=False)
    notes, found = [], {name: compiled(function, problem) for name, function in made.items()}
    others = {**ESTIMATES, "neural-tangents, exact": by_neural_tangents} if full else {}
    for name, make in others.items():
        if name.startswith("neural") and problem.outputs > 10:
            notes.append(f"{name}: left out with {problem.outputs} outputs, for which it forms K x K kernels")
            continue
        try:
            found[name] = compiled(make(problem), problem)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            notes.append(f"{name}: does not run here, {type(error).__name__}: {_said(error)}")
    return found, notes


def _said(error: Exception) -> str:
    """Its first line, without where on this machine it happened."""
    return re.sub(r" \(/[^)]*\)", "", (str(error).splitlines() or [""])[0])[:150]


def relative_errors(found: dict[str, Case], problem: Problem, repeats: int) -> dict[str, float]:
    """{case: relative standard error of tr Theta}: what lnp says, and the spread of a peer's results over keys."""
    errors = {}
    for name, case in found.items():
        if name in ESTIMATES:
            values = np.asarray([case.run(problem, jax.random.key(i)) for i in range(repeats)], float)
            errors[name] = float(values.std(ddof=1) / values.mean())
        elif name.startswith("lnp"):
            result = case.run(problem, jax.random.key(0))
            d = result if isinstance(result, lnp.Decomposition) else result[0][1]
            errors[name] = float(d.chi_net_stderr / d.chi_net)
        elif name.startswith("neural"):
            errors[name] = 0.0
    return errors


def costs(problem: Problem, rounds: int, repeats: int) -> tuple[list[dict], list[str], dict]:
    """(rows of a table, notes, seconds of all rounds)."""
    found, notes = cases(problem)
    key = jax.random.key(0)
    seconds = report.interleaved({name: partial(case.run, problem, key) for name, case in found.items()}, rounds)
    times, errors = report.ratios(seconds, STEP), relative_errors(found, problem, repeats)
    rows = []
    for name, case in found.items():
        row = {"case": name, "time": times[name], "memory": case.memory / found[STEP].memory}
        if name in errors:
            # time until the relative standard error is 1%: the variance falls with the time that is spent
            row |= {"rel. standard error": errors[name], "time to 1%": _to_one_percent(name, times[name], errors[name])}
        rows.append(row | {"seconds": report.median(seconds[name])})
    return rows, notes, seconds


def _to_one_percent(name: str, time: float, error: float) -> float:
    """lnp has stopped by itself; a peer's single probe is repeated, at least once."""
    return time if name.startswith(("lnp", "neural")) else time * max(1.0, (error / 0.01) ** 2)


GROWTH = {
    "batch (MLP)": [("N=32", partial(mlp, 32)), ("N=128", mlp), ("N=512", partial(mlp, 512))],
    "width (MLP)": [(f"width {w}", partial(mlp, width=w)) for w in (256, 512, 1024)],
    "sequence length (LM, L=2, N=8)": [(f"S={s}", partial(lm, 8, layers=2, length=s)) for s in (32, 128, 256)],
    "outputs (LM, L=2, N=8, S=64)": [(f"V={v}", partial(lm, 8, layers=2, vocabulary=v)) for v in (2000, 8000, 32000)],
}
BUDGET = 8.0
"""Seconds for the rounds of one size, as far as five rounds keep to it."""


def growth(quick: bool) -> dict[str, list[dict]]:
    """Tables of how lnp's time relative to a step grows."""
    tables = {}
    for heading, problems in GROWTH.items():
        rows = []
        for name, make in problems[:2] if quick else problems:
            found, _ = cases(problem := make(), full=False)
            runs = {n: partial(case.run, problem, jax.random.key(0)) for n, case in found.items()}
            once = sum(times[0] for times in report.interleaved(runs, 1).values())
            rounds = 3 if quick else min(15, max(5, int(BUDGET / once)))
            seconds = report.interleaved(runs, rounds, warmup=0)
            times = report.ratios(seconds, STEP)
            row = {"size": name, "step, seconds": report.median(seconds[STEP])}
            row |= {case: times[case] for case in found if case != STEP}
            row["memory, lnp rtol=1%"] = found["lnp, rtol=1%"].memory / found[STEP].memory
            rows.append(row)
            jax.clear_caches()
        tables[f"Growth with {heading}: time relative to a step's gradient"] = rows
        print(heading, report.table(rows), sep="\n", flush=True)
    return tables


def main() -> None:
    """Run what was asked for and write benchmarks/results/jax.json and jax.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that everything runs")
    parser.add_argument("--models", default=",".join(MODELS), help="some of mlp,cnn,lm")
    parser.add_argument("--no-growth", action="store_true", help="leave the tables of growth out")
    parser.add_argument("--name", default="jax", help="of the files that are written")
    parser.add_argument("--note", default="", help="what a reader of the results should know about the machine")
    given = parser.parse_args()
    rounds, repeats = (3, 4) if given.quick else (15, 16)
    tables, notes, seconds = {}, [given.note] if given.note else [], {}
    for model in given.models.split(","):
        rows, more, all_seconds = costs(MODELS[model](), rounds, repeats)
        tables[f"{TITLES[model]}: relative to a step's gradient"] = rows
        notes += [f"{model}: {note}" for note in more]
        seconds[model] = all_seconds
        print(report.table(rows), *more, sep="\n", flush=True)
    if not given.no_growth:
        tables |= growth(given.quick)
    title = "lnp in JAX" + (" (quick run: few rounds, no numbers to quote)" if given.quick else "")
    data = {"title": title, "machine": report.machine(), "tables": tables, "notes": notes, "seconds": seconds}
    print(*report.write(given.name, data))


if __name__ == "__main__":
    main()
