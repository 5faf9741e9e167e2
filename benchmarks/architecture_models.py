"""Architectures that people use, in small configurations with random weights, each with a batch.

Eight sequences of 64 tokens, or 8 to 16 images; dropout is off. Models of transformers, timm, torchvision and peft, and
plain modules: a perceptron, a CNN with batch normalisation and a U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LENGTH, SAMPLES, CLASSES = 2000, 144, 64, 8, 10
Problem = tuple[nn.Module, Any]
"""(model, batch): a dictionary with labels, or (inputs, targets) with a cross-entropy."""
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 64, "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip


class Doubled(nn.Sequential):
    """Two convolutions with batch normalisation."""

    def __init__(self, before: int, after: int) -> None:
        first, second = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        super().__init__(first, nn.BatchNorm2d(after), nn.ReLU(), second, nn.BatchNorm2d(after), nn.ReLU())


class UNet(nn.Module):
    """Three levels, joined by channels; two classes for each pixel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            Doubled(3, width),
            Doubled(width, 2 * width),
            Doubled(2 * width, 4 * width),
        )
        self.up, self.upper = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.back, self.last = Doubled(4 * width, 2 * width), Doubled(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        back = self.back(torch.cat([second, self.up(third)], 1))
        return self.head(self.last(torch.cat([first, self.upper(back)], 1)))


def text(model: str, config: str, task: str = "", **sizes: Any) -> Problem:
    """A model of transformers that predicts the next token, or with task="classes" one of three classes."""
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    labels = torch.arange(SAMPLES) % 3 if task == "classes" else ids
    return made, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pixels(model: str, config: str, samples: int = 16, **sizes: Any) -> Problem:
    """An image classifier of transformers."""
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return made, {"pixel_values": torch.randn(samples, 3, 64, 64), "labels": torch.arange(samples) % CLASSES}


def classifier(model: nn.Module, samples: int, side: int = 64) -> Problem:
    """An image classifier of another library."""
    return model, (torch.randn(samples, 3, side, side), torch.arange(samples) % CLASSES)


def timm(name: str, samples: int = 16, **sizes: Any) -> Problem:
    """A classifier of timm."""
    import timm

    return classifier(timm.create_model(name, num_classes=CLASSES, **sizes), samples)


def adapted(dora: bool) -> Problem:
    """Llama with low-rank adapters on all linear maps."""
    import peft

    model, batch = text("LlamaForCausalLM", "LlamaConfig", **DECODER)
    settings = peft.LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear", use_dora=dora)
    return peft.get_peft_model(model, settings), batch


def seq2seq(model: str, config: str, **sizes: Any) -> Problem:
    """An encoder and a decoder of text."""
    made, batch = text(model, config, **sizes)
    return made, {"input_ids": batch["input_ids"], "labels": batch["labels"][:, :48].contiguous()}


def whisper() -> Problem:
    """Text from spectrograms."""
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 288, "decoder_ffn_dim": 288}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"num_mel_bins": 20, "max_source_positions": 100, "max_target_positions": 64, "dropout": 0.0}
    layers = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2}
    model, batch = text("WhisperForConditionalGeneration", "WhisperConfig", **layers, **sizes, **lengths, **special)
    return model, {"input_features": torch.randn(SAMPLES, 20, 200), "labels": batch["labels"][:, :48].contiguous()}


def densenet() -> Problem:
    """Of torchvision."""
    import torchvision

    return classifier(torchvision.models.DenseNet(12, (4, 4, 4, 4), 24, num_classes=CLASSES), 16)


def mixer() -> Problem:
    """Of timm, four blocks."""
    from timm.models.mlp_mixer import MlpMixer

    return classifier(MlpMixer(num_classes=CLASSES, img_size=64, patch_size=8, num_blocks=4, embed_dim=192), 16)


def unet() -> Problem:
    """Two classes for each of 64x64 pixels."""
    return UNet(), (torch.randn(8, 3, 64, 64), torch.randint(2, (8, 64, 64)))


def perceptron() -> Problem:
    """784-512-512-10."""
    layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    return nn.Sequential(*layers), (torch.randn(128, 784), torch.arange(128) % CLASSES)


