"""What a measurement costs in PyTorch, beside a training step's gradient and beside other ways to the same number.

    python benchmarks/torch_benchmark.py [--quick] [--only cost,error,memory,growth] [--models mlp,cnn,lm]

All cases of a model run in turn in one process; times are medians of ratios to the gradient in the same round. Memory
is the peak of the process above what it held before, of each case in a process of its own. Peers that cannot be
imported, or do not know a model's layers, are named in the notes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from report import interleaved, machine, ratios, resident_peak, write
from torch import nn
from torch.nn import functional as F
from torch_peers import PER_SAMPLE, TRACES

import lnp
import lnp_torch

Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """A causal transformer block with pre-normalisation and four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, d = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, s, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, s, d))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Position(nn.Module):
    """Adds a learnt vector to each position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.3 * torch.randn(length, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def mlp(samples: int = 128, width: int = 512, outputs: int = 10) -> tuple[nn.Module, Batch]:
    """784 - width - width - outputs, ReLU."""
    layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    return nn.Sequential(*layers), (torch.randn(samples, 784), torch.arange(samples) % outputs)


def cnn(samples: int = 64, width: int = 32, outputs: int = 10) -> tuple[nn.Module, Batch]:
    """Three 3x3 convolutions with width, 2 width and 4 width channels on 32x32 images, each pooled by two."""
    layers, channels = [], (3, width, 2 * width, 4 * width)
    for i in range(3):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels[-1], outputs))
    return model, (torch.randn(samples, 3, 32, 32), torch.arange(samples) % outputs)


def lm(
    samples: int = 16, width: int = 256, layers: int = 4, vocabulary: int = 2000, length: int = 64
) -> tuple[nn.Module, Batch]:
    """A causal transformer with a head of its own."""
    blocks = [Block(width) for _ in range(layers)]
    head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
    model = nn.Sequential(nn.Embedding(vocabulary, width), Position(length, width), *blocks, *head)
    tokens = torch.randint(vocabulary, (samples, length + 1))
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


MODELS: dict[str, Callable[..., tuple[nn.Module, Batch]]] = {"mlp": mlp, "cnn": cnn, "lm": lm}


def made(name: str, **sizes: int) -> tuple[nn.Module, Batch]:
    """The same network and batch each time."""
    torch.manual_seed(0)
    return MODELS[name](**sizes)


def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over all labels."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def cases_of(name: str, model: nn.Module, batch: Batch) -> dict[str, Callable[[], Any]]:
    """What is timed: the step, lnp by itself, and steps that share their passes with lnp."""
    x, y = batch

    def step() -> None:
        loss_of(model(x), y).backward()
        model.zero_grad()  # not before: a step's memory has its gradients

    watched = lnp_torch.shared(model)

    seeds = itertools.count()  # what 1% asks for depends on the signs: each round draws its own

    def shared(**options: Any) -> None:
        with watched:
            loss = loss_of(model(x), y)
        watched.backward(loss, y, "cross_entropy", seed=next(seeds), **options)
        model.zero_grad()

    cases = {
        "step": step,
        "lnp, 1%": lambda: lnp.decompose(model, batch, population=False, seed=next(seeds)),
        "lnp, 1%, with the population": lambda: lnp.decompose(model, batch, seed=next(seeds)),
        "step shared with lnp, 1%": lambda: shared(population=False),
        "step shared with lnp, 1%, with the population": shared,
    }
    if name != "lm":
        cases["lnp, exact"] = lambda: lnp.decompose(model, batch, estimator="exact", population=False)
    return cases


def peers_of(model: nn.Module, batch: Batch) -> tuple[dict[str, Callable[[torch.Tensor], Any]], list[str]]:
    """(peers that can measure this model, what kept the others)."""
    (x, _), found, notes = batch, {}, []
    with torch.no_grad():
        v = torch.ones_like(model(x)).reshape(len(x), -1)
    for name, peer in {**PER_SAMPLE, **TRACES}.items():
        try:
            run = peer(model, x)
            run(v)
        except Exception as error:  # whatever a peer raises, it is named
            notes.append(f"{name} was left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
        else:
            found[name] = run
    return found, notes


def cost(name: str, rounds: int) -> tuple[list[dict], list[str]]:
    """Time as a multiple of the step's."""
    model, batch = made(name)
    peers, notes = peers_of(model, batch)
    with torch.no_grad():
        v = torch.ones_like(model(batch[0])).reshape(len(batch[0]), -1)
    cases = cases_of(name, model, batch)
    cases |= {f"{peer}: one probe, no decomposition": lambda run=run: run(v) for peer, run in peers.items()}
    seconds = interleaved(cases, rounds, warmup=2)
    found = ratios(seconds, "step")
    rows = []
    for case in cases:
        row = {"model": name, "case": case, "time": found[case]}
        if case.startswith("step shared"):
            row["on top of the step"] = found[case] - 1
        if case.startswith("lnp"):
            estimator = "exact" if "exact" in case else "auto"
            runs = [lnp.decompose(model, batch, population=False, estimator=estimator, seed=seed) for seed in range(8)]
            row |= {
                "relative standard error": statistics.mean(d.chi_net_stderr / d.chi_net for d in runs),
                "probes": statistics.mean(d.probes for d in runs),
            }
        rows.append(row)
    return rows, [f"{name}: {note}" for note in notes]


