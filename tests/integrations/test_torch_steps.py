"""Updates of any optimizer: predicted and measured loss change, with the step's own dropout masks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lnp
from lnp_torch.optimizers import preconditioner

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-4),
    "momentum": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-5),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-5, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-6),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 1e-5, max_iter=1),
}


def setup(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    return model, (torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,)))


def value(model, batch, state):
    """The loss with the dropout mask that this random state draws."""
    current = torch.get_rng_state()
    torch.set_rng_state(state)
    with torch.no_grad():
        loss = F.cross_entropy(model(batch[0]), batch[1]).item()
    torch.set_rng_state(current)
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    model, batch = setup()
    optimizer = OPTIMIZERS[name](model.parameters())
    # coupled: frozen batch statistics are another function, of another gradient
    tracker = lnp.Tracker(schedule=1, batch_statistics="coupled", max_probes=2)
    for step in range(3):
        state = torch.get_rng_state()
        losses = [value(model, batch, state)]
        with tracker.step(step, model, batch):

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                return loss

            optimizer.step(closure)
        losses.append(value(model, batch, state))
        row = tracker.history.rows()[-1]
        assert row["loss"] == pytest.approx(losses[0], rel=1e-12)
        # a difference of 1e-5 between losses that are rounded to 1e-16
        assert row["update/measured"] == pytest.approx(losses[1] - losses[0], rel=1e-9)
        assert row["update/predicted"] == pytest.approx(row["update/measured"], rel=0.02)
        if name == "sgd":
            assert row["update/predicted"] == pytest.approx(-1e-4 * row["rate"], rel=1e-9)


def test_nothing_is_changed_by_looking():
    ends = []
    for watch in (False, True):
        model, batch = setup()
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        tracker = lnp.Tracker(schedule=1 if watch else (lambda step: False))
        for step in range(4):
            with tracker.step(step, model, batch):
                optimizer.zero_grad()
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


def test_a_function_with_parameters():
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    batch = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    model = (lambda p, x: x @ p["w"], {"w": weight})
    before = lnp.snapshot(model)
    with torch.no_grad():
        weight += 0.5
    step = lnp.step_taken(before, model, batch)
    assert (step.predicted, step.measured) == pytest.approx((-1.0, -0.75))


def test_another_model_is_refused():
    before = lnp.snapshot(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"other trained parameters than before: \['bias'\]"):
        lnp.step_taken(before, nn.Linear(2, 1, bias=False), (torch.ones(1, 2), torch.ones(1, 1)))


PRECONDITIONED = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2, momentum_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "centered": lambda p: torch.optim.RMSprop(p, 1e-2, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
}


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_the_preconditioner_is_the_one_of_the_update(name):
    # without momentum the update is -lr M grad: the next one shows M, once v has hardly moved
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))
    optimizer = PRECONDITIONED[name](model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0
        if "betas" in group:
            group["betas"] = (0.0, 1 - 1e-9)
        if "alpha" in group:
            group["alpha"] = 0.99 if name == "centered" else 1 - 1e-9
        if "rho" in group:
            group["rho"] = 1 - 1e-9
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    if name == "adagrad":
        for state in optimizer.state.values():
            state["sum"] += 1e9
    m = preconditioner(optimizer, model)
    d = lnp.decompose(model, batch, preconditioner=m, estimator="exact")
    before = lnp.snapshot(model)
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    expected = sum((p.grad**2 * m[n]).sum().item() for n, p in model.named_parameters())
    assert d.rate == pytest.approx(expected, rel=1e-9)
    optimizer.step()
    taken = lnp.step_taken(before, model, batch)
    # an average over three gradients before, over four in the update
    exact = ("adagrad", "sgd")
    assert taken.predicted == pytest.approx(-1e-2 * d.rate, rel=1e-6 if name in exact else 0.25)


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_parameters_without_an_update_are_told_of(name):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = PRECONDITIONED[name](model.parameters())
    adaptive = name != "sgd"

    def warnings_of_preconditioner():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = preconditioner(optimizer, model)
        return made, [str(warning.message) for warning in caught]

    made, told = warnings_of_preconditioner()
    assert all(torch.equal(m, torch.ones_like(m)) for m in made.values())
    assert ["not updated 4 of its 4 parameters yet (0.weight...)" in text for text in told] == [True] * adaptive
    model[0].requires_grad_(False)
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    _, told = warnings_of_preconditioner()
    assert told == []  # what is frozen is not trained
    model[0].requires_grad_(True)
    _, told = warnings_of_preconditioner()
    assert ["not updated 2 of its 4 parameters yet (0.weight...)" in text for text in told] == [True] * adaptive
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    _, told = warnings_of_preconditioner()
    assert told == []


def test_an_update_that_a_scaler_skipped_is_none():
    """Fused Adam then has averages of zero, and has made no update."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [0, 0]
    with pytest.warns(UserWarning, match="not updated 2 of its 2 parameters"):
        made = preconditioner(optimizer, model)
    assert all(torch.equal(m, torch.ones_like(m)) for m in made.values())


@pytest.mark.parametrize(
    ("rates", "scales"), [((0.0, 0.1, 0.2), (0, 1, 2)), ((0.2, 0.1, 0.0), (1, 0.5, 0)), ((0, 0, 0), (1, 1, 1))]
)
def test_learning_rates_of_groups_are_relative_to_the_first_that_is_not_zero(rates, scales):
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in rates))
    optimizer = torch.optim.SGD(
        [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(model, rates, strict=True)]
    )
    assert [m.item() for m in preconditioner(optimizer, model).values()] == pytest.approx(scales)


def test_another_optimizer_is_refused():
    model = nn.Linear(2, 1)
    for kind in ("Adamax", "RAdam", "Rprop", "LBFGS", "Adafactor"):
        optimizer = getattr(torch.optim, kind)(model.parameters())
        with pytest.raises(TypeError, match=f"The update of {kind} is not known"):
            preconditioner(optimizer, model)
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        preconditioner(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), nn.Linear(1, 1))
