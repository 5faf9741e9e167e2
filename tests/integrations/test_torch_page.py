"""The page for a browser: its title, its table, how each run was measured, and its notes."""

from __future__ import annotations

import html
import math
import re

import pytest

import lnp
from integrations.drawn_runs import run, steps
from lnp.runs.table import HEADER, compare
from lnp.views import figures
from lnp.views.report import page, write_report


def part(text, heading):
    """What stands below a heading."""
    return text.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]


def test_the_page_is_named_after_its_runs():
    one, two = {"mine": run(rows=3)}, {"a": run(rows=3), "b": run(rows=3), "none": lnp.History()}
    for runs, title, expected in ((one, None, "mine"), (two, None, "2 runs"), (two, "Mine & ours", "Mine &amp; ours")):
        text = page(runs, title)
        assert f"<title>{expected}</title>" in text
        assert f"<h1>{expected}</h1>" in text


def test_the_table_is_that_of_the_runs_each_with_its_colour():
    runs = {"a": run(size=10), "b": run(1, size=1000), "c": run(2, size=100)}
    text = part(page(runs), "Runs")
    assert re.findall("<th>(.*?)</th>", text) == list(HEADER)
    rows = re.findall("<tr>(<td>.*?)</tr>", text)
    colours = figures.colours(runs)
    for row, cells in zip(rows, compare(runs), strict=True):
        first, *others = re.findall("<td>(.*?)</td>", row)
        assert [html.unescape(cell) for cell in others] == list(cells[1:])
        assert f'data-run="{cells[0]}"' in first
        assert f"background:{colours[cells[0]]}" in first
        assert first.endswith(f"</span>{cells[0]}</button>")


def test_each_figure_has_its_caption_and_the_library_is_in_the_page_once():
    runs = {"a": run(rows=9)}
    text = page(runs).partition("<h2>Figures</h2>")[2].partition("<h2>How it was measured")[0]
    drawn = figures.all_of(runs, figures.colours(runs))
    captions = [html.unescape(caption) for caption in re.findall("<figcaption>(.*?)</figcaption>", text)]
    assert captions == [caption for _, caption in drawn]
    assert text.count("<figure>") == text.count("Plotly.newPlot(") == len(drawn)
    assert text.count("plotly.js v") == 1
    assert text.index("plotly.js v") < text.index("Plotly.newPlot(")
    assert "<body>" not in text
    assert text.count('"responsive": true') == text.count('"displayModeBar": false') == len(drawn)


def measured(history):
    return re.findall("<li>(.*?)</li>", part(page({"a": history}), "How it was measured"))


def test_how_a_run_was_measured_is_told():
    rows = [
        {"step": 1000 * s, "loss": 1.0, "seconds": math.nan if s == 1 else 0.5, "samples": 2**s, "outputs": 3}
        | {"estimator": "exact" if s else "joint", "loss_name": "a & b"}
        for s in range(4)
    ]
    told = "4 measurements, steps 0 to 3,000; 8 samples x 3 outputs; trace: exact; loss: a &amp; b; 1.5 s of measuring"
    assert measured(lnp.History(rows)) == [f"<b>a</b>: {told}"]
    assert measured(steps([1.0], "loss")) == ["<b>a</b>: 1 measurements, steps 0 to 0"]
    assert measured(steps([1.0], "loss", samples=8)) == ["<b>a</b>: 1 measurements, steps 0 to 0"]
    assert measured(steps([1.0], "loss", outputs=8)) == ["<b>a</b>: 1 measurements, steps 0 to 0"]


def test_notes_have_the_step_from_which_on_they_hold():
    rows = [{"step": 1000 * s, "loss": 1.0} | ({"notes": "a note"} if s == 2 else {}) for s in range(4)]
    rows[3]["notes"] = ""
    text = part(page({"quiet": steps([1.0], "loss"), "a": lnp.History(rows)}), "Notes")
    assert text.strip() == "<ul><li><b>a</b>, from step 2,000: a note</li></ul>"
    assert part(page({"quiet": steps([1.0], "loss")}), "Notes").strip() == "<p>None.</p>"


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    path = tmp_path / "new" / "folder" / "page.html"
    for title in ("one", "two"):
        write_report({"a": run(rows=3)}, path, title)
        assert f"<title>{title}</title>" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no measurements"):
        page({})
