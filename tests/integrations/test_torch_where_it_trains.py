"""Forms in which large models train: compiled, in narrow types, over quantised weights, or offloaded."""

import copy

import pytest
import torch
from torch import nn

import lnp

torch.manual_seed(5)
X, Y = torch.randn(8, 6), torch.arange(8) % 3
NUMBERS = ("loss", "rate", "chi_loss", "chi_net", "chi_pos")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def agree(found, expected, rtol):
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rtol), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module(backend):
    found = lnp.decompose(torch.compile(network(), backend=backend), (X, Y), estimator="exact")
    agree(found, lnp.decompose(network(), (X, Y), estimator="exact"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_a_narrow_type(dtype):
    found = lnp.decompose(network().to(dtype), (X.to(dtype), Y), estimator="exact")
    agree(found, lnp.decompose(network(), (X, Y), estimator="exact"), 0.05)


class Adapted(nn.Module):
    """A low-rank adapter beside a frozen layer."""

    def __init__(self, frozen):
        super().__init__()
        torch.manual_seed(1)
        self.frozen, self.down, self.up = frozen, nn.Linear(6, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(x) + self.up(self.down(x))))


class Quantised(nn.Module):
    """A layer whose weights are integers: no parameters that could be differentiated."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach().abs().max() / 127
        integers = torch.round(layer.weight.detach() / scale).to(torch.int8)
        self.integers, self.bias = nn.Parameter(integers, requires_grad=False), layer.bias.requires_grad_(False)
        self.register_buffer("scale", scale)

    @property
    def weight(self):
        return self.integers.float() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_adapters_on_quantised_weights():
    quantised = Quantised(network()[0])
    plain = nn.Linear(6, 16).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(quantised.weight)
        plain.bias.copy_(quantised.bias)
    found = lnp.decompose(Adapted(quantised), (X, Y), estimator="exact")
    agree(found, lnp.decompose(Adapted(plain), (X, Y), estimator="exact"), 1e-5)
    assert found.notes == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_activations_that_are_quantised_by_the_batch_make_its_samples_interact():
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        pytest.skip("it has moved to a library of its own")
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 16)), {nn.Linear}, dtype=torch.qint8)
    assert any("interact" in note for note in lnp.decompose(Adapted(quantised), (X, Y)).notes)


def test_offloaded_parameters_are_refused_before_anything_happens():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(copy.deepcopy(network()), torch.device("cpu"))
    expected = model(X)
    with pytest.raises(ValueError, match=r"on the meta device.*load it without offloading"):
        lnp.decompose(model, (X, Y))
    assert torch.equal(model(X), expected)
