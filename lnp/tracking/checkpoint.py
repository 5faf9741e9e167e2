"""What a tracker puts into a checkpoint, and how it goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lnp.tracking.measurement import StepMeasurer
from lnp.tracking.recorder import Recorder
from lnp.tracking.step_selection import StepSelection

VERSION = 1
"""Version of the state that a checkpoint holds."""


def state_of(selection: StepSelection, measurer: StepMeasurer, recorder: Recorder) -> dict[str, Any]:
    """The state, of numbers, texts and lists of them; with the rows where there is no file to hold them."""
    return {
        "version": VERSION,
        **selection.state_dict(),
        "batches": None if measurer.source is None else measurer.source.position,
        "net": None if measurer.net is None else measurer.net.state_dict(),
        "rows": recorder.history.rows() if recorder.path is None else None,
    }


def restore(state: Mapping[str, Any], selection: StepSelection, measurer: StepMeasurer, recorder: Recorder) -> None:
    """Go on from a checkpoint's state, also with another schedule than the one it was made with.

    Raises
    ------
    ValueError
        For a state that this version does not know.
    """
    if state.get("version") != VERSION:
        raise ValueError(
            f"The state has version {state.get('version')!r}. Expected {VERSION}, as state_dict() writes it. "
            "Start with a new tracker; its file, if any, is continued."
        )
    selection.load_state_dict(state)
    if measurer.source is not None and state["batches"] is not None:
        measurer.source.seek(state["batches"])
    if measurer.net is not None and state.get("net") is not None:
        measurer.net.load_state_dict(state["net"])
    if recorder.path is None and state["rows"] is not None:
        recorder.restore(state["rows"])
