"""Two runs next to each other: the ratio of their rates is the product of three ratios, with its error."""

from __future__ import annotations

import pytest

import lnp
from lnp.cli import main
from lnp.runs.ratios import ends, to_text


def run(chi_loss, chi_net, chi_pos, error=0.0, **more):
    """Two windows of one row, of which the last counts."""
    last = {"chi_loss": chi_loss, "chi_net": chi_net, "chi_pos": chi_pos, "rate": chi_loss * chi_net * chi_pos}
    first = dict.fromkeys(last, 7.0)
    return lnp.History([{"step": 0, **first}, {"step": 100, **last, "rate_stderr": error, **more}])


def of_population(rate, error, **more):
    return {"population/rate": rate, "population/rate_stderr": error, "population/chi_pos": 1.0, **more}


def test_the_ratio_of_rates_is_the_product_of_three():
    text = to_text({"fast": run(1.0, 8.0, 0.5), "slow": run(2.0, 1.0, 0.25)})
    assert text.splitlines() == [
        "Last window of each run, by the batch's rate for gradient descent, which has its noise in it:",
        "run   window at  rate  chi_loss  chi_net  chi_pos",
        "fast        100     4         1        8      0.5",
        "slow        100   0.5         2        1     0.25",
        "slow / fast:  rate 0.125 = chi_loss 2 x chi_net 0.125 x chi_pos 0.5",
    ]


def test_the_population_s_rate_stands_for_the_batch_s_where_all_runs_have_it():
    one, other = run(1.0, 2.0, 9.0, **of_population(8.0, 0.8)), run(1.0, 1.0, 9.0, **of_population(2.0, 0.6))
    (column,) = found = ends({"one": one, "other": other})
    assert column == "population/rate"
    assert [end.chi_pos for end in found[column].values()] == [4.0, 2.0]
    error = 0.25 * (0.1**2 + 0.3**2) ** 0.5
    assert f"other / one:  rate {0.25:.2f} ± {error:.2f} = chi_loss 1 x chi_net 0.5 x chi_pos 0.5" in to_text(
        {"one": one, "other": other}
    )
    assert list(ends({"one": one, "without": run(1.0, 1.0, 1.0)})) == ["rate"]


def test_the_net_rate_comes_first_with_the_scales_of_its_own_batch():
    more = {"net/rate": 6.0, "net/rate_stderr": 1.0, "measured/chi_loss": 1.5, "measured/chi_net": 2.0}
    found = ends([run(1.0, 8.0, 0.5, **more)])
    assert list(found) == ["net/rate", "rate"]
    (end,) = found["net/rate"].values()
    assert (end.chi_loss, end.chi_net, end.chi_pos, end.rate_stderr) == (1.5, 2.0, 2.0, 1.0)
    (end,) = ends([run(1.0, 8.0, 0.5, **{"net/rate": 6.0})])["net/rate"].values()
    assert end.chi_pos == 6 / 8


@pytest.mark.parametrize(("error", "known"), [(1.9, True), (2.1, False)])
def test_a_rate_within_two_errors_of_zero_has_no_ratio(error, known):
    text = to_text({"a": run(1.0, 8.0, 0.5, error), "b": run(1.0, 8.0, 0.5)})
    assert ("no ratio, a rate is within two standard errors of zero" in text) != known


def test_a_rate_of_zero_has_no_ratio():
    assert "no ratio, a rate is within" in to_text({"a": run(1.0, 8.0, 0.0), "b": run(1.0, 8.0, 0.0)})


def test_runs_without_factors_are_left_out():
    assert to_text({"a": lnp.History([{"step": 0, "rate": 1.0}]), "b": lnp.History()}) == ""
    for other in (lnp.History(), lnp.History([{"step": 0, "rate": 1.0}])):
        assert list(ends({"a": run(1.0, 1.0, 0.5), "b": other})["rate"]) == ["a"]


def test_the_command_prints_both_tables(tmp_path, capsys):
    for name, net in (("a", 2.0), ("b", 1.0)):
        run(1.0, net, 0.5).to_jsonl(tmp_path / f"{name}.jsonl")
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "chi_net settled" in printed
    assert printed.endswith("\nb / a:  rate 0.5 = chi_loss 1 x chi_net 0.5 x chi_pos 1\n")


def test_the_factors_are_those_of_the_window_of_the_rate():
    """Rows after the last one with a net rate do not count."""
    rows = [
        *run(1.0, 2.0, 0.5, **{"net/rate": 6.0}).rows(),
        {"step": 200, "rate": 1.0, "chi_loss": 9.0, "chi_net": 9.0},
    ]
    found = ends([lnp.History(rows)])
    assert [(end.step, end.chi_pos) for end in found["net/rate"].values()] == [(100, 3.0)]
    assert [end.step for end in found["rate"].values()] == [200]
