"""What a tracker has kept so far, to be read while a run goes on and after it."""

from __future__ import annotations

from typing import Any

from lnp.tracking.history import History
from lnp.tracking.recorder import Recorder


class KeptRows:
    """Reads the rows of a recorder."""

    _recorder: Recorder

    @property
    def latest(self) -> dict[str, float]:
        """The last measurement as loggers get it: {"lnp/chi_pos": 0.01, ...}."""
        return self._recorder.latest

    @property
    def history(self) -> History:
        """The measurements so far, also those of earlier processes."""
        return self._recorder.history

    def to_pandas(self, by_layer: bool = False) -> Any:
        """The history as a `pandas.DataFrame`."""
        return self.history.to_pandas(by_layer)

    def to_polars(self, by_layer: bool = False) -> Any:
        """The history as a `polars.DataFrame`."""
        return self.history.to_polars(by_layer)
