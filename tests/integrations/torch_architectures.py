"""Small models of Hugging Face with random weights, and for each a batch of which it makes a loss of its own."""

from __future__ import annotations

import torch
import transformers as T

VOCABULARY, SAMPLES, TOKENS = 20, 3, 6
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
AUDIO = {
    "vocab_size": 6, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
    "classifier_proj_size": 8,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "pad_token_id": 0}


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def whole_numbers(below, *shape):
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(4))


IDS, IMAGES = whole_numbers(VOCABULARY, SAMPLES, TOKENS), drawn(SAMPLES, 3, 16, 16)
PADDED = IDS.clone()
PADDED[0, 4:] = -100
CLASSES = torch.arange(SAMPLES) % 2


def text(labels=PADDED, **more):
    return {"input_ids": IDS, "labels": labels, **more}


def encoder_decoder():
    config = T.EncoderDecoderConfig.from_encoder_decoder_configs(T.BertConfig(**ENCODER), T.BertConfig(**ENCODER))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return T.EncoderDecoderModel(config), text()


def vision_encoder_decoder():
    config = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(T.ViTConfig(**VISION), T.GPT2Config(**GPT2))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return T.VisionEncoderDecoderModel(config), {"pixel_values": IMAGES, "labels": PADDED}


def segformer():
    config = T.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[4, 8], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    labels = whole_numbers(3, SAMPLES, 16, 16)
    labels[:, :5] = 255
    return T.SegformerForSemanticSegmentation(config), {"pixel_values": IMAGES, "labels": labels}


def clip():
    config = T.CLIPConfig(
        text_config={**ENCODER, "eos_token_id": 2}, vision_config={**VISION, "projection_dim": 8}, projection_dim=8
    )
    return T.CLIPModel(config), {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True}


def masked_autoencoder():
    sizes = {"decoder_hidden_size": 8, "decoder_intermediate_size": 8}
    config = T.ViTMAEConfig(
        **VISION, **sizes, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, mask_ratio=0.5
    )
    return T.ViTMAEForPreTraining(config), {"pixel_values": IMAGES}


def masked_image():
    mask = torch.zeros(SAMPLES, 4, dtype=torch.bool)
    mask[:, :2] = True
    model = T.ViTForMaskedImageModeling(T.ViTConfig(**VISION, encoder_stride=8))
    return model, {"pixel_values": IMAGES, "bool_masked_pos": mask}


def questions(kind, config):
    return kind(config), {
        "input_ids": IDS, "start_positions": torch.tensor([0, 1, 0]), "end_positions": torch.tensor([2, 9, 2])
    }  # fmt: skip


def bert(kind, batch, **more):
    return kind(T.BertConfig(**ENCODER, **more)), batch


def causal(name, **more):
    config = getattr(T, f"{name}Config")(**{**DECODER, **more})
    return getattr(T, f"{name}ForCausalLM")(config), text()


def sounds(kind, labels, **more):
    return kind(T.Wav2Vec2Config(**AUDIO, **more)), {"input_values": drawn(SAMPLES, 200), "labels": labels}


def adapted(config):
    import peft

    model = T.LlamaForCausalLM(T.LlamaConfig(**DECODER))
    model = peft.get_peft_model(model, config(peft))
    with torch.no_grad():  # adapters begin at zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model, text()


