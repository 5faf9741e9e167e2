"""Rows of all samples that move as values decide: experts, and tokens in an order of their own."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import lnp
from integrations.torch_reference import TOLERANCE, assert_agrees, dense
from lnp.estimators.population import jackknife_size
from lnp_torch import self_check
from lnp_torch.taps.rules import RULES, _experts

EXPERTS, WIDTH, OUT = 3, 4, 4
PRODUCT = next(function for function, rule in RULES.items() if rule is _experts)
"""PyTorch's product of sorted rows with one weight for each expert; on a processor it has none in float64."""


class Experts(nn.Module):
    """A gate that sends each token to two of three experts, and what is done with them."""

    def __init__(self, run):
        super().__init__()
        self.run, self.gate = run, nn.Linear(WIDTH, EXPERTS)
        if run in (sorted_products, transposed_products):
            shape = (EXPERTS, WIDTH, OUT) if run is sorted_products else (EXPERTS, OUT, WIDTH)
            self.weight, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(EXPERTS, OUT))
        else:
            self.layers = nn.ModuleList([nn.Linear(WIDTH, OUT) for _ in range(EXPERTS)])
        self.last = nn.Linear(OUT, 3)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weight, expert = self.gate(tokens).softmax(dim=-1).topk(2, dim=-1)
        out = self.run(self, tokens, expert.reshape(-1), weight.reshape(-1))
        return self.last(out.view(*x.shape[:-1], OUT) + x)


