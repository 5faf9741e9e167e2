"""The whole loss beside a decomposition that knows the outputs alone."""

from dataclasses import replace

from core.test_report import D
from lnp.results.decomposition import Total


def test_the_whole_loss_is_shown_beside_the_outputs_own():
    d = replace(D, total=Total(0.75, 8.0))
    assert d.rate == 6.0
    assert d.to_dict() == {**D.to_dict(), "total/loss": 0.75, "total/rate": 8.0}
    assert "rate                8   of the whole loss" in str(d)
    assert "whole" not in str(D)
