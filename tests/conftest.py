"""Every test starts from the same random numbers, whichever tests ran before it in its process."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # these machines are noisy: no test is timed
hypothesis.settings.load_profile("untimed")

LINES = Path(__file__).with_name("thorough.txt").read_text(encoding="utf-8").splitlines()
NAMED = [line.split(" @") for line in LINES if line and not line.startswith("#")]
THOROUGH = {name for name, *where in NAMED if not where or os.environ.get("KERAS_BACKEND") in where}


GENERATORS: dict[np.random.Generator, dict] = {}
"""Those of the modules that have tests, with their states before the first test."""


def generators(module):
    values = [getattr(value, "__self__", value) for value in getattr(module, "__dict__", {}).values()]
    return [value for value in values if isinstance(value, np.random.Generator)]


def pytest_collection_modifyitems(items):
    """The tests of thorough.txt have the mark `thorough`."""
    for module in {getattr(item, "module", None) for item in items} - {None}:
        GENERATORS.update((generator, generator.bit_generator.state) for generator in generators(module))
    for item in items:
        name = f"{item.path.parent.name}/{item.path.name}::{item.name}"
        if name in THOROUGH or name.partition("[")[0] in THOROUGH:
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(autouse=True)
def _seeded(request):
    for generator in generators(getattr(request.node, "module", None)):
        generator.bit_generator.state = GENERATORS[generator]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(0)
