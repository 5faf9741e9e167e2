"""Models before and after an update. They are values: nothing changes them."""

from __future__ import annotations

from typing import Any

import numpy as np


def snapshot(model: Any) -> Any:
    """The model itself."""
    return model


def difference(before: Any, after: Any) -> dict[str, np.ndarray]:
    """What the update added to each parameter."""
    return {name: after.parameters[name] - p for name, p in before.parameters.items()}
