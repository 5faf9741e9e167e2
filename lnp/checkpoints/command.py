"""`lnp measure`: folders of checkpoints and data in, history files out."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lnp.arguments import Batch
from lnp.checkpoints import data
from lnp.checkpoints.folder import Checkpoints, open_checkpoints
from lnp.checkpoints.measure import measure_checkpoints
from lnp.printable import printable

INCOMPLETE = 3
"""The exit status where something was skipped, or is being measured by another process."""
OPTIONS = ("loss", "by_layer", "microbatch", "rtol", "seed", "responses", "nested")
"""Options of `lnp.measure_checkpoints` that the command line has under their own names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder of checkpoints")
    add("--out", type=Path, help="history file (.jsonl), or a folder for several runs (default: FOLDER's name, here)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="text, for language models")
    source.add_argument("--tokens", type=Path, metavar="FILE.npy", help="integers, (tokens,) or (sequences, tokens)")
    source.add_argument("--arrays", type=Path, metavar="FILE.npz", help="inputs and targets, one row for each sample")
    source.add_argument("--batches", metavar="mine.py:NAME", help="batches, or a function that returns or yields them")
    add("--length", type=_positive, default=128, help="tokens of a sequence (default: 128)")
    add("--batch-size", type=_positive, default=32, help="samples of a batch (default: 32)")
    add("--count", type=_positive, default=1, help="batches; with several, means and errors over them (default: 1)")
    add("--responses", action="store_true", help="also the cross responses between the batches")
    add(
        "--nested",
        nargs="?",
        const=True,
        default=False,
        type=_sizes,
        metavar="SIZES",
        help="also the first 8, 16, 32, ... samples of each batch, or such as 4,16,64: the floor of a finite batch",
    )
    add("--tokenizer", type=Path, metavar="FOLDER", help="default: the one in the last checkpoint's folder")
    add(
        "--model",
        metavar="mine.py:NAME",
        help="the function that makes the model, where checkpoints hold weights alone",
    )
    add("--pattern", default="*", help="which names in the folder are checkpoints, such as 'ema-*.pt'")
    add("--entry", help="which part of a checkpoint holds the weights, where several could")
    add("--steps", type=_steps, metavar="FIRST:LAST:EVERY", help="checkpoints to measure, also 0,10,500 (default: all)")
    add("--device", help="such as cuda")
    add("--dtype", help="such as bfloat16")
    add("--microbatch", type=_positive, help="samples in memory at a time")
    add("--by-layer", action="store_true", help="also for each layer")
    add("--rtol", type=float, default=0.01, help="relative error of chi_net at which probing stops (default: 0.01)")
    add(
        "--loss", help="cross_entropy, mse, binary_cross_entropy or huber (default: the model's own, or by the targets)"
    )
    add("--seed", type=int, default=0, help="seed of the random signs (default: 0)")
    add("--tag", action="append", default=[], type=_tag, metavar="NAME=VALUE", help="such as tokens_per_step=65536")


def run(options: argparse.Namespace) -> int:
    """Measure each folder; the exit status."""
    model = data.function_from_file(options.model)
    chosen = {name: getattr(options, name) for name in ("pattern", "entry", "device", "dtype")}
    opened = {folder: open_checkpoints(folder, model=model, **chosen) for folder in options.folders}
    batches = {folder: _batches(options, checkpoints) for folder, checkpoints in opened.items()}
    paths = _paths(options.folders, options.out)
    status = 0
    for folder, checkpoints in opened.items():
        getattr(checkpoints.reader, "quiet", lambda: None)()
        steps = checkpoints.steps if options.steps is None else options.steps(checkpoints.steps)
        given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
        with _plain_warnings():
            measured = measure_checkpoints(
                checkpoints, steps, batches[folder], paths[folder], tags=dict(options.tag), **given
            )
        told = f"{printable(paths[folder])}: {len(measured.history)} checkpoints measured"
        for count, what in ((len(measured.skipped), "skipped"), (len(measured.elsewhere), "left to other processes")):
            told += f", {count} {what}" if count else ""
            status = INCOMPLETE if count else status
        print(told)
    return status


def _batches(options: argparse.Namespace, checkpoints: Checkpoints) -> list[Batch]:
    """The batches that the command line names."""
    if options.batches is not None:
        return data.python_batches(options.batches)
    if options.arrays is not None:
        return data.array_batches(options.arrays, options.batch_size, options.count)
    last, hugging_face = checkpoints.files[checkpoints.steps[-1]], checkpoints.kind == "transformers"
    reader: Any = checkpoints.reader
    if hugging_face:
        reader.check_language_model(last)
    if options.tokens is not None:
        tokens = data.read_tokens(options.tokens)
    elif hugging_face:
        tokens = data.text_tokens(options.text, reader.tokenizer(options.tokenizer or last))
    else:
        raise ValueError(
            f"--text needs a tokenizer, and checkpoints of the kind {checkpoints.kind} have none. Expected --tokens "
            "FILE.npy, or --batches mine.py:batches."
        )
    parts = data.sequences(tokens, options.length, options.batch_size, options.count)
    if hugging_face:
        return [{"input_ids": part, "labels": part} for part in parts]
    return [(part[:, :-1], part[:, 1:]) for part in parts]


def _paths(folders: list[Path], out: Path | None) -> dict[Path, Path]:
    """{folder: history file}."""
    if out is not None and out.suffix == ".jsonl":
        if len(folders) > 1:
            raise ValueError(f"--out is {out}, and there are {len(folders)} runs. Expected a folder: --out histories.")
        return {folders[0]: out}
    named = {folder: (out or Path()) / f"{folder.resolve().name}.jsonl" for folder in folders}
    if len(set(named.values())) < len(named):
        raise ValueError("Several folders have the same name. Expected different ones, for a history file each.")
    return named


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "lnp: the checkpoint of step")  # each is named, whatever filters there are
        warnings.showwarning = lambda message, *others: print(printable(str(message), keep="\n"), file=sys.stderr)
        yield


def _positive(text: str) -> int:
    """An integer above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"received {text}; expected an integer above 0")
    return value


def _sizes(text: str) -> list[int]:
    """Numbers of samples."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"received {text!r}; expected numbers of samples, such as 8,32,128") from None


def _steps(text: str) -> Any:
    """A function that chooses steps among those that there are."""
    if ":" not in text:
        listed = {int(part) for part in text.split(",")}
        return lambda steps: [step for step in steps if step in listed]
    first, last, every = ([int(part) if part else None for part in text.split(":")] + [None])[:3]
    return lambda steps: [
        step
        for step in steps
        if step >= (first or 0) and (last is None or step <= last) and (step - (first or 0)) % (every or 1) == 0
    ]


def _tag(text: str) -> tuple[str, Any]:
    """(Name, value) of a tag; a number where it is one."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"received {text!r}; expected NAME=VALUE")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
