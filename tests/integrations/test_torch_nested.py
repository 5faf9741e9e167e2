"""Nested batches and Gram matrices of gradients: networks and batches of many kinds, tables and figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn
from torch.nn import functional as F

import lnp
import lnp.plot


@pytest.fixture(autouse=True)
def _alone():
    torch.manual_seed(0)
    yield
    pyplot.close("all")


class OwnLoss(nn.Module):
    """Computes its loss from a dictionary, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens, labels):
        logits = self.head(self.embedding(tokens))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def mlp(**kinds):
    return nn.Sequential(nn.Linear(5, 6), kinds.get("middle", nn.Tanh()), nn.Linear(6, 3)).to(kinds.get("dtype"))


def batch(samples=12):
    return torch.randn(samples, 5), torch.randint(0, 3, (samples,))


def test_a_dictionary_of_padded_sequences():
    model, tokens, labels = OwnLoss(), torch.randint(0, 7, (6, 5)), torch.randint(0, 7, (6, 5))
    labels[::2, 2:] = -100
    given = {"tokens": tokens, "labels": labels}
    nested = lnp.decompose_nested(model, given, batch_sizes=(3, 6))
    for size, d in zip((3, 6), nested.decompositions, strict=True):
        assert d == lnp.decompose(model, {name: part[:size] for name, part in given.items()})
        assert d.population is not None
    gram = lnp.gradient_gram(model, given, groups=2)
    assert gram.rates[0] == pytest.approx(nested.decompositions[0].rate, rel=1e-5)


def test_batch_statistics_are_those_of_each_size():
    """Batch statistics of the first samples are not those of the whole batch."""
    model, (x, y) = mlp(middle=nn.BatchNorm1d(6)), batch()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    nested = lnp.decompose_nested(model, (x, y), batch_sizes=(4, 12))
    assert nested.decompositions[0] == lnp.decompose(model, (x[:4], y[:4]))
    assert "note: batch normalisation in training mode keeps this batch's statistics" in str(nested)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_gradients_in_half_precision():
    model, given = mlp(dtype=torch.bfloat16), batch()
    halves = tuple(part.to(torch.bfloat16) if part.is_floating_point() else part for part in given)
    gram = lnp.gradient_gram(model, halves, groups=3)
    wide = lnp.gradient_gram(model.float(), given, groups=3)
    assert gram.cosines == pytest.approx(wide.cosines, abs=0.05)


def test_an_auxiliary_loss_of_another_output():
    """Each loss is measured on the outputs that it depends on; the rate is the product of their gradients."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.other = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x):
            hidden = torch.tanh(self.body(x))
            return self.one(hidden), self.other(hidden)

    def main(outputs, targets):
        return F.cross_entropy(outputs[0], targets)

    def auxiliary(outputs, targets):
        return outputs[1].square().mean()

    model, (x, y) = TwoHeads(), batch()
    r = lnp.cross_response(model, (x, y), (x, y), main, measured_loss=auxiliary)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.body.parameters()))])
        for loss in (main, auxiliary)
    ]
    assert r.rate == pytest.approx(float(gradients[0] @ gradients[1]), rel=1e-4)
    assert (r.trained.outputs, r.measured.outputs) == (3, 1)
    assert abs(r.chi_pos) <= 1
    assert not any(p.grad is not None for p in model.parameters())


def test_a_regulariser_that_is_no_function_of_the_outputs_is_refused():
    model, given = mlp(), batch()
    with pytest.raises(ValueError, match="The loss does not depend on the outputs"):
        lnp.cross_response(
            model, given, given, measured_loss=lambda f, y: sum(p.square().sum() for p in model.parameters())
        )


def test_tables_and_figures():
    nested = lnp.decompose_nested(mlp(), batch(), batch_sizes=(4, 8, 12), rtol=0.0, max_probes=2)
    table = nested.to_pandas()
    assert table.index.tolist() == [4, 8, 12]
    assert table["rate"].tolist() == [d.rate for d in nested.decompositions]
    ax = lnp.plot.nested_batches(nested)
    (points,) = ax.containers
    assert points.lines[0].get_xdata().tolist() == [4, 8, 12]
    assert points.lines[0].get_ydata() == pytest.approx([d.chi_pos for d in nested.decompositions])
    dashed = next(line for line in ax.get_lines() if line.get_linestyle() == "--")
    assert dashed.get_ydata()[-1] == pytest.approx(nested.decompositions[-1].chi_pos)


@pytest.mark.parametrize(("learnt", "label"), [(False, "of the population"), (True, "of the population, below")])
def test_a_population_that_is_not_seen_is_an_upper_limit(learnt, label):
    model, x = nn.Linear(3, 1), torch.randn(64, 3)
    y = model(x).detach() + (0.1 * torch.randn(64, 1) if learnt else 5)
    nested = lnp.decompose_nested(model, (x, y))
    ax = lnp.plot.nested_batches(nested, pyplot.figure().subplots())
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    population = nested.population
    limit = max(population.chi_pos, 0.0) + 2 * population.chi_pos_stderr
    assert np.asarray(line.get_ydata()) == pytest.approx(limit if learnt else population.chi_pos)


def test_a_figure_without_a_population():
    ax = lnp.plot.nested_batches(lnp.decompose_nested(mlp(), batch(), batch_sizes=(4, 12), population=False))
    assert len(ax.containers) == 1
    ax.figure.canvas.draw()
