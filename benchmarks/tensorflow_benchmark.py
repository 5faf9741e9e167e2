"""What a measurement costs in TensorFlow, beside a training-step gradient and beside other ways to the same number.

    python benchmarks/tensorflow_benchmark.py           # tables in benchmarks/results/tensorflow.md, about 16 minutes
    python benchmarks/tensorflow_benchmark.py --quick   # few rounds of the small models, printed only

All cases of a model run in one process, in turn; memory is that of each case in a process of its own. Models are made
of Keras layers; their weights are drawn as PyTorch does by default, so that the frameworks' tables are of the same
networks.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent))

import keras
import numpy as np
import report
import tensorflow as tf
from keras import layers

import lnp
import lnp_keras

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NOTES = (
    "time: multiples of a training step's gradient in a `tf.function`, medians of rounds",
    "memory: of weights, gradient, and what a process grows by at the whole batch's first run",
    "tape.jacobian only where its N x K x P numbers fit into half of the memory; vectorized_map not on the language "
    "model: TensorFlow 2.21's oneDNN kernel corrupts memory in the products it makes there (tensorflow#117700)",
)


def mlp(samples: int = 128, width: int = 512, outputs: int = 10) -> tuple[keras.Model, tuple]:
    """784 - width - width - outputs, ReLU."""
    hidden = [layers.Dense(width, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(outputs)])
    return drawn(model), (normal(samples, 784), tf.range(samples) % outputs)


def cnn(samples: int = 64, width: int = 32, outputs: int = 10) -> tuple[keras.Model, tuple]:
    """Three 3x3 convolutions with width, 2 width and 4 width channels on 32x32 images, each pooled by two."""
    body = []
    for channels in (width, 2 * width, 4 * width):
        body += [layers.Conv2D(channels, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
    model = keras.Sequential([keras.Input((32, 32, 3)), *body, layers.Flatten(), layers.Dense(outputs)])
    return drawn(model), (normal(samples, 32, 32, 3), tf.range(samples) % outputs)


def lm(samples: int = 16, length: int = 64, words: int = 2000, width: int = 256, depth: int = 4) -> tuple:
    """A causal transformer with pre-normalisation, four heads, and a head of its own."""
    ids = keras.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(ids) + layers.Embedding(length, width)(keras.ops.arange(length))
    dense = functools.partial(layers.Dense, use_bias=False)
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4, use_bias=False)(h, h, use_causal_mask=True)
        h = layers.LayerNormalization()(x)
        x = x + dense(width)(dense(4 * width, "gelu")(h))
    model = keras.Model(ids, dense(words)(layers.LayerNormalization()(x)))
    tokens = np.random.default_rng(2).integers(0, words, (samples, length + 1)).astype("int32")
    return drawn(model), (tf.constant(tokens[:, :-1]), tf.constant(tokens[:, 1:]))


MODELS = {
    "MLP 784-512-512-10, N=128": mlp,
    "CNN 32-64-128 on 32x32, N=64": cnn,
    "LM D=256 L=4 V=2000 S=64, N=16": lm,
}
GROWTH = {
    "batch (MLP)": (mlp, "samples", (32, 128, 512, 2048), {}),
    "width (MLP)": (mlp, "width", (128, 512, 2048), {}),
    "outputs (MLP)": (mlp, "outputs", (10, 100, 1000), {}),
    "image batch (CNN)": (cnn, "samples", (16, 64, 256), {}),
    "sequence length (LM)": (lm, "length", (16, 64, 256), {"samples": 8, "depth": 2, "width": 128, "words": 500}),
    "vocabulary (LM)": (lm, "words", (2000, 8000, 32000), {"samples": 4, "depth": 2}),
}


def drawn(model: keras.Model) -> keras.Model:
    """Compiled, with weights and biases drawn as PyTorch does: uniform in +-1/sqrt(fan in), embeddings normal."""
    rng, bound = np.random.default_rng(0), 1.0
    for variable in model.trainable_variables:
        if "embeddings" in variable.path:
            positions = variable.shape[0] == model.input_shape[1]
            variable.assign((0.3 if positions else 1.0) * rng.standard_normal(variable.shape))
        elif "kernel" in variable.path:
            made = 2 if len(variable.shape) == 3 and "output" not in variable.path else 1  # axes of an attention's
            bound = np.prod(variable.shape[:-made]) ** -0.5
            variable.assign(rng.uniform(-bound, bound, variable.shape))
        elif "bias" in variable.path:  # of the kernel before it
            variable.assign(rng.uniform(-bound, bound, variable.shape))
    model.compile("sgd", CROSS_ENTROPY)
    return model


def normal(*shape: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(1).standard_normal(shape), tf.float32)


def step_of(model: keras.Model, batch: tuple) -> Callable[[], Any]:
    """Loss and gradient of a training step."""
    variables = [v.value for v in model.trainable_variables]

    @tf.function
    def gradient(x: tf.Tensor, y: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(y, model(x, training=True))
        return loss, tape.gradient(loss, variables)

    return lambda: gradient(*batch)[0].numpy()


def jacobian_of(model: keras.Model, batch: tuple) -> Callable[[], Any]:
    """||J||_F^2 from the whole Jacobian."""
    variables = [v.value for v in model.trainable_variables]

    @tf.function
    def trace(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
        return tf.add_n([tf.reduce_sum(block**2) for block in tape.jacobian(outputs, variables)])

    return lambda: trace(batch[0]).numpy()


def mapped_of(model: keras.Model, batch: tuple) -> Callable[[], Any]:
    """One probe: squared norms of single samples' gradients by `tf.vectorized_map`."""
    variables = [v.value for v in model.trainable_variables]

    def one(given: tuple) -> tf.Tensor:
        x, v = given
        with tf.GradientTape() as tape:
            outputs = model(x[None], training=True)
        grads = tape.gradient(outputs, variables, v[None])
        return tf.add_n([tf.reduce_sum(tf.convert_to_tensor(g) ** 2) for g in grads])

    @tf.function
    def trace(x: tf.Tensor) -> tf.Tensor:
        v = tf.sign(tf.random.stateless_uniform((x.shape[0], *model.output_shape[1:]), (0, 0)) - 0.5)
        return tf.reduce_sum(tf.vectorized_map(one, (x, v)))

    return lambda: trace(batch[0]).numpy()


