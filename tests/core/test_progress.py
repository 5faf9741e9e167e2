"""Progress is shown on terminals only, and needs no library."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

import lnp
import lnp_numpy
from lnp.progress import bar

MODEL = lnp_numpy.LinearModel(np.zeros((1, 1)))


def test_no_terminal_no_output(capsys):
    with bar("reading", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for module in ("rich.console", "rich.progress", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    return monkeypatch


def test_a_terminal_without_libraries(terminal, capsys):
    with bar("reading", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_tqdm_is_used_where_it_is_installed(terminal):
    seen = []

    class Shown:
        def __init__(self, total, desc, leave, file):
            seen.append((desc, total))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append("closed")

        def update(self, done):
            seen.append(done)

    module = types.ModuleType("tqdm")
    module.tqdm = Shown
    terminal.setitem(sys.modules, "tqdm", module)
    with bar("reading", 10) as advance:
        advance(4)
        advance(6)
    assert seen == [("reading", 10), 4, 6, "closed"]
    seen.clear()
    lnp.measure_checkpoints(lambda step: MODEL, [0, 5, 9], (np.ones((2, 1)), np.ones((2, 1))))
    assert seen == [("measuring checkpoints", 3), 1, 1, 1, "closed"]
