"""Public docstrings stand alone: no parameter is described by the name of another function."""

from __future__ import annotations

import inspect

import pytest

import lnp
from lnp import plot
from lnp.parameter_texts import parameters_of

PUBLIC = {name: getattr(lnp, name) for name in lnp.__all__} | {
    f"plot.{name}": value
    for name, value in vars(plot).items()
    if inspect.isfunction(value) and not name.startswith("_")
}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_stand_alone(name):
    documented = [PUBLIC[name], *(vars(PUBLIC[name]).values() if inspect.isclass(PUBLIC[name]) else ())]
    texts = [inspect.getdoc(one) or "" for one in documented if inspect.isfunction(one) or inspect.isclass(one)]
    assert not [text for text in texts for words in ("As for", "as for `", "Options as") if words in text]


def test_parameters_that_are_described_together_are_known_one_by_one():
    def area(width, height):
        """Of a box.

        Parameters
        ----------
        width, height:
            In metres.
        """

    @parameters_of(area)
    def line(height):
        """Of one side.

        Parameters
        ----------
        height:
            As for `area`.
        """

    assert "height:\n    In metres." in inspect.getdoc(line)


def test_shared_parameters_are_written_out():
    text = inspect.getdoc(lnp.cross_response)
    assert "    Relative standard error of chi_net at which the probing stops" in text
    assert "measured_loss:\n    What is measured, on `measured_batch`" in text
    assert "batches:" not in text
    assert text.index("Raises") > text.index("microbatch:")
    assert "group:" not in inspect.getdoc(lnp.decompose_nested)
    assert "learning_rate:\n    For Delta = " in inspect.getdoc(lnp.predicted_loss_change)
