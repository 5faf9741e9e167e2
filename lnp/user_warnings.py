"""Warnings to the user, at the line of the user's own code."""

from __future__ import annotations

import logging
import sys
import warnings

from lnp.printable import printable


def warn(text: str) -> None:
    """Warn. Where a filter turns warnings into errors the text goes to the log: a warning must not end the run."""
    text = printable(text, keep="\n\t")
    try:
        warnings.warn(text, stacklevel=_user_level())
    except Warning:
        logging.getLogger("lnp").warning(text)


def _user_level() -> int:
    """The stack level of the caller outside of lnp, for `warnings.warn` in the calling function."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and _is_lnp(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    return level


def _is_lnp(module: str) -> bool:
    """Whether a module is one of lnp's, or the one that runs its context managers."""
    root = module.partition(".")[0]
    return root == "lnp" or root.startswith("lnp_") or root == "contextlib"
