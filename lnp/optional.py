"""Dependencies that only some functions need: imported when they are used, so that lnp itself needs none of them."""

from __future__ import annotations

import importlib
from typing import Any


def import_optional(module: str, user: str, *, install: str = "", library: str = "") -> Any:
    """A module by its import name, or an error that says how to get it.

    Parameters
    ----------
    module:
        The import name, with dots for a submodule.
    user:
        What needs it, as the error names it.
    install:
        What pip has to install. Default: lnp's extra of the module's name.
    library:
        What people call the library. Default: the module's name.

    Raises
    ------
    ImportError
        If it is not installed.

    >>> import_optional("made_up", "to_made_up()")
    Traceback (most recent call last):
    ImportError: to_made_up() needs made_up, which is not installed. Run: pip install 'lnp[made_up]'
    """
    try:
        importlib.import_module(module.partition(".")[0])  # a submodule may be loaded where its package is blocked
        return importlib.import_module(module)
    except ImportError as error:
        remedy = install or f"'lnp[{module}]'"
        raise ImportError(
            f"{user} needs {library or module}, which is not installed. Run: pip install {remedy}"
        ) from error
