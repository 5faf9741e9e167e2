"""Texts from elsewhere, such as names of files and layers, as a terminal or a page may show them."""

from __future__ import annotations

import os
import unicodedata

UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that move the cursor, change colours or turn the direction of a text."""


def printable(text: str | os.PathLike, keep: str = "") -> str:
    r"""The text with control characters written out, except for those to `keep`.

    >>> printable("run\x1b[31m.jsonl")
    'run\\x1b[31m.jsonl'
    """
    text = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if c not in keep and unicodedata.category(c) in UNSEEN else c for c in text)
