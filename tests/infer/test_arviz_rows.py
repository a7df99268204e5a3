"""``to_arviz``'s log-likelihood, row by row: factors, masks and scales, with the values that they should have."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.api import AbstractMCMC

import pyro_advbayes as ab
from pyro_advbayes.infer.arviz import log_likelihoods

TIMES = torch.tensor([0.5, 3.0, 1.2, 0.7, 3.0, 2.1])
CENSORED = torch.tensor([False, True, False, False, True, False])
RATES = torch.tensor([0.4, 0.9, 1.7])


class Draws(AbstractMCMC):
    """A finished run with draws that a test knows: three of one chain."""

    def __init__(self, model, args, **samples):
        super().__init__(kernel=type("Kernel", (), {"model": staticmethod(model)})(), num_chains=1, transforms={})
        self.samples, self._args, self._kwargs = samples, args, {}
        self.num_samples, self._diagnostics = len(next(iter(samples.values()))), [{}]

    def get_samples(self, num_samples=None, group_by_chain=False):
        return {name: value[None] if group_by_chain else value for name, value in self.samples.items()}

    def run(self, *args, **kwargs):
        raise NotImplementedError

    diagnostics = summary = run


def survival(t, censored):
    """Exponential lifetimes, right-censored: those that were not seen to end have the probability of lasting longer, by a factor."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(t)):
        with pyro.poutine.mask(mask=~censored):
            pyro.sample("obs", dist.Exponential(rate), obs=t)
        pyro.factor("lasting", torch.where(censored, -rate * t, 0.0))


def by_hand(rate):
    return torch.where(CENSORED, -rate * TIMES, rate.log() - rate * TIMES)


EXPECTED = torch.stack([by_hand(rate) for rate in RATES])


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_factor_in_the_data_plate_is_a_part_of_its_row(chunk_size):
    idata = ab.to_arviz(Draws(survival, (TIMES, CENSORED), rate=RATES), log_likelihood=True, chunk_size=chunk_size)
    assert set(idata.log_likelihood.data_vars) == {"obs"}
    assert np.allclose(idata.log_likelihood["obs"].values[0], EXPECTED, atol=1e-6)
    # rows of which a term is left are data, masked or not
    assert np.allclose(idata.observed_data["obs"], TIMES)
    assert np.isfinite(az.loo(idata).elpd_loo)


def test_a_factor_alone_is_the_likelihood():
    def model(t, censored):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.factor("survival", torch.where(censored, -rate * t, rate.log() - rate * t))

    idata = ab.to_arviz(Draws(model, (TIMES, CENSORED), rate=RATES), log_likelihood=True)
    assert np.allclose(idata.log_likelihood["survival"].values[0], EXPECTED, atol=1e-6)
    assert np.isfinite(az.loo(idata).elpd_loo)


@pytest.mark.filterwarnings("error")
def test_a_factor_that_fits_no_single_site_is_a_variable_of_its_own():
    def two_sites(t, censored):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.sample("first", dist.Exponential(rate), obs=t)
            pyro.sample("second", dist.Exponential(rate), obs=2 * t)
            pyro.factor("extra", -rate * t)

    def nested(t, censored):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.factor("extra", -rate * t)
            with pyro.plate("repeats", 2, dim=-2):
                pyro.sample("obs", dist.Exponential(rate), obs=torch.stack([t, 2 * t]))

    for model, names in ((two_sites, {"first", "second", "extra"}), (nested, {"obs", "extra"})):
        found = log_likelihoods(model, {"rate": RATES}, (TIMES, CENSORED), {})
        assert set(found) == names
        torch.testing.assert_close(found["extra"], -RATES[:, None] * TIMES)
        assert set(ab.to_arviz(Draws(model, (TIMES, CENSORED), rate=RATES), log_likelihood=True).log_likelihood.data_vars) == names