def cases_of(model: keras.Model, batch: tuple) -> dict[str, Callable[[], Any]]:
    """The step, lnp by itself, and eager steps that are measured on the way."""
    cases = {
        "step": step_of(model, batch),
        "lnp, 1%": lambda: lnp.decompose(model, batch, population=False),
        "lnp, 1%, with the population": lambda: lnp.decompose(model, batch),
        "step shared with lnp, 1%": lambda: lnp_keras.value_and_grad(model, batch, population=False),
        "step shared with lnp, 1%, with the population": lambda: lnp_keras.value_and_grad(model, batch),
    }
    if len(model.output_shape) == 2:
        cases["lnp, exact"] = lambda: lnp.decompose(model, batch, estimator="exact", population=False)
    return cases


def peers_of(model: keras.Model, batch: tuple) -> dict[str, Callable[[], Any]]:
    """Other ways to the trace."""
    if len(model.output_shape) > 2:
        return {}
    peers = {"vectorized_map: one probe, no decomposition": mapped_of(model, batch)}
    numbers = batch[0].shape[0] * model.output_shape[1] * model.count_params()
    # through max-pooling it forms outputs x images x features at once
    if len(batch[0].shape) == 2 and 8 * numbers < (report.machine()["memory_gib"] or 0) * 2**30:
        peers["tape.jacobian: exact, no decomposition"] = jacobian_of(model, batch)
    return peers


def cost(name: str, rounds: int) -> list[dict]:
    """Time as a multiple of the step's, one row for each case of a model."""
    model, batch = MODELS[name]()
    cases = cases_of(model, batch)
    seconds = report.interleaved(cases | peers_of(model, batch), rounds)
    rows = []
    for case, time in report.ratios(seconds, "step").items():
        row = {"case": case, "ms": 1e3 * report.median(seconds[case]), "time": time}
        if "lnp" in case:
            d = cases[case]()
            d = d[0][1] if isinstance(d, tuple) else d
            row |= {"relative standard error": d.chi_net_stderr / d.chi_net, "probes": d.probes}
        if case.startswith("step shared"):
            pairs = zip(seconds[case], seconds["step"], strict=True)
            row["on top of the step"] = report.median([shared / step - 1 for shared, step in pairs])
        rows.append(row)
    return rows


