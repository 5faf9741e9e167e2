"""Hugging Face models that are measured before their first forward pass, which installs hooks and flags."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import lnp
from integrations.torch_state import identities, same
from lnp_torch.transformers import attach

SMALL = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS = 3


def tokens():
    x = torch.randint(1, 13, (6,))
    return {"input_ids": x, "labels": x}


def picture():
    return {"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(0, 3, (32, 32))}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1)
    config.output_hidden_states = True
    return transformers.LlamaForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4, output_router_logits=True)
    return transformers.MixtralForCausalLM(config)


def segformer():
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=3, **sizes))


def llava():
    text = transformers.LlamaConfig(**{**SMALL, "vocab_size": 20, "num_hidden_layers": 1})
    vision = {name: SMALL[name] for name in SMALL if name != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**vision), image_token_id=19, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config)


def picture_and_tokens():
    x = torch.randint(0, 18, (8,))
    x[1:5] = 19
    return {"input_ids": x, "pixel_values": torch.randn(3, 16, 16), "labels": x.clone()}


MODELS = {
    "llama": (llama, tokens),
    "mixtral": (mixtral, tokens),
    "segformer": (segformer, picture),
    "llava": (llava, picture_and_tokens),
}


def made(name):
    torch.manual_seed(0)
    build, draw = MODELS[name]
    return build(), [draw() for _ in range(4 * STEPS)]


def looped(name, way):
    """What is there after some steps of a loop."""
    model, data = made(name)
    before, optimizer = identities(model), torch.optim.AdamW(model.parameters(), 0.01)
    tracker, losses = lnp.Tracker(schedule=1, rtol=0.5, on_error="raise"), []
    for step in range(STEPS):
        rows = data[4 * step : 4 * step + 4]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        optimizer.zero_grad()
        if way == "observe":
            tracker.observe(step, model, batch)
        if way == "shared":
            with tracker.shared(step, model) as shared:
                loss = model(**batch).loss
            shared.backward(loss)
        else:
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert identities(model) == before
    return losses, model, torch.get_rng_state()


@pytest.mark.parametrize("way", ["observe", "shared"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loop(name, way):
    for found, expected in zip(looped(name, way), looped(name, "plain"), strict=True):
        assert same(found, expected)


def trained(name, watch, folder, checkpointing):
    """What is there after a Trainer has trained."""
    model, data = made(name)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    settings = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data)
    tracker = attach(trainer, None, 1, rtol=0.5, log=False, on_error="raise") if watch else None
    trainer.train()
    assert tracker is None or len(tracker.history) == STEPS
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return [p.detach() for p in model.parameters()], hooks, torch.get_rng_state()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_trainer(name, checkpointing, tmp_path):
    runs = [trained(name, watch, tmp_path, checkpointing) for watch in (True, False)]
    assert same(*runs)
