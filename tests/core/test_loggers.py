"""Trackers' values reach the services that people log to, under steps that these take. Stand-ins for the services."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import lnp.loggers


class Service:
    """What Weights & Biases, trackio and MLflow have in common with a list."""

    def __init__(self, step=None):
        self.calls, self.defined = [], []
        if step is not None:
            self.step = step

    def log(self, values, step=None):
        self.calls.append((values, step))

    def log_metrics(self, values, step=None, **more):
        self.calls.append((values, step, more))

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))


class Writer:
    """A TensorBoard writer as a list."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))


@pytest.fixture
def installed(monkeypatch):
    """All three services, of which Weights & Biases has no active run."""
    module, service = ModuleType("service"), Service()
    module.run, module.log, module.log_metrics, module.calls = None, service.log, service.log_metrics, service.calls
    for name in ("wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def test_wandb_gets_no_step_behind_its_own():
    service = Service(step=10)
    logger = lnp.loggers.wandb(service)
    logger({"lnp/step": 3.0}, 3)
    logger({"lnp/step": 30.0}, 30)
    assert service.calls == [({"lnp/step": 3.0}, 10), ({"lnp/step": 30.0}, 30)]


def test_a_run_that_is_handed_over_gets_no_step_behind_its_own():
    service = Service(step=10)
    lnp.loggers.as_logger(service)({"a": 1.0}, 3)
    assert service.calls == [({"a": 1.0}, 10)]


def test_a_run_without_a_step_of_its_own_gets_the_trackers():
    service = Service()
    lnp.loggers.trackio(service)({"a": 1.0}, 3)
    assert service.calls == [({"a": 1.0}, 3)]


def test_a_step_that_is_no_number_is_not_compared():
    service = Service(step="third")
    lnp.loggers.wandb(service)({"a": 1.0}, 3)
    assert service.calls == [({"a": 1.0}, 3)]


def test_the_axis_of_the_charts_is_defined_once():
    service = Service()
    logger = lnp.loggers.wandb(service)
    logger({}, 0)
    logger({}, 1)
    assert service.defined == [("lnp/*", "lnp/step")]


def test_services_get_a_copy_which_they_may_change():
    service, values = Service(), {"a": 1.0}
    lnp.loggers.wandb(service)(values, 0)
    service.calls[0][0]["b"] = 2.0
    assert values == {"a": 1.0}


def test_wandb_finds_the_run_that_is_active_when_values_come(installed):
    logger = lnp.loggers.wandb()
    installed.run = Service()
    logger({"a": 1.0}, 1)
    assert installed.run.calls == [({"a": 1.0}, 1)]


def test_without_an_active_run_wandb_says_what_is_missing(installed):
    with pytest.raises(RuntimeError, match=r"no active run. Expected wandb.init\(\) before"):
        lnp.loggers.wandb()({}, 0)


def test_trackio_logs_to_the_run_that_is_active(installed):
    lnp.loggers.trackio()({"a": 2.0}, 2)
    assert installed.calls == [({"a": 2.0}, 2)]


def test_mlflow_logs_to_the_active_run_or_to_the_one_that_is_named(installed):
    lnp.loggers.mlflow()({"a": 3.0}, 3)
    lnp.loggers.mlflow("r")({"a": 4.0}, 4)
    assert installed.calls == [({"a": 3.0}, 3, {}), ({"a": 4.0}, 4, {"run_id": "r"})]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_service_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"lnp.loggers.{name}\(\) needs {name}"):
        getattr(lnp.loggers, name)()({}, 0)


@pytest.mark.parametrize("make", [lnp.loggers.tensorboard, lnp.loggers.as_logger])
def test_a_writer_gets_each_value_under_its_name(make):
    writer = Writer()
    make(writer)({"lnp/chi_pos": 0.5, "lnp/chi_net": 7.0}, 3)
    assert writer.written == [("lnp/chi_pos", 0.5, 3), ("lnp/chi_net", 7.0, 3)]


def test_what_cannot_write_is_refused_as_a_writer():
    with pytest.raises(TypeError, match=r"received a str\..*SummaryWriter"):
        lnp.loggers.tensorboard("folder")


def test_a_class_is_called_although_its_instances_log():
    made = []

    class Row:
        def __init__(self, values, step):
            made.append((values, step))

        def log(self, values, *, step):
            """As a run has it."""

    lnp.loggers.as_logger(Row)({"a": 1.0}, 2)
    assert made == [({"a": 1.0}, 2)]


@pytest.mark.parametrize("several", [list, tuple])
def test_loggers_may_stand_alone_or_side_by_side(several):
    first, second = print, repr
    assert lnp.loggers.as_loggers(first) == [first]
    assert lnp.loggers.as_loggers(several([first, second])) == [first, second]
