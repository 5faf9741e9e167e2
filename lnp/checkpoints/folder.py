"""A folder of saved checkpoints: which kind they are of, their steps, and the loader that reads them.

A kind is told by the names of files alone, before any framework is imported. The framework's backend has the reader, in
its `checkpoints.py`, which uses the owner's own library and never runs code that a checkpoint brings along.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lnp.arguments import Batch, Model
from lnp.checkpoints.files import files_of
from lnp.contract import registry
from lnp.printable import printable
from lnp.tracking.failures import describe

FRAMEWORKS = {
    "transformers": "torch",
    "lightning": "torch",
    "state_dict": "torch",
    "keras": "keras",
    "tensorflow": "tensorflow",
    "orbax": "jax",
}
"""Kinds of checkpoints, and the backend that reads each."""
ENDINGS = {
    ".ckpt": "lightning",
    ".pt": "state_dict",
    ".pth": "state_dict",
    ".safetensors": "state_dict",
    ".keras": "keras",
    ".h5": "keras",
    ".index": "tensorflow",
}
CONFIGS = ("config.json", "adapter_config.json")
ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "default")
EXPECTED = (
    "Expected a folder that holds a checkpoint for each step, with the step in its name: checkpoint-500/ of the "
    "Hugging Face Trainer, or files that end in " + ", ".join(ENDINGS) + ", or Orbax's folders"
)


class Reader(Protocol):
    """What a backend makes of one kind of checkpoints."""

    def step(self, path: Path, step: int) -> int:
        """The step that the checkpoint itself says it is of; the one in its name where it says nothing."""

    def load(self, path: Path) -> Model:
        """The model of a checkpoint, ready to be measured. Errors say what is wrong with it."""

    def prepare(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays in the framework's own."""

    def size(self, model: Model) -> int:
        """Number of trained parameters."""

    def tags(self, path: Path) -> Mapping[str, Any]:
        """What the last checkpoint says about the run, such as tokens_per_step."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, for `lnp.measure_checkpoints`. Called with a step, it returns that one's model.

    Attributes
    ----------
    source:
        The folder.
    kind:
        "transformers", "lightning", "state_dict", "keras", "tensorflow" or "orbax".
    files:
        {step: file or folder}.
    tags:
        What the folder says about the run.
    reader:
        How the backend reads them.
    """

    source: str
    kind: str
    files: Mapping[int, Path]
    reader: Reader
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps, in order."""
        return tuple(sorted(self.files))

    def __call__(self, step: int) -> Model:
        """The model of a step, a new one; a ValueError that names the checkpoint for one that cannot be read."""
        return self._read(step, self.reader.load)

    def in_turn(self) -> Callable[[int], Model]:
        """A loader of one step after the other, which fills one model again where another one is compiled anew."""
        fill = getattr(self.reader, "fill", None)
        return self if fill is None else _InTurn(self._read, self.reader.load, fill)

    def _read(self, step: int, load: Callable[[Path], Model]) -> Model:
        """What `load` makes of a step's file."""
        path = self.files[step]
        try:
            files_of(path)  # a pipe would never end
            return load(path)
        except ImportError:
            raise
        except Exception as error:  # whatever a library raises of a damaged file
            if isinstance(error, ValueError) and str(path) in str(error) and "Expected" in str(error):
                raise  # a reader has said what is wrong
            raise ValueError(
                f"{printable(path)} cannot be read ({' '.join(describe(error).split())}). Expected a complete "
                f"checkpoint of the kind {self.kind}, of the model that is measured. Save it again, or give its model."
            ) from error

    def stamp(self, step: int) -> str:
        """Sizes and times of a checkpoint's files, by which it is seen that they have changed.

        Raises
        ------
        OSError
            For what is no file, such as a pipe, which would never end.
        """
        return ";".join(f"{name}:{size}:{time}" for name, size, time in files_of(self.files[step]))

    def prepare(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays in the framework's own."""
        return self.reader.prepare(batch)

    def size(self, model: Model) -> int:
        """Number of trained parameters."""
        return self.reader.size(model)


class _InTurn:
    """Loads a model once, and puts the weights of other steps into it. One that could not be filled is dropped."""

    def __init__(self, read: Callable[..., Model], load: Callable[[Path], Model], fill: Callable[..., Model]) -> None:
        self._read, self._load, self._fill = read, load, fill
        self._model: Model = None

    def __call__(self, step: int) -> Model:
        """The model, with the weights of a step."""
        model, self._model = self._model, None
        self._model = self._read(step, self._load if model is None else lambda path: self._fill(path, model))
        return self._model


def open_checkpoints(
    folder: str | os.PathLike,
    *,
    model: Callable[..., Model] | None = None,
    pattern: str = "*",
    entry: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Checkpoints:
    """The checkpoints of a folder, which `lnp.measure_checkpoints` takes in the place of `load`.

    | kind | found by | `model` |
    |---|---|---|
    | transformers | folders with config.json and safetensors; of the hub's cache, with revisions | not needed |
    | the same, PEFT | folders with adapter_config.json and safetensors | model() -> base, where it is not on the disk |
    | lightning | *.ckpt | model() -> module |
    | state_dict | *.pt, *.pth, *.safetensors | model() -> module |
    | keras | *.keras, *.h5, of which weights are read | model() -> model |
    | tensorflow | *.index | model() -> module |
    | orbax | numbered folders | model(tree) -> model |

    Nothing that a checkpoint holds is executed: pickles are read by PyTorch's `weights_only`, Hugging Face models from
    safetensors alone and without code of their own, and of Keras's files the weights alone.

    Parameters
    ----------
    folder:
        The run's folder.
    model:
        A function that makes the model whose weights the checkpoints hold, anew at each call.
    pattern:
        Which names in the folder are checkpoints, such as "ema-*.pt", where not all are.
    entry:
        Which part of a checkpoint holds the weights, such as "model" or "ema", where several could.
    device, dtype:
        Where the model is put and in which type, such as "cuda" and "bfloat16". Hugging Face models are in float32 by
        default; others are as the model is made. For Keras and TensorFlow, set them in the framework.

    Raises
    ------
    OSError
        If there is no such folder, or no checkpoint in it.
    ValueError
        If two checkpoints are of one step, or `model` is missing.
    ImportError
        If the library that reads this kind is not installed.
    """
    path = Path(folder)
    kind, found = _found(path, pattern)
    backend: Any = registry.load(FRAMEWORKS[kind])
    readers = importlib.import_module(f"{backend.__name__}.checkpoints")
    reader: Reader = readers.reader(kind, model=model, entry=entry, device=device, dtype=dtype)
    files: dict[int, Path] = {}
    for name, at in found.items():
        step = reader.step(at, name)
        if step in files:
            raise ValueError(
                f"{printable(files[step])} and {printable(at)} are both of step {step}. Expected one checkpoint for "
                "each step. Choose by a pattern: pattern='...', or --pattern."
            )
        files[step] = at
    return Checkpoints(str(path.resolve()), kind, files, reader, reader.tags(files[max(files)]))


def _found(folder: Path, pattern: str) -> tuple[str, dict[int, Path]]:
    """(The kind, {step in the name: file or folder}) of the checkpoints in a folder."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{printable(folder)} is no folder. {EXPECTED}.")
    if (folder / "refs").is_dir() and (folder / "snapshots").is_dir():
        return "transformers", _revisions(folder, pattern)
    kinds: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob(pattern)):
        kind, step = _kind(path), step_in(path)
        if kind is None or step is None:
            continue
        others = kinds.setdefault(kind, {})
        if step in others:
            raise ValueError(
                f"{printable(others[step].name)} and {printable(path.name)} in {printable(folder)} are both of step "
                f"{step}. Expected one checkpoint for each step. Choose by a pattern: pattern='...', or --pattern."
            )
        others[step] = path.with_suffix("") if kind == "tensorflow" else path
    if not kinds and _kind(folder) is not None:
        kinds = {str(_kind(folder)): {step_in(folder) or 0: folder}}
    if len(kinds) != 1:
        several = f"holds checkpoints of several kinds ({', '.join(kinds)})" if kinds else "holds no checkpoints"
        remedy = "Choose by a pattern: pattern='...', or --pattern." if kinds else ""
        raise FileNotFoundError(f"{printable(folder)} {several}. {EXPECTED}. {remedy}".rstrip())
    return next(iter(kinds.items()))


def _revisions(folder: Path, pattern: str) -> dict[int, Path]:
    """{step: snapshot} of the revisions, such as step1000, of a repository in the hub's cache."""
    found = {}
    for ref in (folder / "refs").glob(pattern):
        step = step_in(ref)
        if step is not None and ref.is_file():
            found[step] = folder / "snapshots" / ref.read_text(encoding="utf-8", errors="replace").strip()[:80]
    if not found:
        raise FileNotFoundError(
            f"{printable(folder)} holds no revision with a step in its name. Expected some, such as step1000. Download "
            "each: huggingface-cli download NAME --revision step1000."
        )
    return found


def _kind(path: Path) -> str | None:
    """The kind of a checkpoint, by names alone; None for what is none."""
    if not path.is_dir():
        return ENDINGS.get(path.suffix)
    if any((path / name).exists() for name in CONFIGS):
        return "transformers"
    return "orbax" if any((path / name).exists() for name in ORBAX) else None


def step_in(path: Path) -> int | None:
    """The step in a name: the number behind "step", else the last one; None without any.

    >>> step_in(Path("epoch=3-step=400.ckpt")), step_in(Path("checkpoint-500")), step_in(Path("last.ckpt"))
    (400, 500, None)
    """
    name = path.name[: -len(path.suffix)] if path.suffix in ENDINGS else path.name
    found = re.findall(r"step[-_=]?(\d+)", name, re.IGNORECASE) or re.findall(r"\d+", name)
    return int(found[-1]) if found and len(found[-1]) < 19 else None
