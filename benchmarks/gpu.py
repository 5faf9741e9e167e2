"""What a measurement costs on a GPU in PyTorch, beside a training step's gradient.

    python benchmarks/gpu.py [--rounds 10] [--device cuda] [--models GPT-2]

All cases of a model run in turn in one process; times are medians of ratios to the gradient in the same round, each
from start to a device that is idle again. Memory is the peak of the device's allocator above what the model holds.
`waits` are the places in a measurement at which the processor waits for the device. The table goes to
`results/torch_<device>.md`.
"""

from __future__ import annotations

import argparse
import itertools
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from report import interleaved, machine, median, ratios, write
from torch import nn
from torch_benchmark import Batch, cases_of, cnn, lm, mlp

import lnp

Cases = dict[str, Callable[[], Any]]


def plain(make: Callable[[], tuple[nn.Module, Batch]], name: str, device: str) -> Cases:
    """One of the networks that are measured on the processor too, larger."""
    model, batch = make()
    model, moved = model.to(device), tuple(part.to(device) for part in batch)
    return cases_of(name, model, moved)


def gpt2(device: str, samples: int, length: int = 1024, layers: int = 12, width: int = 768) -> Cases:
    """GPT-2 of 124 million parameters with random weights, in bfloat16 by autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "n_positions": length}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(device)
    return whole_model(model, tokens(samples, length, 50257, device), device)


def llama(device: str, samples: int, length: int = 1024, layers: int = 16, width: int = 2048) -> Cases:
    """A Llama of 1.1 billion parameters, with random weights that are bfloat16 themselves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": width // 64, "num_key_value_heads": max(width // 256, 1)}
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 32000}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=length)).to(device, torch.bfloat16)
    return whole_model(model, tokens(samples, length, 32000, device), device)


def tokens(samples: int, length: int, vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    """Random sequences that are their own labels."""
    drawn = torch.randint(vocabulary, (samples, length), device=device)
    return {"input_ids": drawn, "labels": drawn}


def resnet18(device: str) -> Cases:
    """torchvision's network on 64 images of 224 x 224 pixels, with batch norm in training mode."""
    from torchvision.models import resnet18 as network

    model = network().to(device)
    batch = torch.randn(64, 3, 224, 224, device=device), torch.arange(64, device=device)
    return whole_model(model, batch, device)


def whole_model(model: nn.Module, batch: Any, device: str) -> Cases:
    """The step and lnp by itself, both in bfloat16 by autocast."""
    seeds = itertools.count()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            if isinstance(batch, dict):
                loss = model(**batch).loss
            else:
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        model.zero_grad()  # not before: a step's memory has its gradients

    def measure(**options: Any) -> lnp.Decomposition:
        with torch.autocast(device, torch.bfloat16):
            return lnp.decompose(model, batch, seed=next(seeds), **options)

    return {"step": step, "lnp, 1%": lambda: measure(population=False), "lnp, 5%": lambda: measure(rtol=0.05)}


def finished(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The case, until the device is idle."""

    def whole() -> None:
        run()
        if device != "cpu":
            torch.cuda.synchronize()

    return whole


def peak(run: Callable[[], Any]) -> int:
    """Bytes at the highest, above those before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def waits(run: Callable[[], Any]) -> int:
    """How often the processor waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


MODELS: dict[str, Callable[[str], Cases]] = {
    "mlp, 1024 samples": lambda device: plain(lambda: mlp(1024, 2048), "mlp", device),
    "cnn, 256 images": lambda device: plain(lambda: cnn(256, 64), "cnn", device),
    "lm, 32 x 256 tokens": lambda device: plain(lambda: lm(32, 512, 6, 8000, 256), "lm", device),
    "GPT-2 124M, 4 x 1024 tokens, autocast": partial(gpt2, samples=4),
    "GPT-2 124M, 16 x 1024 tokens, autocast": partial(gpt2, samples=16),
    "Llama 1.1B, 2 x 1024 tokens, bfloat16": partial(llama, samples=2),
    "Llama 1.1B, 8 x 1024 tokens, bfloat16": partial(llama, samples=8),
    "ResNet-18, 64 images, bfloat16": resnet18,
}


def rows_of(name: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each case of a model."""
    torch.manual_seed(0)
    cases = MODELS[name](device)
    whole = {case: finished(run, device) for case, run in cases.items()}
    seconds = interleaved(whole, rounds, warmup=3)
    found = ratios(seconds, "step")
    peaks = {case: peak(run) for case, run in whole.items()} if device != "cpu" else {}
    rows = []
    for case in whole:
        row: dict[str, Any] = {"model": name, "case": case, "ms": 1e3 * median(seconds[case]), "time": found[case]}
        if peaks:
            row |= {"memory": peaks[case] / peaks["step"], "waits": waits(cases[case])}
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default="", help="part of the names")
    options = parser.parse_args()
    rows, notes = [], []
    for name in MODELS:
        if options.models in name:
            try:
                rows += rows_of(name, options.device, options.rounds)
            except (ImportError, torch.OutOfMemoryError) as error:
                notes.append(f"{name} was left out: {str(error).splitlines()[0][:150]}")
            for row in rows[-6:]:
                print(row, flush=True)
    what = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    notes.append(f"{what}; TF32 for products of float32: {torch.backends.cuda.matmul.allow_tf32}")
    short = re.search(r"[A-Z]\d+|cpu", what)
    tables = {"Time and memory, as a multiple of a training step's gradient": rows}
    data = {"title": f"Cost of a measurement in PyTorch on an {what}", "machine": machine(), "tables": tables}
    write(f"torch_{(short[0] if short else what).lower()}", {**data, "notes": notes})


if __name__ == "__main__":
    main()
