"""Every test starts from the same random numbers, whichever tests ran before it in its process."""

from __future__ import annotations

import random
import sys

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # these machines are noisy: no test is timed
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(0)
