"""What a tracker needs around a measurement: its options, its row, the number of its process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from lnp import measure
from lnp.cross import CrossResponse
from lnp.decomposition import Decomposition


class Watched:
    """A step that is being taken.

    Attributes
    ----------
    decomposition:
        Of before the update; None where nothing is measured.
    model:
        The model after the update.
    """

    def __init__(self, decomposition: Decomposition | None, model: Any) -> None:
        self.decomposition, self.model = decomposition, model

    def after(self, model: Any) -> None:
        """Say what the update has made of the model, where it is a new one."""
        self.model = model


def process_rank() -> int:
    """The number of this process among those that train together, from the environment.

    Raises
    ------
    ValueError
        If the variable holds no integer.
    """
    for name in ("RANK", "LOCAL_RANK"):
        if value := os.environ.get(name):
            try:
                return int(value)
            except ValueError as error:
                raise ValueError(
                    f"The environment variable {name} is {value!r}. Expected the number of the process. Pass rank= to "
                    "the tracker if it means something else."
                ) from error
    return 0


def cross_values(cross: CrossResponse) -> dict[str, Any]:
    """The cross response under "cross/...", and the decomposition of its measured batch under "measured/..."."""
    names = ("rate", "chi_loss", "chi_net", "chi_pos", "chi_net_stderr", "chi_pos_stderr")
    flat = {f"cross/{name}": getattr(cross, name) for name in names}
    return flat | {f"measured/{name}": value for name, value in cross.measured.to_dict().items()}


def moved(seed: Any, step: int) -> Any:
    """Another seed at each step, so that errors average out over a window; keys of other kinds stay as they are."""
    return seed + step if isinstance(seed, int) else seed


def check_options(options: Mapping[str, Any]) -> None:
    """A TypeError for options that `lnp.decompose` does not have."""
    known = [name for name in inspect.signature(measure.decompose).parameters if name not in ("model", "batch")]
    wrong = sorted(set(options) - set(known))
    if wrong:
        raise TypeError(
            f"Tracker received the options {', '.join(wrong)}. Expected path, schedule, batch, tags, loggers, rank, "
            f"fsync, or an option of lnp.decompose: {', '.join(known)}."
        )