def small_cnn() -> Problem:
    """Two convolutions with batch normalisation on 16x16 images, 64 of them."""
    first = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return classifier(nn.Sequential(*first, *second, nn.Linear(32, CLASSES)), 64, 16)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
HEADS = {**DECODER, "head_dim": 36}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DISTANCES = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32}
SWIN = {"embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "patch_size": 4,
        "num_labels": CLASSES}  # fmt: skip
TIMM_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4)}
TIMM_VIT = {"img_size": 64, "patch_size": 8, "depth": 4}
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 36, "d_ff": 288, "num_layers": 2, "num_heads": 4,
      "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 96, "state_size": 8, "num_hidden_layers": 2}


def mamba() -> Problem:
    """Without its kernels, which are for GPUs; sequences of 32 tokens."""
    model, batch = text("MambaForCausalLM", "MambaConfig", **MAMBA)
    return model, {name: batch[name][:, :32].contiguous() for name in ("input_ids", "labels")}


def swin(**more: Any) -> Problem:
    """Of transformers."""
    return pixels("SwinForImageClassification", "SwinConfig", **{"drop_path_rate": 0.0, **SWIN, **more})


def checkpointed() -> Problem:
    """GPT-2 that computes the activations of its blocks again in the backward pass."""
    model, batch = text("GPT2LMHeadModel", "GPT2Config", **GPT2)
    model.gradient_checkpointing_enable()
    return model, batch


ARCHITECTURES: dict[str, Callable[[], Problem]] = {
    "perceptron": perceptron,
    "small CNN, batch norm": small_cnn,
    "GPT-2": lambda: text("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "GPT-2, checkpointed": checkpointed,
    "Llama": lambda: text("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "Llama, LoRA": lambda: adapted(dora=False),
    "Llama, DoRA": lambda: adapted(dora=True),
    "Qwen3": lambda: text("Qwen3ForCausalLM", "Qwen3Config", **HEADS),
    "Gemma": lambda: text("GemmaForCausalLM", "GemmaConfig", **HEADS),
    "Gemma 3": lambda: text("Gemma3ForCausalLM", "Gemma3TextConfig", **HEADS),
    "Mixtral": lambda: text("MixtralForCausalLM", "MixtralConfig", **DECODER, **EXPERTS),
    "GPT-OSS": lambda: text("GptOssForCausalLM", "GptOssConfig", **HEADS, **EXPERTS),
    "Mamba": mamba,
    "BERT": lambda: text("BertForSequenceClassification", "BertConfig", "classes", **TEXT, **NO_DROPOUT),
    "DeBERTa": lambda: text(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", "classes", **TEXT, **NO_DROPOUT, **DISTANCES
    ),
    "T5": lambda: seq2seq("T5ForConditionalGeneration", "T5Config", **T5),
    "Whisper": whisper,
    "ViT": lambda: pixels("ViTForImageClassification", "ViTConfig", **IMAGES),
    "DINOv2, registers": lambda: pixels(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=2, **IMAGES
    ),
    "Swin": swin,
    "Swin, stochastic depth": lambda: swin(drop_path_rate=0.2),
    "timm ViT": lambda: timm("vit_tiny_patch16_224", **TIMM_VIT),
    "timm Swin": lambda: timm("swin_tiny_patch4_window7_224", drop_path_rate=0.0, **TIMM_SWIN),
    "ResNet-18": lambda: timm("resnet18"),
    "ConvNeXt": lambda: timm("convnext_atto", samples=8),
    "ConvNeXt, stochastic depth": lambda: timm("convnext_atto", samples=8, drop_path_rate=0.2),
    "EfficientNet": lambda: timm("efficientnet_b0", samples=8, drop_rate=0.0),
    "DenseNet": densenet,
    "mixer": mixer,
    "U-Net": unet,
}


def made(name: str) -> Problem:
    """The same network and batch each time, in training mode."""
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    return model.train(), batch


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a training step."""
    return model(**batch).loss if isinstance(batch, dict) else F.cross_entropy(model(batch[0]), batch[1])
