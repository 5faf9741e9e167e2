"""Where a tracker's values can go: functions (values, step), made for TensorBoard, Weights & Biases, MLflow and
trackio.

Values have names with slashes, "lnp/chi_pos" or "lnp/layer/head/chi_net", and are floats; a value that is not finite is
passed on as it is. Libraries are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lnp.optional import import_optional

Logger = Callable[[Mapping[str, float], int], Any]


def tensorboard(writer: Any) -> Logger:
    """To a TensorBoard writer (`torch.utils.tensorboard.SummaryWriter`, `tensorboardX`), or to a folder.

    A folder needs tensorboardX or PyTorch's writer made by the caller; pass the writer that the run has anyway.

    Raises
    ------
    TypeError
        If the writer has no `add_scalar`.
    """
    if not hasattr(writer, "add_scalar"):
        raise TypeError(
            f"tensorboard() received a {type(writer).__name__}. Expected a writer with add_scalar(name, value, step), "
            "such as torch.utils.tensorboard.SummaryWriter(folder)."
        )

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log


def wandb(run: Any = None) -> Logger:
    """To a Weights & Biases run; without one, to the run that is active.

    The service takes steps in rising order only. Values are logged at the run's own step if that is ahead, and carry
    "lnp/step", against which the charts of "lnp/..." are drawn.
    """
    return _wandb_like(lambda: run if run is not None else _active("wandb"))


def trackio(run: Any = None) -> Logger:
    """To a trackio run; without one, to the run that is active."""
    return _wandb_like(lambda: run if run is not None else import_optional("trackio", "lnp.loggers.trackio()"))


def mlflow(run_id: str | None = None) -> Logger:
    """To MLflow's active run, or to the run with this id."""
    client = import_optional("mlflow", "lnp.loggers.mlflow()")
    chosen = {} if run_id is None else {"run_id": run_id}
    return lambda values, step: client.log_metrics(dict(values), step=step, **chosen)


def as_loggers(given: Any) -> list[Logger]:
    """The loggers in a list, or of one that stands alone."""
    return [as_logger(logger) for logger in (given if isinstance(given, list | tuple) else [given])]


def as_logger(given: Any) -> Logger:
    """A logger from what users have: a function, a TensorBoard writer, a Weights & Biases run.

    Raises
    ------
    TypeError
        For anything else.
    """
    if hasattr(given, "add_scalar"):
        return tensorboard(given)
    if hasattr(given, "log") and not isinstance(given, type):
        return _wandb_like(lambda: given)
    if callable(given):
        return given
    raise TypeError(
        f"A logger is of type {type(given).__name__}. Expected a function (values, step), a TensorBoard writer, a "
        "Weights & Biases run, or what lnp.loggers makes."
    )


def _active(module: str) -> Any:
    library = import_optional(module, f"lnp.loggers.{module}()")
    if library.run is None:
        raise RuntimeError(f"{module} has no active run. Expected {module}.init() before the first measurement.")
    return library.run


def _wandb_like(find: Callable[[], Any]) -> Logger:
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
