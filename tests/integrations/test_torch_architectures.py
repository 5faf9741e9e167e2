"""Hugging Face models of many architectures with their own losses: n by another watcher, the rate by plain autograd."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lnp
from integrations.torch_architectures import ARCHITECTURES, SAMPLES

transformers.logging.set_verbosity_error()
ADAPTERS = ("LoRA", "DoRA", "prompt tuning", "prefix tuning")


class Terms(TorchFunctionMode):
    """What the loss functions of a pass average over, by leaving their reduction out."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss, F.mse_loss, F.binary_cross_entropy_with_logits, F.ctc_loss, F.l1_loss):
            each = func(*args, **{**kwargs, "reduction": "none"})
            ignored = args[1].eq(kwargs.get("ignore_index", -100)) if func is F.cross_entropy else False
            terms = each.numel() - int(torch.as_tensor(ignored).sum())
            self.found.append(1 if kwargs.get("reduction") == "sum" else terms)
        return func(*args, **kwargs)


QUESTIONS = (3, "averages over 3 and 2 terms")
OTHERWISE = {
    "BERT, questions": QUESTIONS,  # one end lies behind the text, and is ignored
    "RoBERTa, questions": QUESTIONS,
    "ViTMAE": (SAMPLES * 2, "divided by 6"),  # masked patches
    "ViT, masked images": (SAMPLES * 3 * 128, "divided by 1152"),  # numbers in masked patches
}
"""{name: (n, a word of the note)} where the model adds or divides by something of its own; elsewhere its loss is the
mean of all terms that loss functions average, such as both directions of CLIP."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_number_of_terms_and_rate(name):
    if name in ADAPTERS:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    model.eval()
    with Terms() as terms:
        torch.manual_seed(1)
        loss = model(**batch).loss
    loss.backward()
    rate = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    torch.manual_seed(1)
    d = lnp.decompose(model, batch, estimator="joint", max_probes=2, population=False)
    n, word = OTHERWISE.get(name) or (sum(terms.found), None)
    assert d.loss_terms == n, d.notes
    assert d.loss == pytest.approx(float(loss), rel=1e-5)
    assert d.rate == pytest.approx(rate, rel=1e-4)
    assert any(word in note for note in d.notes) if word else True
