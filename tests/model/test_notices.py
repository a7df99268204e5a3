"""What is legitimate in a model and seldom meant is told, by name and once; what says that it is meant is not."""

from __future__ import annotations

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine import block
from torch import nn

import pyro_advbayes as ab
from tests.small_models import data, weights

X, Y = data()


def told(model, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc = ab.SGMCMC(ab.SGLD(model, 1e-4, backend="handlers", **options), 2, 1, num_chains=2, disable_progbar=True)
        mcmc.run(X, Y)
    return [str(warning.message) for warning in caught if re.search("parameter|statistics", str(warning.message))]


def likelihood(mean, x, y, scale=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, scale), obs=y)


# ------------------------------------------------------------------------------------------------------------- parameters


def with_parameter(x, y):
    likelihood(x @ weights(), x, y, pyro.param("sigma", torch.tensor(2.0), constraint=dist.constraints.positive))


def with_parameter_in_the_prior(x, y):
    w = pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))
    likelihood(x @ w, x, y)


class WithPyroParam(PyroModule):
    def __init__(self):
        super().__init__()
        self.sigma = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)

    def forward(self, x, y):
        likelihood(x @ weights(), x, y, self.sigma)


class WithLayer(PyroModule):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, y):
        likelihood(self.layer(x) @ weights(), x, y)


def with_a_parameter_beside_an_unused_one(x, y):
    pyro.param("unused", torch.tensor(1.0))
    with_parameter(x, y)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize(
    "make,name",
    [
        (lambda: with_parameter, "parameter 'sigma'"),
        (lambda: with_a_parameter_beside_an_unused_one, "parameter 'sigma'"),
        (lambda: with_parameter_in_the_prior, "parameter 'loc'"),
        (WithPyroParam, "parameter 'sigma'"),
        (lambda: WithLayer(nn.Linear(3, 3)), r"parameters 'layer\.weight', 'layer\.bias'"),
    ],
    ids=["pyro.param", "beside an unused one", "in a prior", "PyroParam", "a plain layer"],
)
def test_a_parameter_that_is_held_fixed_is_warned_of_once_with_the_remedy(make, name, batch_size):
    (message,) = told(make(), batch_size=batch_size)
    assert re.search(rf"{name}: .*holds.*prior.*AutoDelta.*\.detach\(\)", message)


def detached(x, y):
    likelihood(x @ weights(), x, y, pyro.param("sigma", torch.tensor(2.0), constraint=dist.constraints.positive).detach())


def hidden(x, y):
    with block(hide=["sigma"]):
        sigma = pyro.param("sigma", torch.tensor(2.0))
    likelihood(x @ weights(), x, y)
    return sigma


class Excluded(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = ab.nn.bayesianize(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), exclude="0.*")

    def forward(self, x, y):
        likelihood(self.net(x).squeeze(-1), x, y)


class Sampled(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y):
        likelihood(self.layer(x).squeeze(-1), x, y)


@pytest.mark.parametrize(
    "make",
    [lambda: detached, lambda: hidden, Excluded, Sampled, lambda: WithLayer(nn.Linear(3, 3).requires_grad_(False))],
    ids=["detached", "unused", "excluded by bayesianize", "sampled", "a frozen layer"],
)
def test_what_is_meant_to_be_fixed_or_moves_does_not_warn(make):
    assert told(make()) == []


def test_of_many_parameters_a_few_are_named():
    (message,) = told(WithLayer(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))))
    assert "'layer.2.weight' and 3 others" in message


@pytest.mark.filterwarnings("ignore:parameter")
def test_notices_take_no_random_numbers_and_change_no_parameters():
    draws = []
    for model in (with_parameter, lambda x, y: likelihood(x @ weights(), x, y, 2.0)):
        pyro.set_rng_seed(3)
        draws.append(ab.Potential(model, (X, Y), backend="handlers").init())
    assert torch.equal(*draws)
    assert pyro.param("sigma").unconstrained().grad is None


# ------------------------------------------------------------------------------------------------------------- statistics


def test_statistics_that_have_never_seen_data_are_warned_of_where_bayesianize_has_not():
    layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False).eval()
    (message,) = told(WithLayer(layer))
    assert re.search(r"'layer\.1'.*never seen data", message)
    layer.train()(X)
    assert told(WithLayer(layer.eval())) == []


def test_what_bayesianize_has_warned_of_is_not_warned_of_again():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def model_of(bayesian):
        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.net = bayesian

            def forward(self, x, y):
                likelihood(self.net(x).sum(-1), x, y)

        return Model()

    with pytest.warns(UserWarning, match="never seen data"):
        bayesian = ab.nn.bayesianize(net)
    assert told(model_of(bayesian)) == []
    (message,) = told(model_of(ab.nn.bayesianize(net, eval_only=False).eval()))
    assert "'net.1'" in message
