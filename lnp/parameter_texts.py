"""Parameters that functions share are described once, and written out in the docstring of each: `help()` shows them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterator
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)
SECTION = re.compile(r"^Parameters\n-+\n(.*?)(?=^\w+[^\n]*\n-+\n|\Z)", re.M | re.S)
ENTRY = re.compile(r"^(\w+(?:, \w+)*):\n((?:    [^\n]*\n|\n)*)", re.M)
OTHERS = ("options", "others")


def parameters_of(source: Callable, without: Container[str] = ()) -> Callable[[F], F]:
    """A decorator: an entry that says "As for `source`." gets the texts that the source's docstring has.

    An entry for `options` or `others` gets those of all parameters that have no entry of their own, but for `without`.

    >>> def area(width):
    ...     '''Of a square.
    ...
    ...     Parameters
    ...     ----------
    ...     width:
    ...         In metres.
    ...     '''
    >>> @parameters_of(area)
    ... def volume(width, height):
    ...     '''Of a box.
    ...
    ...     Parameters
    ...     ----------
    ...     height:
    ...         In feet.
    ...     width:
    ...         As for `area`. At the ground.
    ...     '''
    >>> print(volume.__doc__)
    Of a box.
    <BLANKLINE>
    Parameters
    ----------
    height:
        In feet.
    width:
        In metres.
        At the ground.
    """
    known = {name: text for name, text in _entries(source) if name not in without}
    reference = re.compile(rf"    As for `(?:[\w.]+\.)?{source.__name__}`[.;] *")

    def write(function: F) -> F:
        text = inspect.getdoc(function) or ""
        signature = inspect.signature(function).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
        own = {name for names, _ in _entries(function, joined=True) for name in names.split(", ")}

        def written(found: re.Match) -> str:
            names, body = found[1].split(", "), found[2]
            if not reference.match(body):
                return found[0]
            more = reference.sub("    ", body, count=1)
            if not set(names).isdisjoint(OTHERS):
                names = [name for name in names if name not in OTHERS]
                names += [name for name in known if name not in own and (takes_any or name in signature)]
            texts = [f"{name}:\n{known[name].rstrip()}\n" for name in names]
            return "".join(texts) + (more if more.strip() else "")

        section: Any = SECTION.search(text)
        start, stop = section.span(1)
        filled = ENTRY.sub(written, f"{text[start:stop].rstrip()}\n")
        function.__doc__ = f"{text[:start]}{filled}\n{text[stop:]}".rstrip()
        return function

    return write


def _entries(function: Callable, joined: bool = False) -> Iterator[tuple[str, str]]:
    """(name, text) of each parameter that a docstring describes; with `joined` the names as they stand together."""
    section = SECTION.search(inspect.getdoc(function) or "")
    for names, body in ENTRY.findall(f"{section[1].rstrip()}\n" if section else ""):
        yield from [(names, body)] if joined else [(name, body) for name in names.split(", ")]
