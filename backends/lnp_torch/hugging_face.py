"""Hugging Face's folders: models, adapters and tokenizers, from the disk alone and without code of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lnp.optional import import_optional
from lnp.printable import printable

LARGEST_JSON = 1 << 26
"""Bytes of a configuration beyond which it is none."""
PLAIN = {"local_files_only": True, "trust_remote_code": False}
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files of which a tokenizer has one."""
LISTED = 3
"""Names that an error lists."""


class TransformersReader:
    """Reads folders as `save_pretrained` writes them.

    Parameters
    ----------
    base:
        Makes the model that adapters belong to. Default: the one that their configuration names, if it is on the disk.
    """

    def __init__(self, base: Callable[[], torch.nn.Module] | None) -> None:
        self._base = base

    def load(self, path: Path) -> torch.nn.Module:
        """The model of a folder, with a ValueError for one that lacks weights, or that would have to run code."""
        if not path.is_dir():
            raise FileNotFoundError(f"{printable(path)} is no folder. Expected a checkpoint of Hugging Face.")
        return self._adapted(path) if (path / "adapter_config.json").exists() else _pretrained(str(path), path)

    def trainer_state(self, path: Path) -> Mapping[str, Any]:
        """What the Trainer has written beside the model; nothing where it did not."""
        try:
            return _json(path / "trainer_state.json")
        except (OSError, ValueError):
            return {}

    def tokenizer(self, path: Path) -> Any:
        """The tokenizer in the folder of a checkpoint."""
        transformers = _transformers()
        try:
            if not any((path / name).is_file() for name in VOCABULARIES):
                raise FileNotFoundError("no vocabulary")  # transformers would make a tokenizer that knows no words
            return transformers.AutoTokenizer.from_pretrained(path, **PLAIN)
        except Exception as error:
            raise ValueError(
                f"{printable(path)} holds no tokenizer that can be read ({type(error).__name__}). Expected the one "
                "that the model was trained with. Pass --tokenizer FOLDER, or tokens: --tokens FILE.npy."
            ) from error

    def quiet(self) -> None:
        """Keep transformers from showing a progress bar and a table of its own for each model, in this process."""
        messages = _transformers().utils.logging
        messages.disable_progress_bar()
        messages.set_verbosity_error()

    def check_language_model(self, path: Path) -> None:
        """A ValueError unless the model predicts each token from those before, with its inputs as labels."""
        if (path / "adapter_config.json").exists():
            kind, known = _json(path / "adapter_config.json").get("task_type"), ["CAUSAL_LM"]
        else:
            kind = (_json(path / "config.json").get("architectures") or [None])[0]
            auto = _transformers().models.auto.modeling_auto
            known = list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        if kind not in known:
            raise ValueError(
                f"{printable(path)} is a {printable(str(kind))}, and received text or tokens. Expected a causal "
                "language model, whose labels are its inputs. Make the batches yourself: --batches mine.py:batches."
            )

    def _adapted(self, path: Path) -> torch.nn.Module:
        """The base model with an adapter on it, whose weights are what is trained."""
        peft = import_optional("peft", "Measuring adapters")
        config = _json(path / "adapter_config.json")
        _require_safetensors(path, "adapter_model")
        if config.get("megatron_config") is not None:
            raise ValueError(f"{printable(path)} names a module to import. Expected an adapter that runs no code.")
        name = str(config.get("base_model_name_or_path"))
        base = self._base() if self._base is not None else _base(name, path)
        model = peft.PeftModel.from_pretrained(base, path, is_trainable=True, local_files_only=True)
        from safetensors import safe_open

        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            held = set(file.keys())
        needed = set(peft.get_peft_model_state_dict(model))
        _complete(path, needed - held, held - needed)
        return model


def _pretrained(name: str, path: Path) -> torch.nn.Module:
    """The model of a folder or of a name in the hub's cache, all of whose weights were there."""
    transformers = _transformers()
    if Path(name).is_dir():
        _require_safetensors(Path(name), "model")
        _check_config(_json(Path(name) / "config.json"), name)
    config = transformers.AutoConfig.from_pretrained(name, **PLAIN)
    kinds = config.architectures or []
    kind: Any = getattr(transformers, kinds[0], None) if kinds else None
    if not issubclass(kind if isinstance(kind, type) else object, transformers.PreTrainedModel):
        raise ValueError(
            f"{printable(path)} is of the architecture {kinds[:1]}, which transformers does not have. Expected one "
            "of its own: code that a checkpoint brings along is not run. Load it yourself in Python."
        )
    # what does not fit is told by one sentence below; transformers prints a table, and its error points to it
    model, found = kind.from_pretrained(
        name, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **PLAIN
    )
    if found.get("mismatched_keys") or found.get("error_msgs"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found.get("mismatched_keys", ()))
        raise ValueError(
            f"{printable(path)} holds weights of other shapes than its configuration says ({names[:LISTED]}). Expected "
            "weights and config.json of one model."
        )
    _complete(path, set(found["missing_keys"]), set(found["unexpected_keys"]))
    return model


def _base(name: str, path: Path) -> Any:
    """The base model of an adapter, from the disk."""
    try:
        _transformers().AutoConfig.from_pretrained(name, **PLAIN)
    except OSError as error:
        raise ValueError(
            f"{printable(path)} belongs to the base model {printable(name)!r}, which is not on this disk. Expected a "
            "folder, or a model in the hub's cache. Download it, or pass model=, a function that makes the base."
        ) from error
    return _pretrained(name, path)


def _complete(path: Path, missing: set[str], more: set[str]) -> None:
    """Refuse a checkpoint that lacks weights, which would be random numbers, or has others."""
    if missing or more:
        raise ValueError(
            f"{printable(path)} does not hold the weights of its model: it lacks {sorted(missing)[:LISTED] or 'none'} "
            f"and has {sorted(more)[:LISTED] or 'none'} beyond them (the first of each). Expected all, and no others."
        )


def _require_safetensors(path: Path, stem: str) -> None:
    """Refuse a folder whose weights are in a pickle."""
    if not any((path / f"{stem}.safetensors{more}").is_file() for more in ("", ".index.json")):
        raise ValueError(
            f"{printable(path)} holds no {stem}.safetensors. Expected it: pickles (.bin) can run code, and are not "
            "read. Convert them once with model.save_pretrained(folder)."
        )


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a configuration that names code to be fetched: kernels are given as repository names."""
    named = [key for key, value in config.items() if key.endswith("implementation") and "/" in str(value)]
    if named:
        raise ValueError(f"{printable(name)} names code to be fetched, in {named}. Expected a model that runs none.")


def _json(path: Path) -> Mapping[str, Any]:
    """A dictionary from a file of JSON."""
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{printable(path)} has {path.stat().st_size:,} bytes. Expected a small file of JSON.")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{printable(path)} holds a {type(found).__name__}. Expected a dictionary.")
    return found


def _transformers() -> Any:
    """The library."""
    return import_optional("transformers", "Measuring Hugging Face checkpoints")