def sorted_products(m, tokens, expert, weight):
    expert, order = torch.sort(expert)
    ends = torch.histc(expert.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
    matrix = m.weight if m.run is sorted_products else m.weight.transpose(-2, -1)
    hidden = PRODUCT(tokens[order // 2], matrix, offs=ends)
    hidden.add_(m.shift[expert])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (hidden.tanh() * weight[order].unsqueeze(-1))[back].view(len(tokens), 2, -1).sum(dim=1)


def transposed_products(m, tokens, expert, weight):
    return sorted_products(m, tokens, expert, weight)


def one_by_one(m, tokens, expert, weight):
    out = torch.zeros(len(tokens), OUT, dtype=tokens.dtype)
    for number, layer in enumerate(m.layers):
        pair = (expert == number).nonzero()[:, 0]
        out.index_add_(0, pair // 2, layer(tokens[pair // 2]).tanh() * weight[pair, None])
    return out


def with_a_leading_axis(m, tokens, expert, weight):
    out = torch.zeros_like(tokens)
    for number, layer in enumerate(m.layers):
        token, place = torch.where(expert.view(-1, 2) == number)
        chosen = tokens[None, token].reshape(-1, WIDTH)
        out.index_add_(0, token, layer(chosen) * weight.view(-1, 2)[token, place, None])
    return out


def by_masks(m, tokens, expert, weight):
    pairs = tokens.repeat_interleave(2, dim=0)
    out = torch.zeros_like(pairs)
    for number, layer in enumerate(m.layers):
        mine = expert == number
        out[mine] = F.silu(layer(pairs[mine])) * weight[mine].unsqueeze(1)
    return out.view(-1, 2, OUT).sum(1)


def by_lists(m, tokens, expert, weight):
    order = expert.sort(stable=True)[1]
    made = m.layers[0](tokens[(order // 2).tolist()])
    return torch.zeros_like(tokens).index_add(dim=0, index=order // 2, source=made * weight[order, None])


def by_copies(m, tokens, expert, weight):
    """Into memory that holds other rows."""
    order = expert.sort(stable=True)[1]
    held = tokens.repeat_interleave(2, dim=0)
    held.copy_(tokens[order // 2])
    made = m.layers[0](held)
    return torch.zeros_like(tokens).index_add(0, order // 2, made * weight[order, None])


def cut(m, tokens, expert, weight):
    order = expert.sort(stable=True)[1]
    counts = torch.bincount(expert, minlength=EXPERTS).tolist()
    chosen, start, made = tokens[order // 2], 0, []
    for layer, count in zip(m.layers, counts, strict=True):
        made.append(layer(chosen[start : start + count]))
        start += count
    return torch.zeros_like(tokens).index_add(0, order // 2, torch.cat(made) * weight[order, None])


def split(m, tokens, expert, weight):
    order = expert.sort(stable=True)[1]
    pieces = tokens.index_select(0, order // 2).split(torch.bincount(expert, minlength=EXPERTS).tolist())
    made = torch.cat([layer(piece) for layer, piece in zip(m.layers, pieces, strict=True)])
    return torch.zeros_like(tokens).index_add(0, order // 2, made * weight[order, None])


def reversed_twice(m, tokens, expert, weight):
    """What nobody follows: rows are not told by their numbers afterwards."""
    order, weight = by_first_choice(expert, weight)
    made = m.layers[0](tokens[order].flip(0).flip(0))
    return torch.zeros_like(tokens).index_add(0, order, made * weight[order])


def reversed_before(m, tokens, expert, weight):
    order, weight = by_first_choice(expert, weight)
    made = m.layers[0](tokens.flip(0).flip(0)[order.flip(0).flip(0)])
    return torch.zeros_like(tokens).index_add(0, order, made * weight[order])


def put_in_order(m, tokens, expert, weight):
    """By writing rows to their places."""
    order, weight = by_first_choice(expert, weight)
    chosen = tokens.clone()
    chosen[order.sort()[1]] = tokens
    return torch.zeros_like(tokens).index_add(0, order, m.layers[0](chosen) * weight[order])


def put_in_order_anew(m, tokens, expert, weight):
    order, weight = by_first_choice(expert, weight)
    chosen = torch.zeros_like(tokens).index_copy(0, order.sort()[1], tokens)
    return torch.zeros_like(tokens).index_add(0, order, m.layers[0](chosen) * weight[order])


def taken_along(m, tokens, expert, weight):
    order, weight = by_first_choice(expert, weight)
    made = m.layers[0](torch.take_along_dim(tokens, order[:, None], dim=0))
    return torch.zeros_like(tokens).index_add(0, order, made * weight[order])


def gathered(m, tokens, expert, weight):
    order, weight = by_first_choice(expert, weight)
    made = m.layers[0](tokens.gather(0, order[:, None].expand(-1, WIDTH)))
    return torch.zeros_like(tokens).index_add(0, order, made * weight[order])


def by_first_choice(expert, weight):
    return expert.view(-1, 2)[:, 0].sort(stable=True)[1], weight.view(-1, 2)[:, :1]


FOLLOWED = (
    sorted_products,
    transposed_products,
    one_by_one,
    with_a_leading_axis,
    by_masks,
    by_lists,
    by_copies,
    cut,
    split,
)
NOT_FOLLOWED = (reversed_twice, reversed_before, put_in_order, put_in_order_anew, taken_along, gathered)
SHAPES = ((5, 6), (4, 1), (8, 4), (1, 7))


def case(run, shape):
    """(model, inputs, dtype)."""
    torch.manual_seed(0)
    dtype = torch.float32 if run in (sorted_products, transposed_products) else torch.float64
    return Experts(run).to(dtype), torch.randn(*shape, WIDTH, dtype=dtype), dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", FOLLOWED, ids=lambda run: run.__name__)
def test_every_measurement_sends_rows_elsewhere(run, shape):
    """All values, by rules alone, with whatever the next batches send where."""
    model, x, dtype = case(run, shape)
    for _ in range(3):
        out = model(x)
        y = torch.randn_like(out)
        d = lnp.decompose(model, (x, y), estimator="exact")
        assert_agrees(d, dense(model, out, F.mse_loss(out, y), y.numel()), dtype)
        assert d.probes == out[0].numel()
        assert not any("on their own" in note for note in d.notes)
        x = torch.randn_like(x)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("run", [*FOLLOWED, *NOT_FOLLOWED], ids=lambda run: run.__name__)
def test_single_samples(run, shape):
    """Squared norms of any cotangent, and products with the batch's gradient."""
    model, x, dtype = case(run, shape)
    for _ in range(2):
        yielded = check_single_samples(model, torch.randn_like(x), dtype)
        assert (yielded.products is None) is (run in NOT_FOLLOWED)


@pytest.mark.parametrize("run", NOT_FOLLOWED, ids=lambda run: run.__name__)
def test_a_first_batch_in_which_no_row_moves(run):
    """Its rows are read right by their numbers: those of the second batch are not."""
    model, x, dtype = case(run, (8, 4))
    for first in (True, False):
        with torch.no_grad():
            model.gate.bias.copy_(torch.tensor([1e3, 0.0, -1e3]) if first else torch.zeros(EXPERTS))
        check_single_samples(model, x, dtype)


def check_single_samples(model, x, dtype):
    """What the gradient pass yields, once all has been compared with one sample at a time."""
    out = model(x)
    record = lnp.load("torch").linearize(model, (x, torch.randn_like(out)), lnp.Options(population=True))
    v = torch.randn_like(record.outputs)
    found = record.sample_square_norms(v)
    yielded = record.gradient_pass(True, jackknife_size(len(out)), False)
    g = record.loss_gradient / yielded.magnitude
    u = list(gradients(model, out, g).values())
    for sample in range(len(out)):
        rows = [of_sample(model, out, cotangent, sample) for cotangent in (v, g)]
        expected = {name: float(part.square().sum()) for name, part in rows[0].items()}
        measured = {name: float(norms[sample]) for name, norms in found.items()}
        assert measured == pytest.approx(expected, rel=TOLERANCE[dtype], abs=1e-5 * max(expected.values()))
        if yielded.products is not None and sample in yielded.index.tolist():
            products = [float((a * b).sum()) for a, b in zip(rows[1].values(), u, strict=True)]
            place = yielded.index.tolist().index(sample)
            size = sum(map(abs, products))
            assert float(yielded.products[place]) == pytest.approx(sum(products), abs=TOLERANCE[dtype] * size)
    return yielded


def of_sample(model, out, cotangent, sample):
    """{parameter: its gradient by one sample}."""
    alone = torch.zeros_like(cotangent)
    alone[sample] = cotangent[sample]
    return gradients(model, out, alone)


def gradients(model, out, cotangent):
    named = dict(model.named_parameters())
    found = torch.autograd.grad(
        out, list(named.values()), cotangent.reshape(out.shape),
        retain_graph=True, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.reshape(1, -1).reshape(x.shape),
        lambda x: x.reshape(6, -1).reshape(x.shape)[torch.arange(4)],
        lambda x: x + 0 * x.sum().sum(0),
        lambda x: 0 * x.reshape(-1, 4)[x.reshape(-1, 4)[:, 0].argsort()].reshape(1, -1).reshape(x.shape) + x,
    ],
)  # fmt: skip
def test_shapes_that_fit_no_samples_disturb_nothing(run):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    model = lambda x: layer(run(x))
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return model(x)

    whole = Whole()
    out = whole(x)
    d = lnp.decompose(whole, (x, y), estimator="exact")
    assert_agrees(d, dense(whole, out, F.mse_loss(out, y), y.numel()), torch.float64)


def test_adapters_of_experts():
    """What is computed from a weight of experts before it meets the tokens."""

    class Adapted(Experts):
        def __init__(self):
            super().__init__(sorted_products)
            self.down, self.up = (nn.Parameter(torch.randn(s)) for s in ((EXPERTS, WIDTH, 2), (EXPERTS, 2, OUT)))

        def forward(self, x):
            whole, own = self._parameters["weight"], self
            shadow = _Shadow(own, whole + self.down @ self.up)
            return Experts.forward(shadow, x)

    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(5, 6, WIDTH)
    out = model(x)
    y = torch.randn_like(out)
    d = lnp.decompose(model, (x, y), estimator="exact")
    assert_agrees(d, dense(model, out, F.mse_loss(out, y), y.numel()), torch.float32)
    assert not any("on their own" in note for note in d.notes)


class _Shadow:
    """Another's attributes, with a weight in the place of its own."""

    def __init__(self, other, weight):
        self.other, self.weight, self.run = other, weight, sorted_products

    def __getattr__(self, name):
        return getattr(self.other, name)


def test_other_parameters_are_tried_once(monkeypatch):
    """A network that sends rows as values decide is compared with single samples each time, at its own parameters."""
    places = []
    compared = self_check._plan_at_parameters

    def watched(samples, before, tolerance, pairs, chosen=True):
        places.append("here" if chosen else "elsewhere")
        return compared(samples, before, tolerance, pairs, chosen)

    monkeypatch.setattr(self_check, "_plan_at_parameters", watched)
    model, x, _ = case(one_by_one, (5, 6))
    for _ in range(3):
        lnp.decompose(model, (x, torch.randn(5, 6, 3, dtype=x.dtype)))
    assert places == ["elsewhere", "here", "here", "here"]


def test_layers_behind_experts():
    """Rows that went to experts are their samples' again: parameters of later layers keep their rules."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 40}
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **sizes,
        **more,
        max_position_embeddings=128,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model, words = transformers.GptOssForCausalLM(config), torch.randint(1, 40, (5, 9))
    d = lnp.decompose(model, {"input_ids": words, "labels": words})
    assert not any("on their own" in note for note in d.notes)
    assert d.population is not None
