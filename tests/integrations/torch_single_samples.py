"""Squared norms of single samples' gradients, by one backward pass for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lnp

NOTE = "run on their own"


class Runs(nn.Module):
    """run(self, x) with named parts."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def recorded(model, x, **options):
    """(record, outputs) in float64."""
    model, x = model.double(), x.double() if x.is_floating_point() else x
    y = torch.randn_like(model(x))
    return lnp.load("torch").linearize(model, (x, y), lnp.Options(**options)), model(x)


def assert_single_samples(model, x, **options):
    """Squared norms as by one backward pass per sample; returns the record."""
    record, out = recorded(model, x, **options)
    assert record.sample_square_norms is not None, record.notes
    v = torch.randn(record.outputs.shape, dtype=torch.float64)
    found = record.sample_square_norms(v)
    for sample in range(len(v)):
        masked = torch.zeros_like(v)
        masked[sample] = v[sample]
        grads = torch.autograd.grad(out, list(model.parameters()), masked.reshape(out.shape), retain_graph=True)
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            assert found[name][sample].item() == pytest.approx(grad.square().sum().item(), rel=1e-10, abs=1e-13), name
    return record
