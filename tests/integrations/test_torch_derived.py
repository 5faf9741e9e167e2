"""What is computed from parameters before it meets the samples, their copies, and windows as rows: squared norms, held
against single samples, without the general way.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
import lnp_torch
from integrations.torch_single_samples import NOTE, Runs, assert_single_samples, recorded
from lnp_torch.taps import derived


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drawn(*shape):
    return nn.Parameter(torch.randn(*shape))


def standardised(m, x):
    """A convolution whose kernels have mean zero and length one."""
    w = m.w - m.w.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, w / w.flatten(1).norm(dim=1)[:, None, None, None], padding=1, groups=2).mean((2, 3))


def by_distance(m, x):
    """Attention whose scores are shifted by the distance."""
    return torch.softmax(x @ x.mT + m.w[m.distances], -1) @ x


def by_two_distances(m, x):
    bias = m.w[m.distances.flatten()].view(5, 5, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
    heads = x.unflatten(2, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).flatten(2)


def windows(m, x):
    """Two windows of each sample as rows, each with a bias by distance that is masked."""
    rows = x.unflatten(1, (2, 3)).flatten(0, 1)
    keys = F.linear(rows, m.a, m.b) * (1 + m.scale)
    bias = m.w[m.distances[:3, :3]] + torch.zeros(2, 1, 3, 3).repeat(len(x), 1, 1, 1)
    return (F.scaled_dot_product_attention(keys[:, None], keys[:, None], rows[:, None], bias)[:, 0]).reshape(len(x), -1)


def positions_by_content(m, x):
    """Keys made of a table of positions by the weights that the samples' own are made by."""
    keys = F.layer_norm(m.w, (4,)) @ m.a.T
    return torch.bmm(x @ m.a.T, keys.repeat(len(x), 1, 1).mT)


def recurrent(m, x):
    """A state of zeros at first."""
    state = torch.zeros(len(x), 4, dtype=x.dtype)
    for step in x.transpose(0, 1):
        state = torch.tanh(step + state @ m.w + m.b)
    return state


