"""``to_arviz``: what ArviZ reads, of samplers and guides."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal

import pyro_advbayes as ab
from pyro_advbayes.infer.arviz import log_likelihoods
from tests.small_models import subsampling


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, 0.1 + s), obs=y)


@pytest.fixture
def data():
    x = torch.randn(40, 2)
    return x, x @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(40)


@pytest.fixture
def mcmc(data):
    mcmc = ab.SGMCMC(ab.SGLD(model, batch_size=10, num_steps_per_sample=5), 60, 60, 3, disable_progbar=True)
    mcmc.run(*data)
    return mcmc


def test_a_run_becomes_all_groups_that_arviz_reads(mcmc, data):
    idata = ab.to_arviz(mcmc, log_likelihood=True, posterior_predictive=True)
    assert idata.posterior["w"].shape == (3, 60, 2) and (idata.posterior["s"] > 0).all()
    assert set(idata.sample_stats) == {"energy", "step_size", "temperature", "gradient_norm", "diverging"}
    assert np.allclose(idata.observed_data["obs"], data[1])
    assert idata.posterior_predictive["obs"].shape == idata.log_likelihood["obs"].shape == (3, 60, 40)
    # predictions are new draws at the same inputs, not the data again
    residual = idata.posterior_predictive["obs"].values - data[1].numpy()
    assert 0.2 < residual.std() < 1.0
    assert len(az.summary(idata)) == 3
    assert np.isfinite(az.loo(idata).elpd_loo)
    az.plot_trace(idata, var_names=["s"])


def test_log_likelihood_is_that_of_every_row_under_every_draw(mcmc, data):
    samples = {name: value[:7] for name, value in mcmc.get_samples().items()}
    x, y = data
    expected = torch.stack([dist.Normal(x @ w, 0.1 + s).log_prob(y) for w, s in zip(samples["w"], samples["s"], strict=True)])
    for chunk_size in (None, 1, 3):
        assert torch.allclose(log_likelihoods(model, samples, data, {}, chunk_size)["obs"], expected, atol=1e-5)


def test_sites_can_be_chosen_and_an_unknown_one_is_named(mcmc):
    assert list(ab.to_arviz(mcmc, sites=["s"]).posterior) == ["s"]
    with pytest.raises(ValueError, match="'sigma' is not among"):
        ab.to_arviz(mcmc, sites=["sigma"])


def test_pyros_own_mcmc_brings_its_divergences(data):
    mcmc = MCMC(NUTS(model), num_samples=6, warmup_steps=6, disable_progbar=True)
    mcmc.run(*data)
    mcmc._diagnostics[0]["divergences"] = [1, 4]
    idata = ab.to_arviz(mcmc, log_likelihood=True)
    assert idata.sample_stats["diverging"].values.nonzero()[1].tolist() == [1, 4]
    assert idata.log_likelihood["obs"].shape == (1, 6, 40)


def test_a_guide_is_drawn_from(data):
    guide = AutoNormal(model, init_scale=0.01)
    guide(*data)
    idata = ab.to_arviz(guide, model=model, args=data, num_samples=30, posterior_predictive=True)
    assert idata.posterior["w"].shape == (1, 30, 2) and set(idata.posterior) == {"w", "s"}
    assert (idata.posterior["s"] > 0).all() and float(idata.posterior["w"].std("draw").max()) < 0.05
    with pytest.raises(ValueError, match="needs model= and args="):
        ab.to_arviz(guide)


def test_predictions_made_elsewhere_are_taken(mcmc, data):
    predictions = ab.Predictive(model, mcmc.get_samples())(data[0][:5])
    idata = ab.to_arviz(mcmc, posterior_predictive=predictions)
    assert np.array_equal(idata.posterior_predictive["obs"].values.reshape(180, 5), predictions["obs"].numpy())


def test_a_run_from_a_loader_is_read_on_its_first_batch(data):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=8)
    mcmc = ab.SGMCMC(ab.SGLD(model), 5, 5, 2, disable_progbar=True)
    mcmc.run(loader)
    assert np.allclose(ab.to_arviz(mcmc).observed_data["obs"], data[1][:8])
    for wanted in ("log_likelihood", "posterior_predictive"):
        with pytest.raises(ValueError, match=r"was given a loader.*args="):
            ab.to_arviz(mcmc, **{wanted: True})
        assert ab.to_arviz(mcmc, args=data, **{wanted: True})[wanted]["obs"].shape == (2, 5, 40)


def test_a_factor_is_no_observation(data):
    def regularised(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("small", -w.square().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.3), obs=y)

    mcmc = ab.SGMCMC(ab.SGLD(regularised), 6, 6, 2, disable_progbar=True)
    mcmc.run(*data)
    idata = ab.to_arviz(mcmc, log_likelihood=True, posterior_predictive=True)
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert list(idata[group].data_vars) == ["obs"]


def test_a_model_that_takes_other_rows_in_every_run_has_no_likelihood_of_a_row():
    x, y = torch.randn(60, 3), torch.randn(60)
    mcmc = ab.SGMCMC(ab.SGLD(subsampling, 1e-3), 3, 2, disable_progbar=True)
    mcmc.run(x, y)
    for wanted in ("log_likelihood", "posterior_predictive"):
        with pytest.raises(ValueError, match=r"plate 'data' takes 10 of its 60 rows.*without subsample_size"):
            ab.to_arviz(mcmc, **{wanted: True})
    assert "posterior" in ab.to_arviz(mcmc).groups() or "/posterior" in ab.to_arviz(mcmc).groups


def test_masked_rows_have_no_likelihood():
    valid = torch.tensor([True, False, True])

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=valid):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    y = torch.tensor([0.5, float("nan"), 1.0])
    found = log_likelihoods(model, {"w": torch.tensor([0.0, 1.0])}, (y,), {})["obs"]
    expected = dist.Normal(torch.tensor([[0.0], [1.0]]), 1.0).log_prob(torch.tensor([0.5, 0.0, 1.0]))
    torch.testing.assert_close(found, expected.where(valid, 0.0))
