"""The whole loss beside a decomposition that knows the outputs alone."""

from dataclasses import replace

from core.test_report import D
from lnp.results.decomposition import Total


def test_the_whole_loss_is_shown_beside_the_outputs_own():
    d = replace(D, total=Total(0.75, 8.0))
    assert d.rate == 6.0
    assert d.to_dict() == {**D.to_dict(), "total/loss": 0.75, "total/rate": 8.0}
    (line,) = [line for line in str(d).splitlines() if line.startswith("total rate")]
    assert line.split()[2:] == ["8", "rate", "with", "the", "terms", "that", "are", "none", "of", "the", "outputs"]
    assert "total" not in str(D)
