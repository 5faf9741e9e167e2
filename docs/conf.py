"""The documentation site: `nox -s docs`, or `sphinx-build -W docs site` with what `lnp[docs]` installs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import lnp

project, author, release = "lnp", "The lnp developers", lnp.__version__
project_copyright = "the lnp developers, Apache-2.0"
extensions = ["myst_parser", "sphinx_design", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["gallery/figures", "paper.md"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "default"

html_theme = "furo"
html_title = f"lnp {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

ROOT = Path(__file__).parents[1]
OF_THE_REPOSITORY = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages whose text is a file beside the folder of the documentation."""
ELSEWHERE = {"../CONTRIBUTING.md": "contributing.md", "../docs/": "", "docs/": ""}
"""What files of the repository call by a path, and where it is on the site."""
SECTION = re.compile(r"^-{3,}$")
SPECIAL = re.compile(r"(?<!\\)([|*]|(?<=\w)_(?!\w))")


def link_pages(app: Any, name: str, source: list[str]) -> None:
    """The repository's own files as pages, and links to pages; of files that are no pages the name stays, as code."""
    if name in OF_THE_REPOSITORY:
        source[0] = (ROOT / OF_THE_REPOSITORY[name]).read_text(encoding="utf-8")

    def linked(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        page = next((target.replace(path, new, 1) for path, new in ELSEWHERE.items() if target.startswith(path)), None)
        return f"`{target.removeprefix('../')}`" if page is None else f"[{text}]({page})"

    source[0] = re.sub(r"(?<!!)\[([^\]\n]+)\]\(((?:\.\./(?!theory)|docs/)[^)\s]+)\)", linked, source[0])


def prepare_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: equations, which are indented, become literal blocks, and no character is markup."""
    lines[:] = one_name_each(lines)
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", ", ", 1)  # what stands before a colon would be taken for a type
    result: list[str] = []
    literal = example = section = False
    for number, line in enumerate(lines):
        indented, blank = line.startswith("    "), not line.strip()
        section = section or bool(SECTION.match(line))
        example = (example and not blank) or line.lstrip().startswith(">>> ")
        after_gap = number > 0 and not lines[number - 1].strip()
        if not section and not example and indented and after_gap and not literal:
            result += ["::", ""]
            literal = True
        literal = literal and (indented or blank)
        plain = literal or example or (section and SECTION.match(line))
        result.append(line if plain else escaped(line))
    lines[:] = result


def one_name_each(lines: list[str]) -> list[str]:
    """Attributes that share a description, `chi_loss, chi_net:`, one after the other."""
    result: list[str] = []
    for number, line in enumerate(lines):
        names = line.removesuffix(":").split(", ") if re.fullmatch(r"\w+(, \w+)+:", line) else []
        text = list(itertools.takewhile(lambda one: one.startswith("    "), lines[number + 1 :]))
        for name in names[:-1]:
            result += [f"{name}:", *text]
        result.append(f"{names[-1]}:" if names else line)
    return result


def escaped(line: str) -> str:
    """A line of text without markup of its own, but for what stands in backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else SPECIAL.sub(r"\\\1", part) for part in parts)


def setup(app: Any) -> None:
    """Have sources and docstrings prepared before Sphinx's own readers see them."""
    app.connect("source-read", link_pages)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
