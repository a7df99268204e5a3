from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_advbayes as ab

X = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))


def linear(scale: float, kind=dist.Categorical):
    """Logits of three classes, each Normal(0, scale² |x|²) under the prior."""

    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(4, 3), scale).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", kind(logits=x @ weight), obs=y)

    return model


def test_the_spread_of_logits_is_that_of_the_prior():
    found = ab.prior_predictive(linear(1.5), X, num_draws=2000)
    size = float(X.square().sum(-1).mean())
    # the mean over three classes taken off leaves 2/3 of the variance; 2000 draws of 12 weights, which all inputs share: 1 % of it
    assert found.logits == pytest.approx(1.5 * math.sqrt(size * 2 / 3), rel=0.03)
    assert found.num_classes == 3 and found.dead_units is None and found.mean is None


def test_the_top_probability_is_between_its_bounds_and_warned_of_at_both():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        between = ab.prior_predictive(linear(1.0), X, torch.zeros(len(X), dtype=torch.long))
    assert 1 / 3 < between.top_probability < 0.9
    with pytest.warns(UserWarning, match=r"sure of one class before it has seen data: mean top probability 0\.9\d, logits with a standard"):
        wide = ab.prior_predictive(linear(30.0), X)
    assert wide.top_probability > 0.95
    with pytest.warns(UserWarning, match=r"answer alike whatever the input is: .* take a wider prior"):
        narrow = ab.prior_predictive(linear(0.01), X)
    assert narrow.top_probability == pytest.approx(1 / 3, abs=0.02)


def test_a_coin_has_two_classes():
    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ weight), obs=y)

    found = ab.prior_predictive(model, X, num_draws=2000)
    # the classes' logits, 0 and f, are -f/2 and f/2 about their mean
    assert found.num_classes == 2 and found.logits == pytest.approx(math.sqrt(float(X.square().sum(-1).mean())) / 2, rel=0.05)


def test_of_a_regression_the_spread_of_means_and_the_noise():
    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, 0.3), obs=y)

    found = ab.prior_predictive(model, X, num_draws=2000)
    assert found.mean == pytest.approx(2.0 * math.sqrt(float(X.square().sum(-1).mean())), rel=0.05)
    assert found.scale == pytest.approx(0.3) and found.logits is None and found.top_probability is None
    assert "predicted means" in str(found) and "top probability" not in str(found)


def test_dead_units_are_counted_over_inputs():
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    dead = torch.arange(10) < 7

    def prior(name, value):
        if name == "0.weight":
            return dist.Normal(0.0, torch.where(dead, 1e-3, 1.0)[:, None].expand(10, 4))
        # a unit without a bias is 0 at about half of the inputs, which is not dead
        return dist.Normal(torch.where(dead, -1.0, 0.0), 1e-3) if name == "0.bias" else dist.Normal(0.0, 1.0)

    model = ab.nn.Classifier(ab.nn.bayesianize(net, prior=prior))
    with pytest.warns(UserWarning, match="70% of the units of ReLU layers are 0 at every input"):
        found = ab.prior_predictive(model, X, num_draws=3)
    assert found.dead_units == pytest.approx(0.7)
    assert not any(module._forward_hooks for module in model.modules())  # none is left behind


def test_a_look_changes_neither_model_nor_parameter_store():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model = ab.nn.Classifier(ab.nn.bayesianize(net, prior=ab.nn.FanIn(), eval_only=False))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    first = ab.prior_predictive(model, X)
    torch.manual_seed(0)
    assert first == ab.prior_predictive(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not pyro.get_param_store().keys()


def test_what_has_no_such_outcome_is_refused_by_name():
    def counts(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Poisson(x[:, 0].exp()), obs=y)

    with pytest.raises(
        ValueError, match=r"prior_predictive: .*'obs', Poisson, is a distribution of counts.*: it takes classifiers and Normal"
    ):
        ab.prior_predictive(counts, X)
    with pytest.raises(ValueError, match="observes nothing in a plate"):
        ab.prior_predictive(ab.nn.bayesianize(nn.Linear(4, 3)), X)
    with pytest.raises(ValueError, match="num_draws=1: an int >= 2"):
        ab.prior_predictive(linear(1.0), X, num_draws=1)
    with pytest.raises(ValueError, match="the model has no such site; it observes 'obs'"):
        ab.prior_predictive(linear(1.0), X, site="y")
