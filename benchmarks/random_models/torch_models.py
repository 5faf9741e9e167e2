"""PyTorch: tiny configurations of Hugging Face's architectures, torchvision's and timm's smallest networks.

LNP_TEST_DEVICE=cuda measures them on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from compared import NotBuilt, verdict
from norms import Norms
from torch import nn

import lnp
from lnp.contract.options import Options
from lnp.contract.registry import evaluate

DEVICE = os.environ.get("LNP_TEST_DEVICE", "cpu")
SAMPLES, LENGTH, VOCABULARY, CLASSES = 4, 8, 40, 3
MOST_PARAMETERS = 3_000_000
SMALL = {
    r"(hidden|embedding|embed|projection|decoder_hidden|attention_hidden|emb)(_size|_dim|_dims)?$": 32,
    r"d_model|n_embd|dim$|n_embed": 32,
    r"(intermediate|ffn|ff|inner|mlp|expert).*(size|dim)$|d_ff|n_inner": 48,
    r"num.*(hidden|encoder|decoder)?_?layers$|n_layers?$|.*_layers$|depth$": 2,
    r"num.*(attention|key_value|kv)?_heads$|n_heads?$|.*_attention_heads$": 2,
    r"head_dim$|d_kv|qk_nope_head_dim|v_head_dim|kv_channels": 16,
    r"vocab_size|.*_vocab_size$": VOCABULARY,
    r"max_position.*|n_positions|max_source_positions|max_target_positions": 64,
    r"num_(local_)?experts$|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_topk|moe_top_k|topk_group|n_group|moe_k": 2,
    r"image_size": 32,
    r"patch_size$": 8,
    r"num_labels": CLASSES,
    r".*(pad|bos|eos|decoder_start|cls|sep|mask)_token_id$": 0,
}
"""Attributes of configurations, as regular expressions, and what makes a model tiny."""
TASKS = {
    "CAUSAL_LM": "tokens", "MASKED_LM": "tokens", "SEQ_TO_SEQ_CAUSAL_LM": "tokens",
    "SEQUENCE_CLASSIFICATION": "class", "TOKEN_CLASSIFICATION": "each", "QUESTION_ANSWERING": "span",
    "MULTIPLE_CHOICE": "choice", "IMAGE_CLASSIFICATION": "image", "AUDIO_CLASSIFICATION": "audio",
    "SEMANTIC_SEGMENTATION": "map",
}  # fmt: skip
"""Hugging Face's tasks, and which batch they learn from."""
VISION = (
    "resnet18 resnet50 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 regnet_y_400mf "
    "regnet_x_400mf efficientnet_b0 googlenet densenet121 alexnet convnext_tiny swin_t vit_b_16 inception_v3"
)
TIMM = r"(atto|femto|pico|nano|tiny|mini|small|_xxs|_xs|_s$|18|26|050|035|lite|b0|mobile|ghost|tf_mixnet|res2net50)"


def versions() -> dict[str, str]:
    """{library: release} of what is installed."""
    found = {}
    for name in ("torch", "transformers", "torchvision", "timm"):
        with contextlib.suppress(Exception):
            found[name] = importlib.import_module(name).__version__
    return found


VERSIONS = versions()


