"""Bad input gets an error with what was received, what was expected and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lnp

MODEL = nn.Linear(4, 3)
X, Y = torch.ones(5, 4), torch.tensor([0, 1, 2, 0, 1])


Classes = nn.CrossEntropyLoss
LOADER = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2)


def only_used():
    with torch.inference_mode():
        return nn.Linear(4, 3)


def frozen():
    return nn.Linear(4, 3).requires_grad_(False)


class Named(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x, labels):
        return super().forward(x)


CASES = {
    "no trainable parameter": (ValueError, "no trainable parameter", lambda: lnp.decompose(frozen(), (X, Y))),
    "no parameter at all": (ValueError, "no trainable parameter", lambda: lnp.decompose(nn.Tanh(), (X, Y))),
    "selection picks nothing": (
        ValueError, "picks no parameter", lambda: lnp.decompose(MODEL, (X, Y), parameters="head.*")
    ),
    "unknown names": (ValueError, "does not have", lambda: lnp.decompose(MODEL, (X, Y), parameters=["wieght"])),
    "unknown loss": (ValueError, "Unknown loss 'nll'", lambda: lnp.decompose(MODEL, (X, Y), "nll")),
    "loss of a wrong type": (TypeError, "loss is 3", lambda: lnp.decompose(MODEL, (X, Y), 3)),
    "loss not scalar": (
        ValueError, "loss has shape .5,.",
        lambda: lnp.decompose(MODEL, (X, Y), nn.CrossEntropyLoss(reduction="none"))
    ),
    "loss not a tensor": (TypeError, "returned float", lambda: lnp.decompose(MODEL, (X, Y), lambda f, y: 1.0)),
    "loss detached": (
        ValueError, "does not depend on the outputs",
        lambda: lnp.decompose(MODEL, (X, Y), lambda f, y: f.detach().sum())
    ),
    "a batch on another device": (
        ValueError, "The batch is on meta, the model on cpu. .* batch.to.'cpu'.",
        lambda: lnp.decompose(MODEL, (X.to("meta"), Y.to("meta")))
    ),
    "a dictionary on another device": (
        ValueError, "The batch is on meta", lambda: lnp.decompose(Named(), {"x": X.to("meta"), "labels": Y.to("meta")})
    ),
    "two batches on another device": (
        ValueError, "The batch is on meta",
        lambda: lnp.cross_response(MODEL, (X.to("meta"), Y.to("meta")), (X.to("meta"), Y.to("meta")))
    ),
    "labels out of range": (ValueError, "outside \\[0, 3\\)", lambda: lnp.decompose(MODEL, (X, Y + 1))),
    "labels negative": (ValueError, "outside \\[0, 3\\)", lambda: lnp.decompose(MODEL, (X, Y - 3))),
    "labels out of range of a module's loss": (
        ValueError, "outside \\[0, 3\\)", lambda: lnp.decompose(MODEL, (X, Y + 9), nn.CrossEntropyLoss())
    ),
    "labels of another shape": (ValueError, "do not match", lambda: lnp.decompose(MODEL, (X, Y[:, None, None]))),
    "targets of another shape": (
        ValueError, "cannot be inferred", lambda: lnp.decompose(MODEL, (X, torch.zeros(5, 2)))
    ),
    "mse of another shape": (ValueError, "do not match", lambda: lnp.decompose(MODEL, (X, torch.zeros(5, 1)), "mse")),
    "fewer targets": (ValueError, "hold 5 samples", lambda: lnp.decompose(MODEL, (X, Y[:3]), lambda f, y: f.sum())),
    "empty batch": (ValueError, "batch is empty", lambda: lnp.decompose(MODEL, (X[:0], Y[:0]))),
    "batch not a pair": (TypeError, "Expected a pair", lambda: lnp.decompose(MODEL, X)),
    "dictionary without labels for a loss": (
        ValueError, "without labels, which are what loss= is called with",
        lambda: lnp.decompose(MODEL, {"input": X}, "mse"),
    ),
    "dictionary without a loss": (ValueError, "returned no loss", lambda: lnp.decompose(MODEL, {"input": X})),
    "dictionary for a model without a loss": (
        ValueError, "returned no loss",
        lambda: lnp.decompose(MODEL, {"input": X, "labels": Y}, forward=lambda m, inputs: m(inputs["input"])),
    ),
    "parameters themselves": (
        TypeError, "generator of Parameter. Expected names",
        lambda: lnp.decompose(MODEL, (X, Y), parameters=MODEL.parameters())
    ),
    "a loss's class": (TypeError, "class CrossEntropyLoss.*Make one", lambda: lnp.decompose(MODEL, (X, Y), Classes)),
    "arrays of NumPy": (
        TypeError, "inputs are a numpy.ndarray of shape .5, 4.*torch.as_tensor",
        lambda: lnp.decompose(MODEL, (X.numpy(), Y.numpy()))
    ),
    "targets of NumPy": (TypeError, "targets are a numpy.ndarray", lambda: lnp.decompose(MODEL, (X, Y.numpy()))),
    "lists": (TypeError, "inputs are nested lists of 5 rows", lambda: lnp.decompose(MODEL, (X.tolist(), Y.tolist()))),
    "a data loader": (TypeError, "DataLoader, which gives batches.*next.iter", lambda: lnp.decompose(MODEL, LOADER)),
    "an optimizer for a preconditioner": (
        ValueError, "of type SGD does not match",
        lambda: lnp.decompose(MODEL, (X, Y), preconditioner=torch.optim.SGD(MODEL.parameters(), 0.1))
    ),
    "a model of inference mode": (ValueError, "inference_mode.*state_dict", lambda: lnp.decompose(only_used(), (X, Y))),
    "outputs without samples": (
        ValueError, "one sample axis", lambda: lnp.decompose(MODEL, (X, Y), "mse", forward=lambda m, x: m(x).sum())
    ),
    "no outputs": (
        ValueError, "no floating-point outputs", lambda: lnp.decompose(MODEL, (X, Y), forward=lambda m, x: None)
    ),
    "forward for a function": (
        ValueError, "forward= was given",
        lambda: lnp.decompose((lambda p, x: x * p, torch.ones(4)), (X, X), forward=lambda m, x: m),
    ),
    "not a model": (TypeError, "no backend accepts", lambda: lnp.decompose(lambda x: x, (X, Y))),
    "update of another structure": (
        ValueError, "does not match the model's parameters",
        lambda: lnp.measured_loss_change(MODEL, (X, Y), update={"weight": torch.zeros(2)}),
    ),
    "no step": (ValueError, "neither", lambda: lnp.predicted_loss_change(MODEL, (X, Y))),
    "uninitialised": (ValueError, "not initialised", lambda: lnp.decompose(nn.LazyLinear(3), (X, Y))),
    "ambiguous classes": (
        ValueError, "axis 1 or on the last",
        lambda: lnp.decompose(nn.Conv1d(3, 3, 1), (torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.long))),
    ),
    "one output and labels": (
        ValueError, "without an axis for classes",
        lambda: lnp.decompose(MODEL, (X, Y), forward=lambda m, x: m(x).sum(1)),
    ),
    "estimator": (ValueError, "Unknown estimator", lambda: lnp.decompose(MODEL, (X, Y), estimator="hutchinson")),
    "microbatch": (ValueError, "microbatch is 0", lambda: lnp.decompose(MODEL, (X, Y), microbatch=0)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_error(case):
    kind, match, call = CASES[case]
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "xpected" in str(caught.value)