def error(name: str, seeds: int, rounds: int) -> list[dict]:
    """Relative standard deviation of one probe, the time of another one, and the time to 1%."""
    model, batch = MODELS[name]()
    several = functools.partial(lnp.decompose, model, batch, population=False, rtol=0)
    run = {"step": step_of(model, batch)}
    for estimator in ("per_sample", "joint"):
        for probes in (1, 5):
            run[estimator, probes] = functools.partial(several, estimator=estimator, max_probes=probes)
    if len(model.output_shape) == 2:
        run["vectorized_map"] = mapped_of(model, batch)
    seconds = report.interleaved(run, rounds)

    def ratio(times: list[float]) -> float:
        """The median of times in training steps."""
        return report.median([t / step for t, step in zip(times, seconds["step"], strict=True)])

    def added(kind: str) -> float:
        """What one more probe takes, in training steps."""
        return ratio([(b - a) / 4 for a, b in zip(seconds[kind, 1], seconds[kind, 5], strict=True)])

    times = {"lnp": added("per_sample"), "lnp, joint": added("joint")}
    if "vectorized_map" in run:
        times["vectorized_map"] = ratio(seconds["vectorized_map"])
    rows: list[dict] = []
    for way, time in times.items():
        kind = "joint" if "joint" in way else "per_sample"
        found = [several(estimator=kind, max_probes=1, seed=seed).chi_net for seed in range(seeds)]
        deviation = float(np.std(found, ddof=1) / np.mean(found))
        rows.append(
            {"model": name.partition(" ")[0], "way": way, "deviation of a probe": deviation, "time of a probe": time,
             "time to 1%": time * (deviation / 0.01) ** 2}
        )  # fmt: skip
    return [{**row, "times lnp's": row["time to 1%"] / rows[0]["time to 1%"]} for row in rows]


def growth(what: str, rounds: int) -> list[dict]:
    """Ratios to the step as one size grows."""
    build, keyword, values, others = GROWTH[what]
    rows = []
    for value in values:
        model, batch = build(**{**others, keyword: value})
        cases = {case: run for case, run in cases_of(model, batch).items() if not case.startswith("step shared")}
        found = report.ratios(report.interleaved(cases, rounds), "step")
        rows.append({keyword: value, **{case: time for case, time in found.items() if case != "step"}})
    return rows


def memory(name: str) -> list[dict]:
    """Peak memory of each case beside what is there before it, and with weights and gradient as a multiple of the
    step's.
    """
    held = 8 * MODELS[name]()[0].count_params()
    peaks = {}
    for case in (*cases_of(*MODELS[name]()), *(peer for peer in peers_of(*MODELS[name]()) if "map" in peer)):
        command = [sys.executable, __file__, "--peak", name, case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[case] = int(done.stdout.strip().splitlines()[-1])
    return [
        {
            "model": name.partition(" ")[0],
            "case": case,
            "MiB": peak / 2**20,
            "memory": (peak + held) / (peaks["step"] + held),
        }
        for case, peak in peaks.items()
    ]


def _peak(name: str, case: str) -> int:
    """TensorFlow keeps what it has once allocated. Its growth at the first run, less that for a batch of 5 samples,
    which is traced just as the whole one is.
    """
    model, batch = MODELS[name]()
    grown = []
    for samples in (4, 5, len(batch[0])):
        part = tuple(tensor[:samples] for tensor in batch)
        run, before = (cases_of(model, part) | peers_of(model, part))[case], _status("VmRSS")
        for _ in range(3):
            run()
        grown.append(_status("VmHWM") - before)
    return max(grown[2] - grown[1], 0)


def _status(what: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    """Run what was asked for and write benchmarks/results/tensorflow.json and tensorflow.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of the small models, nothing written")
    parser.add_argument("--only", default="cost,error,memory,growth")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(_peak(*given.peak))
        return
    quick, wanted = given.quick, ["cost"] if given.quick else given.only.split(",")
    tables: dict[str, list[dict]] = {}

    def add(heading: str, rows: list[dict]) -> None:
        """Shown, and written with all before, as soon as it is there."""
        tables.setdefault(heading, []).extend(rows)
        print(f"\n{heading}\n\n{report.table(rows)}", flush=True)
        if not quick:
            data = {"title": "Cost of a measurement in TensorFlow", "machine": report.machine(), "tables": tables}
            report.write("tensorflow", data | {"notes": NOTES})

    for name in list(MODELS)[: 2 if quick else None]:
        rounds = 5 if quick else {"MLP": 25, "CNN": 15, "LM": 9}[name.partition(" ")[0]]
        if "cost" in wanted:
            add(name, cost(name, rounds))
        if "error" in wanted:
            add("Time to a relative standard error of 1%, in steps", error(name, 16, 5))
        if "memory" in wanted:
            add("Peak memory, as a multiple of the step's", memory(name))
    for what in GROWTH if "growth" in wanted else ():
        add(f"Growth with {what}", growth(what, 7))


if __name__ == "__main__":
    main()
