"""The gallery's page shows every study, and every study has its figure."""

from __future__ import annotations

import ast
import re
from pathlib import Path

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
PAGE = " ".join((GALLERY / "README.md").read_text(encoding="utf-8").split())
STUDIES = sorted(path.name for path in GALLERY.glob("[0-9][0-9]_*.py"))


def test_page_studies_and_figures_belong_together():
    assert len(STUDIES) >= 6
    assert sorted(set(re.findall(r"\]\((\d\d_\w+\.py)\)", PAGE))) == STUDIES
    figures = [f"figures/{Path(name).stem}.png" for name in STUDIES]
    assert re.findall(r"\]\((figures/\S+)\)", PAGE) == figures
    assert all((GALLERY / figure).stat().st_size > 10_000 for figure in figures)


def test_studies_compile_and_say_what_they_do():
    for path in GALLERY.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
    assert PAGE.count("*Claim*") == PAGE.count("*Measured*") == PAGE.count("*Where it differs*") == len(STUDIES)
    assert ".[gallery]" in PAGE
