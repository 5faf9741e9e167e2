"""What a measurement costs on the architectures that people use, in PyTorch, and whether it is right.

    pip install '.[torch,transformers]' timm torchvision peft
    python benchmarks/architectures.py [NAME ...] [--rounds 5] [--only time,memory,norms]

For each architecture of `architecture_models`, beside the gradient of a training step, with default settings:

    default       time of `lnp.decompose`, median of ratios to the step in the same round; signs are drawn anew in each
    first         the first call, in steps
    memory        the most bytes of new tensors that are in memory at once, as a multiple of the step's
    norms off     squared norms of single samples' gradients for a random cotangent: the largest relative difference
                  between lnp's and those of a plain backward pass for each sample, over the parameters
    general       parameters that take the general way, and why; "jointly" where samples are not taken apart

Without names all are measured, and benchmarks/results/architectures_torch.md is written.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
import weakref
from typing import Any

import torch
from architecture_models import ARCHITECTURES, loss_of, made
from report import interleaved, machine, ratios, table, write
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lnp
from lnp.contract.options import Options
from lnp.contract.registry import evaluate

GENERAL, JOINT = "single samples run on their own", "not taken apart"


def timed(name: str, rounds: int) -> dict[str, Any]:
    """Times in steps, and what the measurements say."""
    model, batch = made(name)

    def step() -> None:
        model.zero_grad()
        loss_of(model, batch).backward()

    found: list[lnp.Decomposition] = []
    step()
    before = time.perf_counter()
    lnp.decompose(model, batch)
    first = time.perf_counter() - before
    cases = {"step": step, "lnp": lambda: found.append(lnp.decompose(model, batch, seed=len(found)))}
    seconds = interleaved(cases, rounds)
    notes = " ".join(found[-1].notes)
    return {
        "architecture": name,
        "step, ms": 1000 * statistics.median(seconds["step"]),
        "default": ratios(seconds, "step")["lnp"],
        "first": first / statistics.median(seconds["step"]),
        "probes": statistics.median(d.probes for d in found),
        "error": statistics.median(d.chi_net_stderr / d.chi_net for d in found),
        "general": "jointly" if JOINT in notes else _part(notes, GENERAL),
    }


def _part(notes: str, start: str) -> str:
    """The note that starts so, without its first words."""
    return notes.partition(start)[2].partition(" for ")[2].partition(" single ")[0][:200] if start in notes else ""


class Norms:
    """The computation that hands out a cotangent and the squared norms of single samples, if there are any."""

    def __call__(self, lin: lnp.Linearization) -> dict[str, Any]:
        v = lin.signs(0)
        return {"v": v, "norms": {} if lin.sample_square_norms is None else dict(lin.sample_square_norms(v))}


class FrozenStatistics(TorchFunctionMode):
    """Batch normalisation with the batch's statistics held, as lnp has it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm and (kwargs.get("training") or (len(args) > 5 and args[5])):
            x, (weight, bias) = args[0], (*args[3:5], kwargs.get("weight"), kwargs.get("bias"))[:2]
            axes = [0, *range(2, x.ndim)]
            statistics = x.detach().mean(axes), x.detach().var(axes, correction=0)
            return func(x, *statistics, weight, bias, False, 0.0, kwargs.get("eps", args[7] if len(args) > 7 else 1e-5))
        return func(*args, **kwargs)


def norms_off(name: str) -> float | None:
    """The largest difference from one backward pass for each sample, relative to the parameter's largest; None where
    samples are not taken apart. Parameters whose gradients are rounding alone are left out.
    """
    model, batch = made(name)
    state = torch.get_rng_state()
    record = evaluate(Norms(), model, (batch,), Options())
    if not record["norms"]:
        return None
    torch.set_rng_state(state)
    with FrozenStatistics():
        outputs = model(**batch).logits if isinstance(batch, dict) else model(batch[0])
    rows = reference(model, outputs.flatten(1), torch.as_tensor(record["v"]))
    found = {key: torch.as_tensor(value).double() for key, value in record["norms"].items()}
    scale = max(float(value.max()) for value in rows.values())
    return max(
        float((found[key] - value).abs().max()) / max(float(value.max()), 1e-6 * scale) for key, value in rows.items()
    )


def reference(model: nn.Module, outputs: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """{parameter: (N,) squared norms of the gradients of <v_n, f_n>}, by a backward pass for each sample."""
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[float]] = {key: [] for key in parameters}
    for n in range(len(outputs)):
        chosen = (outputs[n] * v[n]).sum()
        grads = torch.autograd.grad(chosen, list(parameters.values()), retain_graph=True, allow_unused=True)
        for key, gradient in zip(parameters, grads, strict=True):
            rows[key].append(0.0 if gradient is None else float(gradient.double().square().sum()))
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in rows.items()}


class Alive(TorchDispatchMode):
    """The most bytes of new tensors that are in memory at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self._known = 0, 0, set[int]()

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out


def memory(name: str) -> float:
    """Tensor bytes of a measurement as a multiple of a step's, beyond the model and the batch."""
    model, batch = made(name)
    most = []
    for run in (lambda: loss_of(model, batch).backward(), lambda: lnp.decompose(model, batch)):
        run()
        model.zero_grad()
        gc.collect()
        with Alive() as alive:
            run()
        most.append(alive.most)
    return most[1] / most[0]


def main() -> None:
    """Measure what was asked for, print the table, and write it if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="time,memory,norms")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in options.names or ARCHITECTURES:
        row = timed(name, options.rounds) if "time" in options.only else {"architecture": name}
        row |= {"memory": memory(name)} if "memory" in options.only else {}
        row |= {"norms off": norms_off(name)} if "norms" in options.only else {}
        rows.append({key: row[key] for key in sorted(row, key=lambda key: key == "general")})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if not options.names:
        notes = ["one thread", "what the columns are stands at the top of benchmarks/architectures.py"]
        data = {"title": "Architectures in PyTorch", "machine": machine(), "tables": {"In steps": rows}, "notes": notes}
        print("\n".join(map(str, write("architectures_torch", data))))


if __name__ == "__main__":
    main()