def drawn(seed: int, only: str) -> Iterator[tuple[str, Callable[[], tuple[str, str]]]]:
    """(name, its comparison), sources in turn until all are exhausted."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.backends.cudnn.allow_tf32 = False  # three digits are too few to compare
    rng = random.Random(seed)
    sources = {"transformers": hugging_face, "torchvision": vision, "timm": timm}
    chosen = [source(rng) for name, source in sources.items() if only in name and name in VERSIONS]
    while chosen:
        for source in list(chosen):
            name, build = next(source, ("", None))
            if build is None:
                chosen.remove(source)
            else:
                yield name, partial(compared, build, rng.randrange(2**31))


def hugging_face(rng: random.Random) -> Iterator[tuple[str, Callable]]:
    """Architectures with random small settings and random weights."""
    from transformers.models.auto import modeling_auto

    left = {task: sorted(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items()) for task in TASKS}
    while any(left.values()):  # none comes twice
        task = rng.choice([task for task, models in left.items() if models])
        kind, name = left[task].pop(rng.randrange(len(left[task])))
        name = name if isinstance(name, str) else name[0]
        training = rng.random() < 0.5
        yield (
            f"{name}, {'training' if training else 'eval'}",
            lambda k=kind, n=name, t=TASKS[task], m=training: hugging_face_model(k, n, t, m),
        )


def hugging_face_model(kind: str, name: str, task: str, training: bool) -> tuple[nn.Module, Any]:
    """(model, batch), a dictionary from which the model computes its own loss."""
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    shrink(config)
    with contextlib.suppress(Exception):
        config.num_labels = 2 if task == "span" else CLASSES  # where an answer begins, and where it ends
    most = 30_000_000 if task in ("image", "map") else MOST_PARAMETERS
    model = limited(lambda: getattr(transformers, name)(config), most)
    return without_dropout(model).train(training), hugging_face_batch(task, config)


def shrink(config: Any, depth: int = 0) -> None:
    """Make a configuration, and those inside it, tiny and without dropout."""
    for attribute, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, depth + 1)
        elif isinstance(value, float) and re.search("drop|layerdrop|mask_time_prob|mask_feature_prob", attribute):
            setattr(config, attribute, 0.0)
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, small in SMALL.items():
                if re.fullmatch(pattern, attribute) and (value > small or "token_id" in attribute):
                    setattr(config, attribute, small)
                    break
    with contextlib.suppress(Exception):
        config.use_cache = False


def hugging_face_batch(task: str, config: Any) -> dict[str, torch.Tensor]:
    """What a model of the task learns from."""
    tokens = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    pixels = {"pixel_values": torch.randn(SAMPLES, getattr(config, "num_channels", 3), 32, 32)}
    label = torch.arange(SAMPLES) % CLASSES
    if task == "tokens":
        return {"input_ids": tokens, "labels": tokens.clone()}
    if task == "span":
        ends = {"start_positions": torch.arange(SAMPLES) % 4, "end_positions": torch.arange(SAMPLES) % 4 + 2}
        return {"input_ids": tokens, **ends}
    if task == "choice":
        return {"input_ids": torch.randint(3, VOCABULARY, (SAMPLES, 2, LENGTH)), "labels": label % 2}
    if task == "audio":
        return {"input_values": torch.randn(SAMPLES, 2000), "labels": label}
    if task == "each":
        return {"input_ids": tokens, "labels": tokens % CLASSES}
    if task == "map":
        return {**pixels, "labels": torch.randint(0, CLASSES, (SAMPLES, 32, 32))}
    return {**(pixels if task == "image" else {"input_ids": tokens}), "labels": label}


def vision(rng: random.Random) -> Iterator[tuple[str, Callable]]:
    """torchvision's smaller networks, in training mode and evaluated."""
    import torchvision

    for name in sorted(VISION.split(), key=lambda _: rng.random()):
        training = rng.random() < 0.5
        size = 80 if "inception" in name else 64
        make = getattr(torchvision.models, name)
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        extra |= {"image_size": 64} if name == "vit_b_16" else {}
        yield (
            f"torchvision {name}, {'training' if training else 'eval'}",
            lambda m=make, e=extra, s=size, t=training: (
                without_dropout(limited(lambda: m(num_classes=CLASSES, **e), 30_000_000)).train(t),
                (torch.randn(SAMPLES, 3, s, s), torch.arange(SAMPLES) % CLASSES),
            ),
        )


def timm(rng: random.Random) -> Iterator[tuple[str, Callable]]:
    """timm's smaller networks, in training mode and evaluated."""
    import timm as library

    names = sorted(name for name in library.list_models() if re.search(TIMM, name))
    for name in rng.sample(names, len(names)):
        training = rng.random() < 0.5
        yield f"timm {name}, {'training' if training else 'eval'}", lambda n=name, t=training: timm_model(n, t)


def timm_model(name: str, training: bool) -> tuple[nn.Module, Any]:
    """(model, batch)."""
    import timm as library

    try:
        model = limited(lambda: library.create_model(name, num_classes=CLASSES, img_size=64), 30_000_000)
    except NotBuilt:
        model = limited(lambda: library.create_model(name, num_classes=CLASSES), 30_000_000)
    size = model.default_cfg["input_size"][-1] if model.default_cfg.get("fixed_input_size") else 64
    x = torch.randn(SAMPLES, model.default_cfg["input_size"][0], size, size)
    return without_dropout(model).train(training), (x, torch.arange(SAMPLES) % CLASSES)


def limited(make: Callable[[], nn.Module], most: int = MOST_PARAMETERS) -> nn.Module:
    """The model, unless it cannot be made or is large."""
    try:
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
            large = sum(p.numel() for p in make().parameters()) > most
    except Exception:
        large = False  # some cannot be made without memory
    if large:
        raise NotBuilt("too large")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return make()
    except Exception as error:
        raise NotBuilt(str(error)) from error


