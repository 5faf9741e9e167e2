"""Models that people have, against a dense Jacobian: 1e-5 relative in float32, 1e-10 in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lnp
from integrations.torch_reference import TOLERANCE, VALUES, assert_agrees, dense, with_batch_statistics


@pytest.fixture(params=list(TOLERANCE), ids=["float32", "float64"], autouse=True)
def dtype(request):
    torch.manual_seed(0)
    return request.param


def check(model: nn.Module, x, y, loss, terms: int, dtype, *, apart: bool = True) -> lnp.Decomposition:
    d = lnp.decompose(model, (x, y), estimator="exact")
    reference = with_batch_statistics(model, lambda m: m(x))
    out = reference(x)
    assert_agrees(d, dense(reference, out, loss(out, y), terms), dtype)
    samples, outputs = out.shape[0], out[0].numel()
    assert d.probes == (outputs if apart else samples * outputs), d.notes
    return d


def mlp(dtype):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def test_mlp(dtype):
    x, y = torch.randn(7, 6, dtype=dtype), torch.randint(0, 3, (7,))
    check(mlp(dtype), x, y, F.cross_entropy, 7, dtype)


def test_cnn_with_batch_norm_in_training_mode(dtype):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2),
        nn.GroupNorm(2, 4), nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3),
    ).to(dtype)  # fmt: skip
    x, y = torch.randn(6, 1, 8, 8, dtype=dtype), torch.randint(0, 3, (6,))
    d = check(model, x, y, F.cross_entropy, 6, dtype)
    assert any("batch normalisation" in note for note in d.notes)


class TiedTransformer(nn.Module):
    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(5, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.block(x, src_mask=mask))


def test_transformer_with_tied_head(dtype):
    tokens = torch.randint(0, 11, (3, 5))
    labels = tokens.clone()
    labels[0, 2:] = -100
    loss = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())
    check(TiedTransformer().to(dtype), tokens, labels, loss, 12, dtype)


def exact_norms(model, dtype):
    """Llama's own RMSNorm computes in float32 whatever the model's dtype, which no float64 comparison survives."""
    for layer in (*model.model.layers, model.model):
        for name in ("input_layernorm", "post_attention_layernorm", "norm"):
            if hasattr(layer, name) and dtype == torch.float64:
                setattr(layer, name, nn.RMSNorm(8, eps=1e-6, dtype=dtype))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face(name, dtype):
    if name == "gpt2":
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 9, "n_positions": 8}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).to(dtype).eval()
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                vocab_size=9,
            )
        ).to(dtype)  # fmt: skip
        exact_norms(model, dtype)
    ids = torch.randint(0, 9, (2, 4))
    labels = ids.clone()
    labels[1, 3] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def shifted(outputs, labels):
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    out = model(**batch)
    d = lnp.decompose(model, batch, shifted, loss_terms=5, estimator="exact")
    assert_agrees(d, dense(model, out.logits, shifted(out, labels), 5), dtype)
    assert d.probes == 4 * 9

    own = lnp.decompose(
        model, batch, estimator="exact", population=False
    )  # the model's own loss is always taken in float32
    assert {name: getattr(own, name) for name in VALUES} == pytest.approx(
        {name: getattr(d, name) for name in VALUES}, rel=1e-5
    )
    assert own.loss_terms == 5
    assert own.notes == ()


def test_encoder_layer_with_fused_attention(dtype):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to(dtype).eval()
    x, y = torch.randn(3, 4, 8, dtype=dtype), torch.randn(3, 4, 8, dtype=dtype)
    check(model, x, y, F.mse_loss, 96, dtype)


class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_lstm(dtype):
    x, y = torch.randn(4, 6, 3, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    check(LastStep().to(dtype), x, y, F.mse_loss, 8, dtype)


def test_weight_norm_old_and_new(dtype):
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    x, y = torch.randn(5, 4, dtype=dtype), torch.randint(0, 2, (5,))
    check(new, x, y, F.cross_entropy, 5, dtype)


def test_time_major_rows_are_not_taken_for_samples(dtype):
    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 2)

        def forward(self, x):
            return self.lstm(x)[0]

    x, y = torch.randn(4, 3, 3, dtype=dtype), torch.randn(4, 3, 2, dtype=dtype)
    d = check(TimeMajor().to(dtype), x, y, F.mse_loss, 24, dtype, apart=False)
    assert any("interact" in note for note in d.notes)


def test_frozen_and_unused_parameters(dtype):
    model = mlp(dtype)
    model[0].requires_grad_(False)
    model.spare = nn.Linear(2, 2).to(dtype)
    forward = lambda m, x: nn.Sequential.forward(nn.Sequential(*list(m.children())[:5]), x)
    x, y = torch.randn(4, 6, dtype=dtype), torch.randint(0, 3, (4,))
    d = lnp.decompose(model, (x, y), forward=forward, estimator="exact", by_layer=True)
    out = forward(model, x)
    assert_agrees(d, dense(model, out, F.cross_entropy(out, y), 4), dtype)
    assert "0" not in d.layers
    assert d.layers["spare"].chi_net == 0


def test_several_inputs_and_outputs(dtype):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Bilinear(3, 2, 4)

        def forward(self, left, right):
            return {"sum": self.a(left) * right, "product": self.b(left, right), "count": torch.tensor([1, 2])}

    model = Two().to(dtype)
    left, right = torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)
    loss = lambda out, y: (out["sum"] ** 2).mean() + (out["product"] - y).abs().mean()
    y = torch.randn(5, 4, dtype=dtype)
    d = lnp.decompose(model, ({"left": left, "right": right}, y), loss, estimator="exact", loss_terms=5)
    out = model(left, right)
    joined = torch.cat([out["sum"], out["product"]], dim=1)
    again = {"sum": joined[:, :2], "product": joined[:, 2:]}
    assert_agrees(d, dense(model, joined, loss(again, y), 5), dtype)
    assert d.probes == 6


def test_function_with_parameters(dtype):
    parameters = {"w": torch.randn(3, 2, dtype=dtype), "b": [torch.zeros(2, dtype=dtype)]}
    x, y = torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)
    d = lnp.decompose((lambda p, x: torch.tanh(x @ p["w"] + p["b"][0]), parameters), (x, y), by_layer=lambda name: name)
    model = nn.Linear(3, 2).to(dtype)
    model.weight.data, model.bias.data = parameters["w"].T.clone(), parameters["b"][0].clone()
    out = torch.tanh(model(x))
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), 10), dtype)
    assert list(d.layers) == ["w", "b.0"]
