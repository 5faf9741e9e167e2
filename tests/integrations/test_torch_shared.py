"""A training step that shares its passes: the numbers of `lnp.decompose`, and a run that is what it was, bit by bit."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import lnp
import lnp_torch

VALUES = ("loss", "rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr")
POPULATION = ("rate", "chi_pos", "noise_scale", "rate_stderr", "chi_pos_stderr", "gradient_noise")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Attends(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 8), nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 7))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)

    def forward(self, tokens, *, scale=1.0):
        return self.head(self.block(self.table(tokens))) * scale


def dense(dropout):
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 4))


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


NETWORKS = {
    "dense": (lambda: dense(0.0), lambda: torch.randn(20, 6), lambda: torch.arange(20) % 4),
    "dropout": (lambda: dense(0.5), lambda: torch.randn(20, 6), lambda: torch.arange(20) % 4),
    "convolutional": (convolutional, lambda: torch.randn(9, 2, 4, 4), lambda: torch.arange(9) % 4),
    "attention": (Attends, lambda: torch.randint(0, 7, (6, 3)), lambda: torch.randint(0, 7, (6, 3))),
    "attention dropout": (
        lambda: Attends(0.1),
        lambda: torch.randint(0, 7, (6, 3)),
        lambda: torch.randint(0, 7, (6, 3)),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)),
        lambda: torch.randn(8, 6),
        lambda: torch.arange(8) % 2,
    ),
}


def criterion(outputs, targets):
    return F.cross_entropy(outputs.movedim(-1, 1), targets)


def cross_entropy(outputs):
    """One whose terms lnp knows."""
    return "cross_entropy" if outputs.ndim == 3 else nn.CrossEntropyLoss()


def made(name, dtype=torch.float64):
    build, draw, label = NETWORKS[name]
    x = draw()
    return build().to(dtype), x.to(dtype) if x.is_floating_point() else x, label()


def step(model, x, y, **options):
    with lnp_torch.shared(model) as shared:
        outputs = model(x)
        loss = criterion(outputs, y)
    return shared.backward(loss, y, cross_entropy(outputs), **options)


@pytest.mark.parametrize("estimator", ["exact", "auto"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("batch norm", "attention dropout")])
def test_numbers_of_decompose(name, estimator):
    model, x, y = made(name)
    options = {"estimator": estimator, "rtol": 0.05}
    expected = lnp.decompose(copy.deepcopy(model), (x, y), **options)  # draws the masks that the step will draw
    found = step(model, x, y, **options)
    assert found.notes == expected.notes
    for value in VALUES:
        assert getattr(found, value) == pytest.approx(getattr(expected, value), rel=1e-10, abs=1e-14), value
    assert found.estimator == expected.estimator
    assert found.loss_terms == expected.loss_terms
    for value in POPULATION:
        assert getattr(found.population, value) == pytest.approx(getattr(expected.population, value), rel=1e-8), value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_what_it_was(name, dtype):
    """Weights, gradients, optimizer state, buffers, random state, losses: bit by bit after some steps of Adam."""
    model, x, y = made(name, dtype)
    other = copy.deepcopy(model)

    def train(model, watched):
        torch.manual_seed(3)
        optimizer, losses = torch.optim.Adam(model.parameters()), []
        for _ in range(4):
            optimizer.zero_grad()
            if watched:
                losses.append(step(model, x, y, max_probes=2).loss)
            else:
                loss = criterion(model(x), y)
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        grads = [p.grad for p in model.parameters()]
        state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        return losses, [*model.state_dict().values(), *grads, *state, torch.get_rng_state()]

    losses, tensors = train(model, watched=False)
    watched_losses, watched = train(other, watched=True)
    assert losses == watched_losses
    assert all(torch.equal(a, b) for a, b in zip(tensors, watched, strict=True))
    assert not other._forward_hooks
    assert not other._forward_pre_hooks


def test_used_again():
    model, x, y = made("dense")
    watched = lnp_torch.shared(model)
    found = []
    for _ in range(2):
        with watched:
            loss = criterion(model(x), y)
        found.append(watched.backward(loss, y, nn.CrossEntropyLoss()))
    assert found[0].to_dict() == found[1].to_dict()


def test_gradients_add_up():
    model, x, y = made("dense")
    step(model, x, y)
    once = [p.grad.clone() for p in model.parameters()]
    d = step(model, x, y)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))
    assert d.rate == pytest.approx(sum(g.square().sum().item() for g in once), rel=1e-12)


def test_a_scaled_loss():
    """As a gradient scaler hands it on: the gradients stay scaled, the numbers are those of the loss itself."""
    model, x, y = made("dense")
    expected = step(copy.deepcopy(model), x, y)
    with lnp_torch.shared(model) as shared:
        loss = criterion(model(x), y) * 1024.0
    d = shared.backward(loss, y, nn.CrossEntropyLoss(), scale=1024.0)
    assert d.rate == pytest.approx(sum(p.grad.square().sum().item() for p in model.parameters()) / 1024**2, rel=1e-12)
    for value in VALUES:
        assert getattr(d, value) == pytest.approx(getattr(expected, value), rel=1e-10), value
    for value in POPULATION:
        assert getattr(d.population, value) == pytest.approx(getattr(expected.population, value), rel=1e-8), value


def test_terms_that_do_not_come_from_the_outputs():
    model, x, y = made("dense")
    expected = lnp.decompose(model, (x, y))
    with lnp_torch.shared(model) as shared:
        plain = criterion(model(x), y)
        loss = plain + 0.1 * sum(p.square().sum() for p in model.parameters())
    d = shared.backward(loss, y, nn.CrossEntropyLoss())
    assert any("do not come from the outputs" in note for note in d.notes)
    for value in VALUES[1:]:
        assert getattr(d, value) == pytest.approx(getattr(expected, value), rel=1e-10), value
    assert d.population.rate == pytest.approx(expected.population.rate, rel=1e-8)
    whole = torch.autograd.grad(
        criterion(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters()), list(model.parameters())
    )
    assert all(torch.allclose(p.grad, g, rtol=1e-12) for p, g in zip(model.parameters(), whole, strict=True))


def test_interacting_samples_are_measured_jointly():
    model, x, y = made("batch norm")
    expected = lnp.decompose(copy.deepcopy(model), (x, y), batch_statistics="coupled", estimator="exact")
    d = step(model, x, y, estimator="exact")
    assert any("not taken apart" in note for note in d.notes)
    for value in VALUES:
        assert getattr(d, value) == pytest.approx(getattr(expected, value), rel=1e-9, abs=1e-14), value


def test_dropout_in_fused_attention_is_left_alone():
    model, x, y = made("attention dropout")
    d = step(model, x, y, estimator="joint", max_probes=256, rtol=0.0)
    assert step(model, x, y).estimator == "joint"
    expected = lnp.decompose(model, (x, y), estimator="exact")  # other masks: about the same
    assert d.chi_net == pytest.approx(expected.chi_net, rel=0.3)


def test_a_model_with_its_own_loss():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 9, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double().eval()
    ids = torch.randint(0, 9, (4, 5))
    expected = lnp.decompose(model, {"input_ids": ids, "labels": ids}, estimator="exact")
    with lnp_torch.shared(model) as shared:
        loss = model(input_ids=ids, labels=ids).loss
    d = shared.backward(loss, estimator="exact")
    assert d.loss_terms == expected.loss_terms
    for value in VALUES:
        assert getattr(d, value) == pytest.approx(getattr(expected, value), rel=1e-5, abs=1e-12), value


def test_autocast():
    model, x, y = made("dense", torch.float32)
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = lnp.decompose(plain, (x, y), max_probes=1)
        with lnp_torch.shared(model) as shared:
            loss = criterion(model(x), y)
    d = shared.backward(loss, y, nn.CrossEntropyLoss(), max_probes=1)
    assert d.notes == expected.notes
    assert d.chi_net == pytest.approx(expected.chi_net, rel=1e-2)


def test_selected_parameters_and_keyword_arguments():
    model, x, y = made("attention")
    model.eval()
    with lnp_torch.shared(model, "head.*") as shared:
        loss = criterion(model(x, scale=2.0), y)
    d = shared.backward(loss, y, "cross_entropy", estimator="exact", by_layer=True)
    expected = lnp.decompose(
        model, (x, y), forward=lambda m, x: m(x, scale=2.0), parameters="head.*", estimator="exact", by_layer=True
    )
    assert set(d.layers) == {"head.1"}
    for value in VALUES:
        assert getattr(d, value) == pytest.approx(getattr(expected, value), rel=1e-10, abs=1e-14), value


def test_the_step_has_one_forward_pass():
    model, x, y = made("dense")
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    step(model, x, y)  # compares single samples with the batch, once
    calls.clear()
    step(model, x, y, rtol=0.2)
    assert len(calls) == 1


def test_activations_are_let_go():
    model, x, y = made("dense")
    seen = []
    hook = model[1].register_forward_hook(lambda module, given, out: seen.append(weakref.ref(out)))
    with lnp_torch.shared(model) as shared:
        loss = criterion(model(x), y)
    hook.remove()
    shared.backward(loss, y, nn.CrossEntropyLoss())
    del loss
    gc.collect()
    assert seen[0]() is None


def test_loss_terms_without_targets():
    model, x, y = made("dense")
    with lnp_torch.shared(model) as shared:
        loss = criterion(model(x), y)
    d = shared.backward(loss, loss_terms=20)
    assert (d.loss_terms, d.population) == (20, None)
    assert any("mean over samples" in note for note in d.notes)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    """What a reentrant one computes again is reached by no gradient but the step's own."""
    inner, (x, y) = made("dense")[0], made("dense")[1:]
    model = nn.Module()
    model.inner = inner
    model.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    x.requires_grad_()
    expected = lnp.decompose(model, (x, y), estimator="exact")
    with lnp_torch.shared(model) as shared:
        loss = criterion(model(x), y)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            shared.backward(loss, y, nn.CrossEntropyLoss(), estimator="exact")
        assert all(p.grad is None for p in model.parameters())
        return
    found = shared.backward(loss, y, nn.CrossEntropyLoss(), estimator="exact")
    for value in VALUES:
        assert getattr(found, value) == pytest.approx(getattr(expected, value), rel=1e-10), value


