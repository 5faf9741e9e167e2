"""Readers of saved checkpoints: Hugging Face models and adapters, Lightning's and plain state dictionaries.

Nothing that a checkpoint brings along is executed. Pickles are read by `torch.load(weights_only=True)`, which refuses
whatever is no tensor, number, text or container; Hugging Face models from safetensors alone, without code of their own.
A checkpoint that lacks a weight of the model, or has one more, is an error: it would be measured at random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lnp.arguments import Batch
from lnp.contract.trees import map_leaves
from lnp.printable import printable
from lnp_torch.hugging_face import TransformersReader

PREFIXES = ("", "module.", "_orig_mod.", "model.", "net.", "network.")
"""What wrappers put before the names of a model's weights: data parallelism, compilation, Lightning modules."""
LISTED = 3
"""Names that an error lists."""


def reader(
    kind: str,
    *,
    model: Callable[[], torch.nn.Module] | None,
    entry: str | None,
    device: str | None,
    dtype: str | None,
) -> Reader:
    """The reader of a kind; a ValueError without the model that it needs."""
    if kind == "transformers":
        return TransformersCheckpoints(model, device, dtype)
    if model is None:
        raise ValueError(
            f"Checkpoints of the kind {kind} hold weights alone, and received no model. Expected a function that makes "
            "the module they belong to. Pass model=, or --model mine.py:build."
        )
    return StateDictionaries(model, entry, device, dtype)


class Reader:
    """What readers of PyTorch's checkpoints have in common."""

    def __init__(self, device: str | None, dtype: str | None) -> None:
        self.device = device
        self.dtype = None if dtype is None else _dtype(dtype)

    def prepare(self, batch: Batch) -> Batch:
        """NumPy's arrays as tensors, on the model's device: integers in 64 bits, floats in the model's type."""
        return map_leaves(self._tensor, batch)

    def _tensor(self, leaf: Any) -> Any:
        """A leaf of a batch."""
        if not isinstance(leaf, np.ndarray):
            return leaf
        tensor = torch.as_tensor(np.array(leaf), device=self.device)
        if tensor.is_floating_point():
            return tensor.to(self.dtype or torch.get_default_dtype())
        return tensor if tensor.dtype == torch.bool else tensor.long()

    def size(self, model: torch.nn.Module) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def finish(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model in evaluation mode, where and in which type it is to be measured."""
        return model.to(device=self.device, dtype=self.dtype).eval()

    def step(self, path: Path, step: int) -> int:
        """The step in the name."""
        return step

    def tags(self, path: Path) -> Mapping[str, Any]:
        """Nothing is said about the run."""
        return {}


class TransformersCheckpoints(Reader):
    """Folders as `save_pretrained` and the Trainer write them."""

    def __init__(self, base: Callable[[], torch.nn.Module] | None, device: str | None, dtype: str | None) -> None:
        super().__init__(device, dtype or "float32")
        self._folders = TransformersReader(base)

    def step(self, path: Path, step: int) -> int:
        """The Trainer's own count."""
        return self._folders.trainer_state(path).get("global_step", step)

    def load(self, path: Path) -> torch.nn.Module:
        """The model, or the base with the adapter on it."""
        return self.finish(self._folders.load(path))

    def tags(self, path: Path) -> Mapping[str, Any]:
        """Tokens of a step, where the Trainer has counted them."""
        state = self._folders.trainer_state(path)
        step, tokens = state.get("global_step", 0), state.get("num_input_tokens_seen", 0)
        return {"tokens_per_step": tokens / step} if step and tokens else {}

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer that was saved with a checkpoint."""
        return self._folders.tokenizer(path)

    def quiet(self) -> None:
        """Keep transformers from showing a progress bar and a table of its own for each model, in this process."""
        self._folders.quiet()

    def check_language_model(self, path: Path) -> None:
        """A ValueError for a model whose labels are not its inputs."""
        self._folders.check_language_model(path)


class StateDictionaries(Reader):
    """Files of `torch.save`, Lightning or safetensors, of which the weights go into a model that is given."""

    def __init__(
        self, model: Callable[[], torch.nn.Module], entry: str | None, device: str | None, dtype: str | None
    ) -> None:
        super().__init__(device, dtype)
        self._model = model
        self._entry = entry

    def step(self, path: Path, step: int) -> int:
        """Lightning's own count, where the file has one: the name may hold that of the epoch."""
        if path.suffix != ".ckpt":
            return step
        try:
            found = _read(path).get("global_step", step)
        except Exception:  # it will be named when it is measured
            return step
        return found if isinstance(found, int) else step

    def load(self, path: Path) -> torch.nn.Module:
        """A new model with these weights."""
        model = self._model()
        weights = _weights(_read(path), set(model.state_dict()), self._entry, path)
        model.load_state_dict(weights, strict=True)
        return self.finish(model)


def _read(path: Path) -> Mapping[str, Any]:
    """What a file holds."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{printable(path)} holds a {type(found).__name__}. Expected a dictionary of tensors, as torch.save("
            "model.state_dict(), path) writes it."
        )
    return found


def _weights(found: Mapping[str, Any], names: set[str], entry: str | None, path: Path) -> dict[str, torch.Tensor]:
    """The weights under the model's own names, from the one part of the file that holds all of them and no others."""
    parts = {"": found} | {str(key): value for key, value in found.items() if isinstance(value, Mapping)}
    chosen = {key: part for key, part in parts.items() if entry is None or key == entry}
    fitting = {
        (key, prefix): own
        for key, part in chosen.items()
        for prefix in PREFIXES
        if (own := {k.removeprefix(prefix): v for k, v in part.items() if str(k).startswith(prefix)}).keys() == names
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ValueError(
            f"{printable(path)} holds several sets of weights that fit the model, under "
            f"{', '.join(repr(key) for key, _ in fitting)}. Expected one. Choose it: entry='...', or --entry."
        )
    tensors = {key: part for key, part in chosen.items() if any(isinstance(v, torch.Tensor) for v in part.values())}
    held = max(tensors.values(), key=lambda part: len(set(part) & names), default={})
    missing, more = sorted(names - set(held))[:LISTED], sorted(map(str, set(held) - names))[:LISTED]
    raise ValueError(
        f"{printable(path)} does not hold the weights of the model: it lacks {missing or 'none'} and has "
        f"{more or 'none'} beyond them (the first of each). Expected those of model.state_dict(), all and no others."
    )


def _dtype(name: str) -> torch.dtype:
    """A type by its name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}. Expected a float type of PyTorch, such as 'float32' or 'bfloat16'.")
    return found