TASK = {"task_type": "CAUSAL_LM"}
QUERIES = {**TASK, "r": 2, "target_modules": ["q_proj", "v_proj"]}
T5 = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
DECIMAL = torch.linspace(0, 1, SAMPLES)
SEVERAL = drawn(SAMPLES, 3).gt(0).float()
TWO = text(CLASSES)
ARCHITECTURES = {
    "GPT-2": lambda: (T.GPT2LMHeadModel(T.GPT2Config(**GPT2)), text()),
    "GPT-Neo": lambda: (
        T.GPTNeoForCausalLM(T.GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
            max_position_embeddings=32, intermediate_size=8,
        )), text()
    ),
    "GPT-NeoX": lambda: causal("GPTNeoX"),
    "Llama": lambda: causal("Llama"),
    "Llama, tied": lambda: causal("Llama", tie_word_embeddings=True),
    "Mistral": lambda: causal("Mistral", head_dim=4),
    "Qwen2": lambda: causal("Qwen2"),
    "Qwen3": lambda: causal("Qwen3", head_dim=4),
    "Gemma": lambda: causal("Gemma", head_dim=4),
    "Gemma2": lambda: causal("Gemma2", head_dim=4),
    "Phi3": lambda: causal("Phi3"),
    "Mixtral": lambda: causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Falcon": lambda: causal("Falcon"),
    "OPT": lambda: causal("OPT", ffn_dim=8, word_embed_proj_dim=8),
    "Bloom": lambda: causal("Bloom", n_layer=1, n_head=2),
    "Mamba": lambda: (
        T.MambaForCausalLM(T.MambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=4, num_hidden_layers=1)),
        text(),
    ),
    "BART, causal": lambda: (T.BartForCausalLM(T.BartConfig(**BART)), text()),
    "BERT, causal": lambda: bert(T.BertLMHeadModel, text(), is_decoder=True),
    "BERT, masked": lambda: bert(T.BertForMaskedLM, text()),
    "RoBERTa, masked": lambda: (
        T.RobertaForMaskedLM(T.RobertaConfig(**{**ENCODER, "pad_token_id": 1, "max_position_embeddings": 40})), text()
    ),
    "DistilBERT, masked": lambda: (
        T.DistilBertForMaskedLM(T.DistilBertConfig(vocab_size=VOCABULARY, dim=8, n_layers=1, n_heads=2, hidden_dim=8)),
        text(),
    ),
    "ELECTRA, tokens": lambda: (
        T.ElectraForTokenClassification(T.ElectraConfig(**ENCODER, embedding_size=8)), text(PADDED.clamp(max=1))
    ),
    "BERT, tokens": lambda: bert(T.BertForTokenClassification, text(PADDED.clamp(max=1))),
    "BERT, sequences": lambda: bert(T.BertForSequenceClassification, TWO),
    "BERT, regression": lambda: bert(T.BertForSequenceClassification, text(DECIMAL), num_labels=1),
    "BERT, several labels": lambda: bert(
        T.BertForSequenceClassification, text(SEVERAL), num_labels=3, problem_type="multi_label_classification"
    ),
    "GPT-2, sequences": lambda: (T.GPT2ForSequenceClassification(T.GPT2Config(**GPT2, num_labels=2)), TWO),
    "BERT, next sentence": lambda: bert(T.BertForNextSentencePrediction, TWO),
    "BERT, choices": lambda: bert(
        T.BertForMultipleChoice, {"input_ids": IDS[:, None].repeat(1, 2, 1), "labels": CLASSES}
    ),
    "BERT, questions": lambda: questions(T.BertForQuestionAnswering, T.BertConfig(**ENCODER)),
    "RoBERTa, questions": lambda: questions(
        T.RobertaForQuestionAnswering, T.RobertaConfig(**{**ENCODER, "pad_token_id": 1, "max_position_embeddings": 40})
    ),
    "BERT to BERT": encoder_decoder,
    "ViT to GPT-2": vision_encoder_decoder,
    "T5": lambda: (T.T5ForConditionalGeneration(T.T5Config(**T5, decoder_start_token_id=0)), text()),
    "BART": lambda: (T.BartForConditionalGeneration(T.BartConfig(**BART)), text()),
    "Marian": lambda: (T.MarianMTModel(T.MarianConfig(**BART)), text()),
    "Pegasus": lambda: (T.PegasusForConditionalGeneration(T.PegasusConfig(**BART)), text()),
    "ViT": lambda: (
        T.ViTForImageClassification(T.ViTConfig(**VISION)), {"pixel_values": IMAGES, "labels": CLASSES}
    ),
    "DeiT": lambda: (
        T.DeiTForImageClassification(T.DeiTConfig(**VISION)), {"pixel_values": IMAGES, "labels": CLASSES}
    ),
    "ResNet": lambda: (
        T.ResNetForImageClassification(T.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])),
        {"pixel_values": IMAGES, "labels": CLASSES},
    ),
    "Segformer": segformer,
    "ViT, masked images": masked_image,
    "ViTMAE": masked_autoencoder,
    "CLIP": clip,
    "wav2vec 2.0, CTC": lambda: sounds(T.Wav2Vec2ForCTC, whole_numbers(6, SAMPLES, 3), ctc_loss_reduction="mean"),
    "wav2vec 2.0, CTC summed": lambda: sounds(T.Wav2Vec2ForCTC, whole_numbers(6, SAMPLES, 3)),
    "wav2vec 2.0, sounds": lambda: sounds(T.Wav2Vec2ForSequenceClassification, CLASSES),
    "HuBERT, CTC": lambda: (
        T.HubertForCTC(T.HubertConfig(**AUDIO, ctc_loss_reduction="mean")),
        {"input_values": drawn(SAMPLES, 200), "labels": whole_numbers(6, SAMPLES, 3)},
    ),
    "LoRA": lambda: adapted(lambda peft: peft.LoraConfig(**QUERIES)),
    "DoRA": lambda: adapted(lambda peft: peft.LoraConfig(**QUERIES, use_dora=True)),
    "prompt tuning": lambda: adapted(lambda peft: peft.PromptTuningConfig(**TASK, num_virtual_tokens=2)),
    "prefix tuning": lambda: adapted(lambda peft: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=2)),
}  # fmt: skip
