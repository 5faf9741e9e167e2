"""Small tables as text and as HTML, with the same cells."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

from lnp.printable import printable

Row = tuple[str, str, str, str]
"""A value's name, the value, its error or interval, and what it means."""


class Page(NamedTuple):
    """What a result shows: values below each other, a table with its columns' names, and lines of small print."""

    rows: Sequence[Row]
    head: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()

    def to_text(self) -> str:
        """For a terminal, with empty lines between the parts."""
        table = text_table(self.head, self.table) if self.table else []
        parts = (text_rows(self.rows), table, [printable(line) for line in self.lines])
        return "\n\n".join("\n".join(part) for part in parts if part)

    def to_html(self) -> str:
        """For a notebook."""
        values = f"<table>{html_rows(self.rows)}</table>" if self.rows else ""
        table = html_table(self.head, self.table) if self.table else ""
        return values + table + html_lines(self.lines)


class Shown:
    """A result with a page: printed as text, and in a notebook as HTML."""

    def _page(self) -> Page:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._page().to_text()

    def _repr_html_(self) -> str:
        return self._page().to_html()


def text_rows(rows: Sequence[Row]) -> list[str]:
    r"""Values below each other, with their errors and meanings.

    >>> print(*text_rows([("rate", "0.5", "", "speed"), ("chi_net", "76.8", "± 0.3", "scale")]), sep="\n")
    rate      0.5         speed
    chi_net  76.8 ± 0.3   scale
    """
    names, values, errors = (max((len(row[column]) for row in rows), default=0) for column in range(3))
    return [
        f"{name:<{names}}  {value:>{values}}{' ' if errors else ''}{error:<{errors}}   {meaning}".rstrip()
        for name, value, error, meaning in rows
    ]


def html_rows(rows: Sequence[Row]) -> str:
    """The same as rows of an HTML table."""
    return "".join(
        f"<tr><td style='text-align:left'><code>{name}</code></td>"
        f"<td style='text-align:right'>{html.escape(f'{value} {error}'.rstrip())}</td>"
        f"<td style='text-align:left'>{html.escape(meaning)}</td></tr>"
        for name, value, error, meaning in rows
    )


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    r"""Aligned columns under their names, the first one to the left.

    >>> print(*text_table(["layer", "rate"], [["head", "0.25"], ["body", "1"]]), sep="\n")
    layer  rate
    head   0.25
    body      1
    """
    cells = [[printable(cell) for cell in line] for line in (head, *lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]


def html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same as an HTML table."""

    def row(cells: Sequence[str], tag: str) -> str:
        sides = ("left", *["right"] * (len(cells) - 1))
        inner = (
            f"<{tag} style='text-align:{side}'>{html.escape(printable(cell))}</{tag}>"
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(inner)}</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(line, 'td') for line in lines)}</table>"


def html_lines(lines: Sequence[str]) -> str:
    """Small print below a table, such as notes."""
    return f"<small>{'<br>'.join(html.escape(printable(line)) for line in lines)}</small>"
