"""Where a tracker's values can go: functions (values, step), made for TensorBoard, Weights & Biases, MLflow and
trackio.

Values have names with slashes, "lnp/chi_pos" or "lnp/layer/head/chi_net", and are floats; a value that is not finite is
passed on as it is. Libraries are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from lnp.optional import import_optional

Logger = Callable[[Mapping[str, float], int], Any]


@runtime_checkable
class ScalarWriter(Protocol):
    """A TensorBoard writer."""

    def add_scalar(self, name: str, value: float, step: int, /) -> Any:
        """Write one value."""


@runtime_checkable
class LoggingRun(Protocol):
    """A run of Weights & Biases or trackio."""

    def log(self, values: dict[str, float], /, *, step: int) -> Any:
        """Log the values of one step."""


LoggerSource = Logger | ScalarWriter | LoggingRun
LoggerSources = LoggerSource | list[LoggerSource] | tuple[LoggerSource, ...]


def tensorboard(writer: ScalarWriter) -> Logger:
    """A logger to a TensorBoard writer (`torch.utils.tensorboard.SummaryWriter`, `tensorboardX`), or to a folder.

    A folder needs tensorboardX or PyTorch's writer made by the caller; pass the writer that the run has anyway.

    Raises
    ------
    TypeError
        If the writer has no `add_scalar`.
    """
    if not isinstance(writer, ScalarWriter):
        raise TypeError(
            f"tensorboard() received a {type(writer).__name__}. Expected a writer with add_scalar(name, value, step), "
            "such as torch.utils.tensorboard.SummaryWriter(folder)."
        )

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log


def wandb(run: LoggingRun | None = None) -> Logger:
    """A logger to a Weights & Biases run; without one, to the run that is active.

    The service takes steps in rising order only. Values are logged at the run's own step if that is ahead, and carry
    "lnp/step", against which the charts of "lnp/..." are drawn.
    """
    return _wandb_like(lambda: run if run is not None else _active("wandb"))


def trackio(run: LoggingRun | None = None) -> Logger:
    """A logger to a trackio run; without one, to the run that is active."""
    return _wandb_like(lambda: run if run is not None else import_optional("trackio", "lnp.loggers.trackio()"))


def mlflow(run_id: str | None = None) -> Logger:
    """A logger to MLflow's active run, or to the run with this id."""
    client = import_optional("mlflow", "lnp.loggers.mlflow()")
    chosen = {} if run_id is None else {"run_id": run_id}
    return lambda values, step: client.log_metrics(dict(values), step=step, **chosen)


def as_loggers(loggers: LoggerSources) -> list[Logger]:
    """A list of loggers, also from one that stands alone."""
    return [as_logger(logger) for logger in (loggers if isinstance(loggers, list | tuple) else [loggers])]


def as_logger(given: LoggerSource) -> Logger:
    """A logger from what users have: a function, a TensorBoard writer, a Weights & Biases run.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(given, ScalarWriter):
        return tensorboard(given)
    if isinstance(given, LoggingRun) and not isinstance(given, type):
        return _wandb_like(lambda: given)
    if callable(given):
        return given
    raise TypeError(
        f"A logger is of type {type(given).__name__}. Expected a function (values, step), a TensorBoard writer, a "
        "Weights & Biases run, or what lnp.loggers makes."
    )


def _active(module: str) -> LoggingRun:
    """The active run of a library; a RuntimeError where there is none."""
    library = import_optional(module, f"lnp.loggers.{module}()")
    if library.run is None:
        raise RuntimeError(f"{module} has no active run. Expected {module}.init() before the first measurement.")
    return library.run


def _wandb_like(find: Callable[[], LoggingRun]) -> Logger:
    """A logger to the run that `find` returns, whose own step may be ahead of the tracker's."""
    first = True

    def log(values: Mapping[str, float], step: int) -> None:
        nonlocal first
        run = find()
        if first and hasattr(run, "define_metric"):
            run.define_metric("lnp/*", step_metric="lnp/step")
        first = False
        ahead = getattr(run, "step", None)
        run.log(dict(values), step=max(step, ahead) if isinstance(ahead, int) else step)

    return log
