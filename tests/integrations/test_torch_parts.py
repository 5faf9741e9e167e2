"""Models that do not run on a part of their batch, or say so in ways of their own: measured as a whole, and told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_reference import assert_agrees, dense

N = 20
X, Y = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


class WithoutText(Exception):
    def __str__(self):
        raise ValueError("this error has no text")


class Raises(nn.Module):
    """Runs on batches of one size only."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(6, 3), error

    def forward(self, x):
        if x.size(0) != N:
            raise self.error
        return self.layer(x)


class Stateful(nn.Module):
    """Carries a hidden state of the batch's size."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 4), nn.Linear(4, 3)
        self.register_buffer("hidden", torch.zeros(N, 4))

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden.detach())
        return self.head(self.hidden)


class SparseInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return torch.sparse.mm(x, self.weight)


class OfNested(nn.Module):
    """Averages over the rows of each sample, of which samples have different numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return torch.stack([rows.mean(0) for rows in self.layer(x).unbind()])


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(11, 6, **options), nn.Linear(6, 3)

    def forward(self, tokens, offsets=None):
        return self.head(self.bags(tokens, offsets).tanh())


def nested(layout):
    rows = [
        torch.randn(2 + n % 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(N)
    ]
    return torch.nested.nested_tensor(rows, layout=layout)


TOKENS = torch.randint(0, 11, (N, 4), generator=torch.Generator().manual_seed(0))
BY_OFFSETS = (TOKENS.flatten()[:53], torch.arange(0, 2 * N, 2))
WHOLE = {
    "assertion": (lambda: Raises(AssertionError(f"expected {N} samples")), X.clone),
    "error without a text": (lambda: Raises(WithoutText()), X.clone),
    "end of an iteration": (lambda: Raises(StopIteration()), X.clone),
    "hidden state": (Stateful, X.clone),
    "sparse": (SparseInput, X.to_sparse),
    "sparse rows": (SparseInput, X.to_sparse_csr),
    "nested": (OfNested, lambda: nested(torch.strided)),
    "nested, jagged": (OfNested, lambda: nested(torch.jagged)),
    "bags by offsets": (Bags, lambda: BY_OFFSETS),
}


def called(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


@pytest.mark.filterwarnings("ignore:.*(beta state|prototype):UserWarning")  # of sparse rows, and of nested tensors
@pytest.mark.parametrize("name", WHOLE)
def test_it_is_measured_as_a_whole_and_told(name):
    make, inputs = WHOLE[name]
    model, x = make().double(), inputs()
    reference = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    d = lnp.decompose(model, (x, Y), estimator="exact")
    out = called(reference, x)
    assert_agrees(d, dense(reference, out, F.cross_entropy(out, Y), N), torch.float64)
    assert any("they are not taken apart" in note for note in d.notes)
    change = lnp.measured_loss_change(model, (x, Y), learning_rate=1e-6)
    assert change == pytest.approx(-1e-6 * d.rate, rel=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"microbatch=4 was asked for, but .*Leave microbatch unset"):
        lnp.decompose(model, (x, Y), microbatch=4)

    with lnp_torch.shared(model) as step:
        loss = F.cross_entropy(called(model, x), Y)
    assert step.backward(loss, Y, F.cross_entropy).rate == pytest.approx(d.rate, rel=1e-9)


BAGS = {
    "mean": ({}, TOKENS),
    "sum, padded": ({"mode": "sum", "padding_idx": 2}, TOKENS),
    "max": ({"mode": "max"}, TOKENS),
    "sparse": ({"sparse": True}, TOKENS),
    "offsets": ({}, BY_OFFSETS),
    "last offset": ({"include_last_offset": True}, (BY_OFFSETS[0], torch.cat([BY_OFFSETS[1], torch.tensor([53])]))),
    "shrunk": ({"max_norm": 0.5}, TOKENS),
}


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings_in_every_function(name):
    options, x = BAGS[name]
    model = Bags(**options).double()
    d = lnp.decompose(model, (x, Y), estimator="exact")
    reference = copy.deepcopy(model)
    out = called(reference, x)
    assert_agrees(d, dense(reference, out, F.cross_entropy(out, Y), N), torch.float64)
    moment = lnp.spectrum(model, (x, Y)).first_moment
    assert moment == pytest.approx(d.rate / (d.chi_loss / N), rel=1e-9)
    kernel = lnp.kernel(model, (x, Y), progress=False)
    assert kernel.matrix.trace() == pytest.approx(d.chi_net * N, rel=1e-9)


def test_what_cannot_be_differentiated_along_a_direction_is_refused():
    model = OfNested().double()
    with pytest.raises(NotImplementedError, match=r"has neither a forward mode nor a second derivative.*decompose"):
        lnp.spectrum(model, (nested(torch.jagged), Y))


@pytest.mark.parametrize("other", [2.0, None, [1, "mean"]])
def test_what_is_no_parameter_is_named(other):
    parameters = {"layer": {"w": torch.randn(6, 3), "scale": other}}
    with pytest.raises(ValueError, match=r"no tensor: layer\.scale.*Expected tensors alone"):
        lnp.decompose((lambda p, x: x @ p["layer"]["w"], parameters), (X.float(), Y))
