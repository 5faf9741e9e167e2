"""What only a GPU can get wrong in PyTorch: its kernels, its types, its random numbers, and what waits for it.

LNP_TEST_DEVICE=cuda says which device; "cpu" tries the file itself where there is none.
"""

import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from lnp.losses.doubts import TWICE

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = os.environ.get("LNP_TEST_DEVICE", "cpu")
VALUES = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


@pytest.fixture(autouse=True)
def _deterministic():
    """Steps are compared bit for bit, which atomic sums are not among themselves."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(False)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    """Tokens, positions, one layer of causal attention, a head for every token."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 32), nn.LayerNorm(32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 20)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


def convolutions(norm):
    first = nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 16, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16, 3))


def vectors():
    return torch.randn(8, 6), torch.arange(8) % 3


def images():
    return torch.randn(6, 3, 12, 12), torch.arange(6) % 3


def sequences():
    return torch.randn(6, 5, 6), torch.arange(6) % 3


def tokens():
    drawn = torch.randint(20, (4, 9))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), vectors),
    "cnn": (lambda: convolutions(lambda width: nn.GroupNorm(2, width)), images),
    "cnn with batch norm": (lambda: convolutions(nn.BatchNorm2d), images),
    "evaluated batch norm": (lambda: convolutions(nn.BatchNorm2d).eval(), images),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences),
    "gru": (lambda: Recurrent(nn.GRU), sequences),
    "rnn": (lambda: Recurrent(nn.RNN), sequences),
    "attention": (Attention, tokens),
}  # fmt: skip


def made(name, dtype=torch.float32, device=DEVICE):
    torch.manual_seed(0)
    model, batch = NETWORKS[name][0](), NETWORKS[name][1]()
    inputs = batch[0].to(dtype) if batch[0].is_floating_point() else batch[0]
    return model.to(device, dtype), (inputs.to(device), batch[1].to(device))


def numbers(d):
    return {name: float(getattr(d, name)) for name in VALUES}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_numbers_as_on_the_processor(name):
    expected = numbers(lnp.decompose(*made(name, torch.float64, "cpu"), estimator="exact"))
    assert numbers(lnp.decompose(*made(name, torch.float64), estimator="exact")) == pytest.approx(expected, rel=1e-8)
    assert numbers(lnp.decompose(*made(name), estimator="exact")) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_probes_estimate_agrees_within_its_error(name):
    exact = lnp.decompose(*made(name, torch.float64, "cpu"), estimator="exact")
    d = lnp.decompose(*made(name), max_probes=32)
    assert abs(d.chi_net - exact.chi_net) < 5 * d.chi_net_stderr + 1e-2 * exact.chi_net


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near(name):
    """Autocast to bfloat16 rounds to three digits."""
    expected = numbers(lnp.decompose(*made(name, torch.float64, "cpu"), estimator="exact"))
    model, batch = made(name)
    with torch.autocast(DEVICE, torch.bfloat16):
        d = lnp.decompose(model, batch, estimator="exact")
    assert numbers(d) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_rules_in_half_precision_are_those_of_single_samples(name):
    """What autocast hands to a product is cast before it, which the rules have to do as well."""
    model, (x, y) = made(name)
    single = [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))]
    with torch.autocast(DEVICE, torch.bfloat16):
        whole = lnp.decompose(model, (x, y), estimator="exact", population=False)
        parts = lnp.decompose(model, single, batches=len(x), estimator="exact", population=False)
    assert numbers(whole) == pytest.approx(numbers(parts), rel=2e-2)


def trained(name, watched, amp=False, steps=6):
    """(parameters, the state of the device's generator) after some steps with dropout before the head."""
    model, (x, y) = made(name)
    if isinstance(model, nn.Sequential):
        model.insert(len(model) - 1, nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler(DEVICE, enabled=amp)
    torch.manual_seed(3)
    for _ in range(steps):
        if watched:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lnp.decompose(model, (x, y))
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16, enabled=amp):
            outputs = model(x)
            loss = F.cross_entropy(outputs.flatten(0, -2), y.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    state = [p.detach().cpu() for p in model.state_dict().values()]
    return [*state, torch.cuda.get_rng_state().cpu() if DEVICE == "cuda" else torch.get_rng_state()]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "float16 with a loss scale"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_the_same_to_the_last_bit(name, amp):
    alone = trained(name, watched=False, amp=amp)
    again, watched = trained(name, watched=False, amp=amp), trained(name, watched=True, amp=amp)
    if not all(map(torch.equal, alone, again)):
        pytest.skip("two runs without lnp differ already")
    assert all(map(torch.equal, alone, watched))


def test_labels_out_of_range_are_refused_before_the_device_is_lost():
    model, (x, y) = made("mlp")
    with pytest.raises(ValueError, match="label"):
        lnp.decompose(model, (x, y + 1))
    assert torch.isfinite(model(x)).all()


def test_targets_that_a_loss_brings_to_the_device_itself():
    """Rows of them are looked at wherever they are, and come to the host with the numbers."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)).to(DEVICE), torch.randn(16, 6), torch.arange(16) % 3
    d = lnp.decompose(model, (x.to(DEVICE), y), lambda outputs, targets: F.cross_entropy(outputs, targets.to(DEVICE)))
    assert TWICE in d.notes
    assert d.loss == pytest.approx(lnp.decompose(model, (x.to(DEVICE), y.to(DEVICE))).loss, rel=1e-5)


def test_a_batch_on_another_device_is_refused():
    if DEVICE == "cpu":
        return
    model, (x, y) = made("mlp")
    with pytest.raises(ValueError, match="The batch is on cpu, the model on cuda:0"):
        lnp.decompose(model, (x.cpu(), y.cpu()))


@pytest.mark.parametrize("name", NETWORKS)
def test_how_often_a_measurement_waits_for_the_device(name, record_property):
    """Once for the numbers of each stage, and for each probe beyond those that were planned."""
    if DEVICE == "cpu":
        return
    model, batch = made(name)
    for seed in range(3):
        lnp.decompose(model, batch, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            d = lnp.decompose(model, batch, seed=5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    places = sorted({f"{os.path.basename(w.filename)}:{w.lineno}" for w in waits})
    print(f"\n{name}: waits {len(waits)} times, at {places}")
    record_property("waits", len(waits))
    assert len(waits) <= 4 + d.probes