def without_dropout(model: nn.Module) -> nn.Module:
    """With all probabilities of dropout at zero."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_rate"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def compared(build: Callable, seed: int) -> tuple[str, str]:
    """Build, measure, compare."""
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        model, batch = build()
        model = model.to(DEVICE)
        batch = moved(batch)
        rate = plain_step(model, batch)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(str(error)) from error
    if rate == 0:
        raise NotBuilt("nothing is learnt")
    found, said = held_against(model, batch, rate)
    if found != "wrong" or "was changed" in said:
        return found, said
    model, batch = (
        model.double(),
        in_float64(batch),
    )  # plain PyTorch's own batch may differ from its samples by rounding
    found, after = held_against(model, batch, plain_step(model, batch))
    return found, f"in float64 ({said[:120]} in float32); {after}" if found != "wrong" else said


def held_against(model: nn.Module, batch: Any, rate: float) -> tuple[str, str]:
    """Measure a model and compare, with its rate and its single samples."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        d = lnp.decompose(model, batch, max_probes=2)
        measured = d
        if any("keeps this batch's statistics" in note for note in d.notes):  # the plain step has them in its gradient
            measured = lnp.decompose(model, batch, max_probes=2, batch_statistics="coupled")
        record = evaluate(Norms(), model, (batch,), Options())
    except (ValueError, TypeError) as error:
        return "refused", str(error)[:200]
    for name, value in model.state_dict().items():
        if not torch.equal(value, before[name]):
            return "wrong", f"{name} was changed"
    pairs = {"rate": ([measured.rate], [rate])}
    if record["norms"]:
        pairs |= norms_alone(model, batch, record)
    return verdict(pairs, d.notes)


def in_float64(batch: Any) -> Any:
    """The batch with its floating-point arrays in float64."""
    arrays = batch.values() if isinstance(batch, dict) else batch
    wide = [array.double() if array.is_floating_point() else array for array in arrays]
    return dict(zip(batch, wide, strict=True)) if isinstance(batch, dict) else tuple(wide)


def moved(batch: Any) -> Any:
    """The batch on the device."""
    if isinstance(batch, dict):
        return {name: array.to(DEVICE) for name, array in batch.items()}
    return tuple(array.to(DEVICE) for array in batch)


def plain_step(model: nn.Module, batch: Any) -> float:
    """||grad L||^2 of the plain training step, after which the model's buffers are what they were."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    if isinstance(batch, dict):
        loss = model(**batch).loss
    else:
        logits = model(batch[0])
        if not isinstance(logits, torch.Tensor):  # auxiliary heads: what is trained on is for the user to say
            raise NotBuilt("several outputs")
        loss = nn.functional.cross_entropy(logits, batch[1])
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name in buffers and buffers[name].shape == value.shape:
                value.copy_(buffers[name])
    return float(sum(g.double().square().sum() for g in grads if g is not None))


def norms_alone(model: nn.Module, batch: Any, record: dict[str, Any]) -> dict[str, tuple]:
    """{parameter: (lnp's squared norms, those of each sample run by itself)}. Evaluated as the record was: a batch norm
    in training mode cannot be run on single samples by the plain framework, and is left out.
    """
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        return {}
    if model.training and re.search("BatchNorm", str(model)):
        return {}
    found: dict[str, list] = {name: [] for name in record["norms"]}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name in found if name in parameters]
    cotangents = torch.as_tensor(record["v"], device=DEVICE)
    for n, v in enumerate(cotangents):
        try:
            flat = alone(model, batch, n, len(v))
            grads = torch.autograd.grad(flat, [parameters[name] for name in names], v[None], allow_unused=True)
        except RuntimeError as error:  # caches parts of its graph, for example
            raise NotBuilt(f"single samples do not run in the plain framework: {error}") from error
        for name, grad in zip(names, grads, strict=True):
            found[name].append(0.0 if grad is None else float(grad.double().square().sum()))
    return {name: (record["norms"][name].tolist(), values) for name, values in found.items() if values}


def alone(model: nn.Module, batch: Any, n: int, count: int) -> torch.Tensor:
    """(1, K) outputs of one sample, run by itself."""
    if isinstance(batch, dict):
        return flattened(model(**{name: value[n : n + 1] for name, value in batch.items()}), count)
    return flattened(model(batch[0][n : n + 1]), count)


def flattened(returned: Any, count: int) -> torch.Tensor:
    """(1, K) of the first arrays of one sample's outputs that together have K numbers, as lnp measures them."""
    found = list(returned.values()) if isinstance(returned, dict) else returned
    found = list(found) if isinstance(found, tuple | list) else [found]
    arrays = [a for a in found if isinstance(a, torch.Tensor) and a.is_floating_point() and a.ndim]
    for size in range(1, len(arrays) + 1):
        for some in itertools.combinations(arrays, size):
            if sum(a.numel() for a in some) == count:
                return torch.cat(
                    [a.reshape(1, -1).to(torch.promote_types(a.dtype, torch.float32)) for a in some], dim=1
                )
    raise NotBuilt("outputs that depend on the batch")