DERIVED = {
    "1 + w": (lambda m, x: F.layer_norm(x, (4,)) * (1 + m.w) - m.b.exp(), {"w": (4,), "b": (4,)}, (6, 3, 4)),
    "1 + w, twice": (lambda m, x: F.layer_norm(x, (4,)) * (scale := 1 + m.w) + x.tanh() / scale, {"w": (4,)}, (6, 4)),
    "softplus, shared": (lambda m, x: x * F.softplus(m.w) + x.mean(1, keepdim=True) * m.w, {"w": (4,)}, (6, 3, 4)),
    "joined weights": (lambda m, x: F.linear(x, torch.cat([m.w, m.b])), {"w": (2, 4), "b": (3, 4)}, (6, 4)),
    "product of weights": (lambda m, x: F.linear(x, m.w @ m.b / 3), {"w": (2, 3), "b": (3, 4)}, (6, 3, 4)),
    "and the weight": (lambda m, x: (x @ m.w.T).tanh() @ (m.w * m.w.norm()), {"w": (3, 4)}, (6, 2, 4)),
    "from the left": (lambda m, x: (m.w @ x.T.tanh()).T, {"w": (3, 4)}, (6, 4)),
    "from the left, positions": (lambda m, x: m.w @ x.mT, {"w": (3, 4)}, (6, 5, 4)),
    "magnitudes": (lambda m, x: (m.b / m.w.norm(dim=1).detach() - 1) * (x @ m.w.T), {"w": (3, 4), "b": (3,)}, (6, 4)),
    "made by a network": (lambda m, x: x @ (m.w @ m.a.tanh()).view(4, 3), {"w": (2,), "a": (2, 12)}, (6, 4)),
    "standardised convolution": (standardised, {"w": (4, 2, 3, 3)}, (6, 4, 4, 4)),
    "kernels with a factor": (
        lambda m, x: F.conv1d(x, m.w * m.b[:, None, None], stride=2), {"w": (3, 2, 2), "b": (3,)}, (6, 2, 7)
    ),
    "normalised embedding": (
        lambda m, x: F.embedding(x[..., 0].abs().long() % 5, F.normalize(m.w)), {"w": (5, 3)}, (6, 3, 2)
    ),
    "class token": (lambda m, x: torch.cat([m.w.expand(len(x), -1, -1), x], 1).cumsum(1), {"w": (1, 1, 4)}, (6, 3, 4)),
    "registers behind": (
        lambda m, x: torch.cat([x, (m.w + m.b).expand(len(x), 2, 4)], -2).cumsum(1).sin(), {"w": (2, 4), "b": (4,)},
        (6, 2, 4),
    ),
    "copies": (lambda m, x: torch.cat((m.w.repeat(len(x), 2, 1), x), dim=1).cumsum(1).sin(), {"w": (1, 4)}, (6, 3, 4)),
    "copies in another shape": (
        lambda m, x: (m.w.expand(len(x), 2, 4).reshape(len(x), 8) + x).sin(), {"w": (2, 4)}, (6, 8)
    ),
    "by distance": (by_distance, {"w": (5,)}, (6, 5, 4)),
    "by two distances": (by_two_distances, {"w": (5, 2)}, (6, 5, 4)),
    "by distance, as many as samples": (by_two_distances, {"w": (5, 2)}, (5, 5, 4)),
    "by distance, of samples' shape": (by_two_distances, {"w": (5, 2)}, (25, 5, 4)),
    "windows": (windows, {"w": (5,), "a": (4, 4), "b": (4,), "scale": (4,)}, (4, 6, 4)),
    "positions by content": (positions_by_content, {"w": (7, 4), "a": (3, 4)}, (6, 5, 4)),
    "a first state": (recurrent, {"w": (4, 4), "b": (4,)}, (6, 3, 4)),
    "a constant row for each sample": (
        lambda m, x: (torch.ones_like(x) @ m.w.tanh() * x).sin() + m.b, {"w": (4, 4), "b": (4,)}, (6, 4)
    ),
    "as many samples as rows": (lambda m, x: (torch.ones_like(x) @ m.w + x).sin(), {"w": (4, 4)}, (4, 4)),
    "scale and shift at once": (lambda m, x: torch.addcmul(m.b, m.w, x.sin()), {"w": (1, 4), "b": (4,)}, (6, 3, 4)),
    "heads from a row": (
        lambda m, x: torch.einsum("bsd,dhk->bhsk", x, m.w).sin() + m.b, {"w": (4, 2, 3), "b": (3,)}, (6, 5, 4)
    ),
    "a row from heads": (lambda m, x: torch.einsum("khd, bskh -> bds", m.w, x), {"w": (2, 3, 4)}, (6, 5, 2, 3)),
    "outputs first": (lambda m, x: torch.einsum("odk,bkd->bo", m.w, x.sin()), {"w": (5, 3, 2)}, (6, 2, 3)),
    "one matrix in two equations": (
        lambda m, x: torch.einsum("bd,od->bo", torch.einsum("bd,do->bo", x, m.w).tanh(), m.w), {"w": (4, 4)}, (6, 4)
    ),
    "and as it is": (
        lambda m, x: torch.einsum("bd,de->be", x, m.w).tanh() @ m.w + torch.einsum("bd,de->be", x, 1 + m.a),
        {"w": (4, 4), "a": (4, 4)}, (6, 4),
    ),
    "positions from the end": (lambda m, x: x * m.w[torch.arange(-3, 0)], {"w": (5, 4)}, (6, 3, 4)),
}  # fmt: skip


def network(name):
    run, shapes, shape = DERIVED[name]
    model = Runs(run, **{part: drawn(*size) for part, size in shapes.items()})
    model.register_buffer("distances", (torch.arange(5)[:, None] - torch.arange(5)).clamp(-2, 2) + 2)
    return model, torch.randn(*shape)


@pytest.mark.parametrize("name", DERIVED)
def test_squared_norms_without_the_general_way(name):
    record = assert_single_samples(*network(name))
    assert not [note for note in record.notes if NOTE in note], record.notes


@pytest.mark.parametrize(
    ("equation", "weight", "shape"),
    [
        ("bhd,hde->bhe", (2, 4, 3), (6, 2, 4)), ("b...d,de->b...e", (4, 3), (6, 2, 4)), ("bd,de->b", (4, 3), (6, 4)),
        ("bsd,de->be", (4, 3), (6, 2, 4)), ("bde,dke->bk", (4, 3, 2), (6, 4, 2)), ("bdd,de->be", (4, 3), (6, 4, 4)),
        ("bd,de", (4, 3), (6, 4)),
    ],
)  # fmt: skip
def test_equations_that_are_no_matrix_product_take_the_general_way(equation, weight, shape):
    torch.manual_seed(0)
    model = Runs(lambda m, x: torch.einsum(equation, x, m.w).reshape(len(x), -1).sin(), w=drawn(*weight))
    record = assert_single_samples(model, torch.randn(*shape))
    assert any("einsum" in note for note in record.notes)


