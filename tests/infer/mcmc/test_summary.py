"""Diagnostics are Pyro's, of evenly spaced elements where a site is large, so that a million weights take no longer than a hundred."""

from __future__ import annotations

import math
import time

import arviz
import pytest
import torch
from pyro.ops.stats import effective_sample_size

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.infer.mcmc.summary import by_site, effective_size, function_values, shrink_factor, spaced, table
from tests.small_models import data, regression


def chains(*shape, draws=40):
    """Chains with some autocorrelation, one of them elsewhere."""
    noise = torch.randn(3, draws, *shape)
    values = 0.5 * noise.cumsum(1) / torch.arange(1, draws + 1).reshape(-1, *[1] * len(shape)) + noise
    values[2] += 1.0
    return values


def test_r_hat_sees_chains_of_different_spread_and_of_heavy_tails():
    """Cauchy draws have no variance, and chains at one place of unequal width have equal means: the classical R-hat is 1 for both."""
    cauchy = torch.distributions.Cauchy(0.0, 1.0).sample((4, 500, 1))
    shifted = cauchy + 3.0 * torch.arange(4.0).reshape(4, 1, 1)
    wide = torch.randn(4, 500, 1) * torch.tensor([1.0, 1.0, 1.0, 5.0]).reshape(4, 1, 1)
    assert shrink_factor(cauchy) < 1.02 and shrink_factor(shifted) > 1.2 and shrink_factor(wide) > 1.1


def test_effective_draws_are_no_negative_number():
    """Draws that alternate around their mean: Pyro's estimate of their number is below 0."""
    values = torch.tensor([1.0, -1.0]).repeat(25).reshape(1, 50, 1) + 0.01 * torch.randn(2, 50, 1)
    assert float(effective_sample_size(values, chain_dim=0, sample_dim=1)) < 0
    assert float(effective_size(values)) == pytest.approx(100 * math.log10(100))


def test_a_constant_has_no_r_hat_and_the_table_says_that_it_stands_still():
    values = torch.randn(3, 40, 2)
    values[..., 1] = -1e5
    assert by_site({"tau": values}, 10)["tau"]["r_hat"].isnan().tolist() == [False, True]
    values[1:, :, 1] = torch.randn(2, 40)
    assert by_site({"tau": values}, 10)["tau"]["r_hat"][1] > 1.5
    assert [line.split()[-1] for line in table({"tau": values}, 0.9, 10).splitlines()][2] == "still"


def test_small_sites_are_looked_at_whole_and_the_numbers_are_pyros_and_arvizs():
    samples = {"matrix": chains(2, 3), "number": chains()}
    result = by_site(samples, 100)
    for name, value in samples.items():
        assert result[name]["n_eff"].shape == value.shape[2:]
        torch.testing.assert_close(result[name]["n_eff"], effective_sample_size(value.double(), chain_dim=0, sample_dim=1))
        flat = value.double().reshape(3, 40, -1)
        rank = [float(arviz.rhat(flat[..., i].numpy(), method="rank")) for i in range(flat.shape[-1])]
        torch.testing.assert_close(result[name]["r_hat"].flatten(), torch.tensor(rank, dtype=torch.float64))
    assert (result["matrix"]["r_hat"] > 1.02).all()


@pytest.mark.parametrize("shape,count", [((7,), 3), ((10, 10), 9), ((4, 5, 6), 11)])
def test_of_a_large_site_evenly_spaced_elements_are_looked_at_from_the_first_to_the_last(shape, count):
    values = torch.arange(float(torch.Size(shape).numel())).reshape(1, 1, *shape).expand(2, 5, *shape)
    picked, where = spaced(values, count)
    assert picked.shape == (2, 5, count) and len(where) == count
    assert where[0] == (0,) * len(shape) and where[-1] == tuple(n - 1 for n in shape)
    assert [float(values[(0, 0, *place)]) for place in where] == picked[0, 0].tolist()
    assert picked[0, 0].diff().max() - picked[0, 0].diff().min() <= 1
    assert by_site({"site": values}, count)["site"]["n_eff"].shape == (count,)


@pytest.mark.parametrize("draws", [1, 3])
def test_of_fewer_than_four_draws_nothing_is_known(draws):
    result = by_site({"w": chains(2, draws=draws)}, 10)["w"]
    assert result["n_eff"].isnan().all() and result["r_hat"].isnan().all()
    assert "nan" in table({"w": chains(2, draws=draws)}, 0.9, 10)


def test_a_million_weights_are_diagnosed_within_a_second():
    samples = {"w": torch.randn(2, 50, 1000, 1000)}
    start = time.process_time()
    by_site(samples, 100)
    table(samples, 0.9, 8)
    assert time.process_time() - start < 1.0


def test_a_table_has_a_row_per_element_and_says_what_it_hides():
    samples = {"matrix": chains(2, 2), "number": chains(), "large": chains(30)}
    rows = [line.split() for line in table(samples, 0.8, 4).splitlines()]
    assert rows[0] == ["mean", "std", "median", "10.0%", "90.0%", "n_eff", "r_hat"]
    assert [row[0] for row in rows[1:]] == [
        *("matrix[0,0]", "matrix[0,1]", "matrix[1,0]", "matrix[1,1]", "number"),
        *("large[0]", "large[10]", "large[19]", "large[29]", "(26"),
    ]
    values = samples["matrix"][:, :, 1, 0].double().flatten()
    quantiles = torch.quantile(values, torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    assert rows[3][1:6] == [f"{float(number):.2f}" for number in (values.mean(), values.std(), *quantiles)]


def test_a_model_is_summarised_in_function_space():
    x, y = data()
    mcmc = ab.SGMCMC(ab.SGLD(mlp((3, 4, 2)), 1e-3, backend="handlers"), 6, 2, 2, disable_progbar=True)
    mcmc.run(x, y.long())
    values = function_values(mcmc.kernel.model, mcmc.get_samples(), 2, (x[:5],), {})
    assert values.shape == (2, 6, 5, 2)
    weights = {name: value[1, 3] for name, value in mcmc.get_samples(group_by_chain=True).items()}
    by_hand = torch.nn.functional.linear(x[:5], weights["net.1.weight"], weights["net.1.bias"]).relu()
    by_hand = torch.nn.functional.linear(by_hand, weights["net.3.weight"], weights["net.3.bias"])
    torch.testing.assert_close(values[1, 3], by_hand)


def test_summary_prints_sites_or_functions_and_how_many_chains_were_lost(capsys):
    x, y = data()
    mcmc = ab.SGMCMC(ab.SGLD(regression, 1e-7, batch_size=10, backend="handlers"), 6, 2, 2, disable_progbar=True)
    mcmc.run(x, y)

    def first_words(*args, **options):
        mcmc.summary(*args, **options)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]

    assert first_words() == ["mean", "w[0]", "w[1]", "w[2]", "scale", "b", "chains"]
    assert first_words(sites=["b"]) == ["mean", "b", "chains"]
    assert first_words(x[:2]) == ["mean", "f[0]", "f[1]", "chains"]
    mcmc.summary()
    assert "chains lost: 0 of 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"sites: 'v' is not among \['b', 'scale', 'w'\]"):
        mcmc.summary(sites=["v"])