def test_errors():
    model, x, y = made("dense")
    with lnp_torch.shared(model) as shared:
        pass
    with pytest.raises(RuntimeError, match="called 0 times"):
        shared.backward(criterion(model(x), y), y)
    with lnp_torch.shared(model) as shared:
        model(x), model(x)
    with pytest.raises(RuntimeError, match="called 2 times"):
        shared.backward(criterion(model(x), y), y)
    with lnp_torch.shared(model) as shared:
        model(x)
    with pytest.raises(ValueError, match="does not depend on the outputs"):
        shared.backward(criterion(model(x), y), y)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        shared.backward(torch.ones(()), y)
    with lnp_torch.shared(model) as shared:
        out = model(x)
    with pytest.raises(ValueError, match="neither targets nor loss_terms"):
        shared.backward(criterion(out, y))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="mat1 and mat2"), lnp_torch.shared(model):
        model(x[:, :2])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["dense", "dropout", "attention"])
def test_a_tracker_measures_the_steps_own_passes(name, tmp_path):
    """Due steps are rows with the numbers of a shared step; the run is what it is without a tracker, bit by bit."""
    model, x, y = made(name)
    other = copy.deepcopy(model)
    tracker = lnp.Tracker(tmp_path / "run.jsonl", [0, 2], by_layer=True, seed=5, tags={"width": 12})

    def train(model, watched):
        torch.manual_seed(3)
        optimizer, found = torch.optim.Adam(model.parameters()), []
        for index in range(4):
            optimizer.zero_grad()
            with tracker.shared(index, model, learning_rate=1e-3) if watched else contextlib.nullcontext() as shared:
                outputs = model(x)
                loss = criterion(outputs, y)
            if watched:
                found.append(shared.backward(loss, y, cross_entropy(outputs)))
            else:
                loss.backward()
            optimizer.step()
        return found, [*model.state_dict().values(), torch.get_rng_state()]

    found, watched = train(model, True)
    assert all(map(torch.equal, watched, train(other, False)[1]))
    assert [d is None for d in found] == [False, True, False, True]
    rows = tracker.history.rows()
    assert [row["step"] for row in rows] == [0, 2]
    for row, d in zip(rows, found[::2], strict=True):
        assert row | d.to_dict() == row
        assert 0 < row["seconds"] < 60
        assert (row["learning_rate"], row["width"]) == (1e-3, 12)


def test_what_a_tracker_tells_a_shared_step():
    model, x, y = made("dense")
    options = {"parameters": "3.*", "loss_terms": 7, "estimator": "joint", "max_probes": 3, "rtol": 0.0}
    tracker = lnp.Tracker(schedule=1, seed=5, loss=nn.CrossEntropyLoss(), **options)
    with tracker.shared(2, model) as shared:
        loss = criterion(model(x), y)
    d = shared.backward(loss, y, max_probes=2)
    assert d is shared.decomposition
    assert (d.loss_terms, d.estimator, d.probes) == (7, "joint", 2)
    with lnp_torch.shared(model, "3.*") as again:
        loss = criterion(model(x), y)
    del options["parameters"]
    assert again.backward(loss, y, seed=7, **(options | {"max_probes": 2})).chi_net == d.chi_net
    for wrong in ({"microbatch": 4}, {"batch_statistics": "frozen"}, {"forward": lambda m, x: m(x)}):
        with pytest.raises(TypeError, match=f"has the options {next(iter(wrong))}"):
            lnp.Tracker(schedule=1, **wrong).shared(0, model)
    with pytest.raises(TypeError, match="batches of its own"):
        lnp.Tracker(schedule=1, batch=(x, y)).shared(0, model)