def error(name: str, seeds: int, rounds: int) -> list[dict]:
    """Relative standard deviation of one probe, the time of another one, and the time to 1%."""
    model, batch = made(name)
    peers, _ = peers_of(model, batch)
    record = lnp.load("torch").linearize(model, batch, lnp.Options())
    assert record.sample_square_norms is not None

    def total(v):
        return float(sum(norm.sum() for norm in record.sample_square_norms(v).values()))

    signs = [record.signs(seed) for seed in range(seeds)]
    deviations = {
        "independent signs": _relative([total(v) for v in signs]),
        "signs shared by all samples": _relative([total(v[:1].expand_as(v).contiguous()) for v in signs]),
        "joint": _relative([float(sum(record.inner_products(u, u).values())) for u in map(record.vjp, signs)]),
    }
    run = {"step": cases_of(name, model, batch)["step"], "lnp": lambda: record.sample_square_norms(signs[0])}
    run |= {peer: lambda one=one: one(signs[0]) for peer, one in peers.items() if peer != "nngeometry"}
    found = ratios(interleaved(run, rounds, warmup=2), "step")
    rows = []
    kinds = {"lnp": "independent signs", "vmap": "independent signs", "curvlinops": "joint"}
    for case in list(run)[1:]:
        kind = kinds.get(case, "signs shared by all samples")  # as they are used where lnp is not at hand
        deviation, time = deviations[kind], found[case]
        rows.append(
            {"model": name, "way": case, "signs": kind, "deviation of a probe": deviation, "time of a probe": time,
             "time to 1%": time * (deviation / 0.01) ** 2}
        )  # fmt: skip
    ours = rows[0]["time to 1%"]
    return [{**row, "times lnp's": row["time to 1%"] / ours} for row in rows]


def _relative(values: list[float]) -> float:
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.std() / tensor.mean())


def memory(name: str) -> list[dict]:
    """Peak memory of each case as a multiple of the step's."""
    cases = [*cases_of(name, *made(name)), *PER_SAMPLE]
    peaks = {}
    for case in cases:
        answer = _own_process(name, case)
        if answer is not None:
            peaks[case] = answer
    return [
        {"model": name, "case": case, "MiB": peak / 2**20, "memory": peak / peaks["step"]}
        for case, peak in peaks.items()
    ]


def _own_process(name: str, case: str) -> float | None:
    """Bytes; big arrays go straight back to the system, so that what was freed does not hide what is held."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", name, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak(name: str, case: str) -> int:
    """Peak resident bytes during the case, above those before. Linux only."""
    model, batch = made(name)
    if case in PER_SAMPLE:
        with torch.no_grad():
            v = torch.ones_like(model(batch[0])).reshape(len(batch[0]), -1)
        one = PER_SAMPLE[case](model, batch[0])

        def run() -> Any:
            return one(v)
    else:
        run = cases_of(name, model, batch)[case]
    for _ in range(2):
        run()
    model.zero_grad()
    return resident_peak(run)


GROWTH: dict[str, tuple[str, str, tuple[int, ...], dict[str, int]]] = {
    "batch": ("mlp", "samples", (32, 128, 512, 2048), {}),
    "width": ("mlp", "width", (128, 512, 2048), {}),
    "image batch": ("cnn", "samples", (16, 64, 256), {}),
    "sequence length": ("lm", "length", (16, 64, 256), {"samples": 8, "layers": 2, "width": 128, "vocabulary": 500}),
    "vocabulary": ("lm", "vocabulary", (2000, 8000, 32000), {"samples": 4, "layers": 2}),
}


def growth(which: str, rounds: int, quick: bool) -> list[dict]:
    """Ratios to the step as one size grows."""
    name, size, values, others = GROWTH[which]
    rows = []
    for value in values[:2] if quick else values:
        model, batch = made(name, **{**others, size: value})
        seconds = interleaved(cases_of(name, model, batch), rounds, warmup=2)
        rows.append({"model": name, size: value, **{c: r for c, r in ratios(seconds, "step").items() if c != "step"}})
    return rows


def main() -> None:
    """Run what was asked for and write benchmarks/results/torch.json and torch.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes")
    parser.add_argument("--only", default="cost,error,memory,growth")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if options.peak:
        print(peak(*options.peak))
        return
    wanted, models, quick = options.only.split(","), options.models.split(","), options.quick
    tables: dict[str, list[dict]] = {}
    notes = [f"{torch.get_num_threads()} threads"]
    for name in models:
        rounds = 3 if quick else {"mlp": 60, "cnn": 15, "lm": 10}[name]
        if "cost" in wanted:
            rows, left_out = cost(name, rounds)
            tables.setdefault("Time, as a multiple of a training step's gradient", []).extend(rows)
            notes += left_out
        if "error" in wanted:
            rows = error(name, 6 if quick else 24, max(rounds // 3, 3))
            tables.setdefault("Time to a relative standard error of 1%, in steps", []).extend(rows)
        if "memory" in wanted:
            tables.setdefault("Peak memory, as a multiple of the step's", []).extend(memory(name))
    for which, (name, *_) in GROWTH.items():
        if "growth" in wanted and name in models:
            tables[f"Growth with {which}"] = growth(which, 3 if quick else 8, quick)
    paths = write("torch-quick" if quick else "torch", {
        "title": "Cost of a measurement in PyTorch", "machine": machine(), "tables": tables, "notes": notes,
    })  # fmt: skip
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
