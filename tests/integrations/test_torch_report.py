"""Results as data frames."""

import torch

import lnp


def test_pandas():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    d = lnp.decompose(model, (torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])), by_layer=True)
    frame = d.to_pandas()
    assert list(frame.index) == ["", "0", "2"]
    assert frame.loc["", "estimator"] == "exact"
    assert frame.loc["", "population/noise_scale_low"] == d.population.noise_scale_low
    assert abs(frame.loc[["0", "2"], "chi_net"].sum() - d.chi_net) < 1e-5 * d.chi_net