def test_a_factor_outside_the_data_plate_is_named_and_left_out():
    def model(t, censored):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.factor("soft constraint", -rate.square())
        with pyro.plate("groups", 2):
            pyro.factor("elsewhere", -rate.square())
        with pyro.plate("data", len(t)):
            pyro.sample("obs", dist.Exponential(rate), obs=t)

    run = Draws(model, (TIMES, CENSORED), rate=RATES)
    with pytest.warns(
        UserWarning, match=r"leaves out the factors 'soft constraint', 'elsewhere', which are in no plate of the data"
    ) as found:
        idata = ab.to_arviz(run, log_likelihood=True)
    assert found[0].filename == __file__
    assert set(idata.log_likelihood.data_vars) == {"obs"}
    assert np.allclose(idata.log_likelihood["obs"].values[0], RATES[:, None].log() - RATES[:, None] * TIMES, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- masks


def masked(y, by):
    """Rows 1 and 3 of 5 are missing, by a handler, a distribution's own mask, or Pyro's ``obs_mask``."""
    w, valid = pyro.sample("w", dist.Normal(0.0, 1.0)), torch.tensor([True, False, True, False, True])
    fn = dist.Normal(w, 1.0)
    with pyro.plate("data", 5):
        if by == "handler":
            with pyro.poutine.mask(mask=valid):
                pyro.sample("obs", fn, obs=y)
        else:
            pyro.sample("obs", fn.expand([5]).mask(valid), obs=y)


W = torch.tensor([0.0, 1.0, -0.5])
Y = torch.tensor([0.5, float("nan"), 1.0, 7.0, -1.0])
KEPT = [0, 2, 4]


@pytest.mark.parametrize("by", ["handler", "distribution"])
def test_masked_rows_are_no_data_and_the_others_keep_their_numbers(by):
    idata = ab.to_arviz(Draws(masked, (Y, by), w=W), log_likelihood=True, posterior_predictive=True)
    expected = dist.Normal(W[:, None], 1.0).log_prob(Y[KEPT])
    assert np.allclose(idata.log_likelihood["obs"].values[0], expected, atol=1e-6)
    assert np.allclose(idata.observed_data["obs"], Y[KEPT])
    assert idata.posterior_predictive["obs"].shape == (1, 3, 3)
    for group in (idata.log_likelihood, idata.observed_data, idata.posterior_predictive):
        assert group["obs_dim_0"].values.tolist() == KEPT
    loo = az.loo(idata, pointwise=True)
    assert loo.n_data_points == 3 and np.isfinite(loo.elpd_loo)
    without = ab.to_arviz(Draws(masked, (Y, by), w=W))
    assert np.allclose(without.observed_data["obs"], Y[KEPT])


def test_labels_of_the_rows_that_stay_are_theirs():
    names = ["a", "b", "c", "d", "e"]
    run = Draws(masked, (Y, "handler"), w=W)
    idata = ab.to_arviz(run, log_likelihood=True, dims={"obs": ["row"]}, coords={"row": names})
    for group in (idata.log_likelihood, idata.observed_data):
        assert group["row"].values.tolist() == ["a", "c", "e"]


def test_predictions_made_elsewhere_stay_as_they_are():
    predictions = {"obs": torch.randn(3, 5)}
    idata = ab.to_arviz(Draws(masked, (Y, "handler"), w=W), posterior_predictive={"again": predictions["obs"]})
    assert np.allclose(idata.posterior_predictive["again"].values[0], predictions["obs"])


def test_parts_of_rows_that_are_masked_leave_a_list_of_entries():
    valid = torch.tensor([[True, False], [True, True], [False, False]])
    y = torch.arange(6.0).reshape(3, 2)

    def entries(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("features", 2, dim=-1), pyro.plate("data", 3, dim=-2), pyro.poutine.mask(mask=valid):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    def events(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(w, 1.0).expand([3, 2]).mask(valid).to_event(1), obs=y)

    idata = ab.to_arviz(Draws(entries, (y,), w=W), log_likelihood=True, posterior_predictive=True)
    expected = dist.Normal(W[:, None], 1.0).log_prob(y[valid])
    assert np.allclose(idata.log_likelihood["obs"].values[0], expected, atol=1e-5)
    assert idata.observed_data["obs"].values.tolist() == [0.0, 2.0, 3.0]
    assert idata.observed_data["obs_dim_0"].values.tolist() == [0, 2, 3]
    assert idata.posterior_predictive["obs"].shape == (1, 3, 3)

    idata = ab.to_arviz(Draws(events, (y,), w=W), log_likelihood=True)
    expected = (dist.Normal(W[:, None, None], 1.0).log_prob(y) * valid).sum(-1)[:, :2]
    assert np.allclose(idata.log_likelihood["obs"].values[0], expected, atol=1e-5)
    assert idata.observed_data["obs"].values.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_a_site_that_is_masked_as_a_whole_is_left_out():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)
            with pyro.poutine.mask(mask=False):
                pyro.sample("unused", dist.Normal(w, 1.0), obs=y)

    idata = ab.to_arviz(Draws(model, (torch.zeros(3),), w=W), log_likelihood=True, posterior_predictive=True)
    for group in (idata.log_likelihood, idata.observed_data, idata.posterior_predictive):
        assert list(group.data_vars) == ["obs"]


def test_a_row_that_is_masked_in_some_draws_only_is_data():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=y > w):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    y = torch.tensor([-1.0, 0.5, 2.0])
    idata = ab.to_arviz(Draws(model, (y,), w=W), log_likelihood=True)
    expected = dist.Normal(W[:, None], 1.0).log_prob(y) * (y > W[:, None])
    assert np.allclose(idata.log_likelihood["obs"].values[0], expected[:, 1:], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------ scales


def plain(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)
        pyro.factor("extra", 0.1 * w * y)


def scaled_inside(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), pyro.poutine.scale(scale=4.0):
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)
        pyro.factor("extra", 0.1 * w * y)


def subsampled_by_all(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample=torch.arange(12)[: len(y)]):
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)
        pyro.factor("extra", 0.1 * w * y)


@pytest.mark.parametrize(
    ("model", "scale"),
    [
        (plain, 1.0),
        (scaled_inside, 4.0),
        (pyro.poutine.scale(plain, scale=2.5), 2.5),
        (ab.minibatch(plain, size=36), 12.0),
        (subsampled_by_all, 4.0),
    ],
    ids=["none", "inside", "around", "minibatch", "plate"],
)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_no_scale_is_in_the_log_likelihood_of_a_row(model, scale, chunk_size):
    y = torch.tensor([0.5, -1.0, 2.0])
    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"w": W[1]})).get_trace(y)
    assert float(trace.nodes["obs"]["scale"]) == scale
    found = log_likelihoods(model, {"w": W}, (y,), {}, chunk_size)
    torch.testing.assert_close(found["obs"], dist.Normal(W[:, None], 1.0).log_prob(y) + 0.1 * W[:, None] * y)