def test_a_table_that_contributes_little_is_not_read_as_the_samples_rows():
    """Its rows are five for each of five samples, and a self-check of all parameters together would not see it."""
    model, x = network("by distance, as many as samples")
    model.run, model.a = lambda m, x: by_two_distances(m, x) + 1e8 * (x[:, :2] @ m.a).sin(), drawn(4, 10)
    assert_single_samples(model, x)


@pytest.mark.parametrize("name", ["softplus, shared", "and the weight", "by two distances", "windows"])
def test_products_with_the_batch_s_gradient(name):
    record, _ = recorded(*network(name))
    found = record.gradient_pass(True, 3, False)
    placed = torch.zeros_like(record.loss_gradient)
    whole, expected = record.vjp(record.loss_gradient), []
    for sample in found.index:
        placed.zero_()[sample] = record.loss_gradient[sample]
        own = record.vjp(placed)
        expected.append(sum((own[name] * whole[name]).sum() for name in own))
    products = found.products * found.magnitude**2
    torch.testing.assert_close(products, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["a first state", "as many samples as rows"])
def test_rows_made_for_the_samples_are_their_own(name, monkeypatch):
    """No gradients of single samples are in memory, as many as the weight has entries each."""

    def refused(*args):
        raise AssertionError("the weight was taken for what is computed from parameters alone")

    monkeypatch.setattr(derived, "totals", refused)
    record = assert_single_samples(*network(name))
    assert not [note for note in record.notes if NOTE in note], record.notes


def test_rows_that_are_as_many_as_the_samples_by_chance():
    """A table of positions, made in the pass, which all samples share."""
    model = Runs(
        lambda m, x: (x + torch.linspace(0, 1, 20, dtype=x.dtype).view(5, 4).sin() @ m.w).tanh(), w=drawn(4, 4)
    )
    for samples in (4, 5, 6):
        record = assert_single_samples(model, torch.randn(samples, 5, 4))
        assert any(NOTE in note for note in record.notes) == (samples == 5), record.notes


def test_few_samples_at_a_time(monkeypatch):
    monkeypatch.setattr(derived, "BUDGET", 1)
    assert_single_samples(*network("and the weight"))


def test_a_shared_step_has_the_plain_step_s_gradients():
    model, x = network("windows")
    y = torch.arange(len(x)) % 3
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with lnp_torch.shared(model) as step:
        loss = F.cross_entropy(model(x), y)
    found = step.backward(loss, y, "cross_entropy", rtol=1e-9, max_probes=4)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), plain, strict=True))
    alone = lnp.decompose(model, (x, y), rtol=1e-9, max_probes=4)
    assert found.chi_net == pytest.approx(alone.chi_net, rel=1e-5)
    assert found.population.chi_pos == pytest.approx(alone.population.chi_pos, rel=1e-4)
    assert found.notes == alone.notes


class Rounded(torch.autograd.Function):
    """Steps of a quarter, by code that knows nothing of several gradients at once."""

    @staticmethod
    def forward(ctx, w):
        return (4 * w).round() / 4

    @staticmethod
    def backward(ctx, d):
        return torch.tensor(d.tolist(), dtype=d.dtype)


def test_a_backward_pass_for_one_gradient_takes_the_general_way():
    record = assert_single_samples(Runs(lambda m, x: x @ Rounded.apply(m.w), w=drawn(4, 3)), torch.randn(6, 4))
    assert any(NOTE in note for note in record.notes), record.notes


def test_copies_that_are_no_samples_take_the_general_way():
    """Five copies for six samples: what they are is for the self-check to say."""
    model = Runs(lambda m, x: x @ (m.w.repeat(5, 1) * torch.arange(5.0)[:, None]), w=drawn(3))
    record = assert_single_samples(model, torch.randn(6, 5))
    assert any(NOTE in note for note in record.notes)
