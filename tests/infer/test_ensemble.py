from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from pyro.optim import Adam, ClippedAdam, ExponentialLR

import pyro_advbayes as ab
from models.heteroscedastic_regression import HeteroscedasticRegression
from models.linear_regression import LinearRegression
from models.mlp import mlp
from pyro_advbayes.attacks.fgsm import FGSM
from pyro_advbayes.infer.elbo.robust import TraceRobust_ELBO
from pyro_advbayes.infer.ensemble import deep_ensemble
from tests.small_models import data


def test_members_of_a_model_with_one_mode_all_find_it():
    model, (x, y) = LinearRegression(3), data()
    members = deep_ensemble(model, (x, y), num_members=2, num_steps=200, optim=Adam({"lr": 0.05}))
    mean = model.exact_posterior(x, y).mean
    assert {site: tuple(value.shape) for site, value in members.items()} == {"net.weight": (2, 1, 3), "net.bias": (2, 1)}
    found = torch.cat([members["net.weight"].flatten(1), members["net.bias"]], -1)
    torch.testing.assert_close(found, mean.expand(2, 4), atol=1e-3, rtol=0)


def test_minibatches_are_scaled_to_all_rows_so_that_the_prior_counts_once():
    model, (x, y) = LinearRegression(3, prior_scale=0.1), data()
    members = deep_ensemble(model, (x,), {"y": y}, num_members=1, num_steps=300, optim=Adam({"lr": 0.004}), batch_size=20)
    mean = model.exact_posterior(x, y).mean
    found = torch.cat([members["net.weight"].flatten(1), members["net.bias"]], -1)[0]
    assert (found - mean).abs().max() < 0.02 < 0.1 < mean.abs().max()


def test_members_are_different_networks_that_predict_together():
    x, y = data()
    model = mlp((3, 8, 2), prior=dist.Normal(0.0, 1.0))
    members = deep_ensemble(model, (x, y.long()), num_members=3, num_steps=60, optim=Adam({"lr": 0.05}), batch_size=30)
    weights = members["net.1.weight"]
    assert torch.pdist(weights.flatten(1)).min() > 0.5 and not weights.requires_grad
    ensemble = ab.PosteriorClassifier(model, members)
    assert ensemble.num_samples == 3 and (ensemble(x).argmax(-1) == y).double().mean() > 0.8


def test_one_seed_gives_one_ensemble_and_the_parameter_store_stays_as_it_was():
    x, y = data()
    model = mlp((3, 2))
    pyro.param("AutoDelta.net.1.weight", torch.full((2, 3), 7.0))
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append(deep_ensemble(model, (x, y.long()), num_members=2, num_steps=3, optim=Adam({"lr": 0.05}), batch_size=10))
    assert all(torch.equal(found[0][site], found[1][site]) for site in found[0])
    assert list(pyro.get_param_store()) == ["AutoDelta.net.1.weight"] and (pyro.param("AutoDelta.net.1.weight") == 7).all()


class Headed(PyroModule):
    """A Bayesian head on layers without priors."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(3, 4)
        self.head = ab.nn.bayesianize(torch.nn.Linear(4, 2), prior=dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        logits = self.head(self.body(x).tanh())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def scaled(x, y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, scale), obs=y)


def test_parameters_that_no_draw_would_hold_are_refused_unless_frozen():
    x, y = data()
    model, options = Headed(), {"num_members": 2, "num_steps": 2, "optim": Adam({"lr": 0.05})}
    with pytest.raises(ValueError, match=r"parameters without a prior \(body\$\$\$weight, body\$\$\$bias\).*freeze"):
        deep_ensemble(model, (x, y.long()), **options)
    with pytest.raises(ValueError, match=r"parameters without a prior \(scale\)"):
        deep_ensemble(scaled, (x, y), **options)
    model.body.requires_grad_(False)
    before = model.body.weight.clone()
    assert set(deep_ensemble(model, (x, y.long()), **options)) == {"head.weight", "head.bias"}
    assert torch.equal(model.body.weight, before) and not dict(pyro.get_param_store().items())


def test_members_can_be_trained_against_an_adversary():
    x, y = data()
    model, arguments = mlp((3, 2)), (x, y.long())
    settings = {"num_members": 1, "num_steps": 100, "optim": Adam({"lr": 0.05}), "init_loc_fn": init_to_median}
    plain = deep_ensemble(model, arguments, **settings)
    robust = deep_ensemble(model, arguments, **settings, loss=TraceRobust_ELBO(FGSM(eps=0.5, clip=None)))
    assert robust["net.1.weight"].norm() < 0.8 * plain["net.1.weight"].norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_members": 0}, "num_members=0: an int >= 1"),
        ({"num_steps": 2.5}, "num_steps=2.5: an int >= 1"),
        ({"batch_size": 61}, "batch_size=61: rows of a minibatch, an int from 1 to 60"),
    ],
)
def test_counts_that_make_no_sense_are_refused(settings, words):
    x, y = data()
    with pytest.raises(ValueError, match=words):
        deep_ensemble(mlp((3, 2)), (x, y.long()), **{"num_members": 2, "num_steps": 2, "optim": Adam({"lr": 0.1}), **settings})


def test_a_scheduler_that_nobody_would_step_is_refused():
    x, y = data()
    optim = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    with pytest.raises(ValueError, match=r"optim is a scheduler, .* ClippedAdam with lrd"):
        deep_ensemble(mlp((3, 2)), (x, y.long()), num_members=1, num_steps=1, optim=optim)
    falling = ClippedAdam({"lr": 0.1, "lrd": 0.5})
    assert deep_ensemble(mlp((3, 2)), (x, y.long()), num_members=1, num_steps=1, optim=falling)


def test_an_ensemble_of_regressions_predicts_where_the_noise_is():
    """Noise of 0.1 on the left, 1 on the right; a member's own law is worse than all members' mixture (Jensen)."""
    x = torch.rand(200, 1) * 2 - 1
    y = x[:, 0] + torch.where(x[:, 0] < 0, 0.1, 1.0) * torch.randn(200)
    model = HeteroscedasticRegression(1, hidden=(16,))
    members = deep_ensemble(model, (x, y), num_members=2, num_steps=150, optim=Adam({"lr": 0.05}), batch_size=100)
    x_test = torch.tensor([[-0.9], [-0.5], [0.5], [0.9]])
    mean, scale = ab.PosteriorRegressor(model, members)(x_test)
    assert scale.shape == (2, 4)
    assert (scale[:, :2] < 0.3).all() and (scale[:, 2:] > 0.5).all()
    assert (mean.mean(0) - x_test[:, 0]).abs().max() < 0.5 and mean.std(0).min() > 0
    mean, scale = ab.PosteriorRegressor(model, members)(x)
    each = torch.stack([ab.diagnostics.gaussian_nll(m, s, y).mean() for m, s in zip(mean, scale, strict=True)])
    assert ab.diagnostics.gaussian_nll(mean, scale, y).mean() < each.mean()


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("model,y", [(LinearRegression(3), torch.tensor(1.0)), (mlp((3, 2)), torch.tensor(1))])
def test_one_number_in_the_place_of_all_observations_is_refused_by_name(model, y, batch_size):
    """It would be repeated for every row."""
    for arguments in ({"args": (data()[0], y)}, {"args": (data()[0],), "kwargs": {"y": y}}):
        with pytest.raises(ValueError, match=r"observed site 'obs' is given one number, y, .* 60 rows: give one observation for each row"):
            deep_ensemble(model, **arguments, num_members=1, num_steps=1, optim=Adam({"lr": 0.01}), batch_size=batch_size)
    kernel = ab.SGLD(model, 1e-5, backend="handlers")
    with pytest.raises(ValueError, match=r"observed site 'obs' is given one number, y"):
        ab.SGMCMC(kernel, 1, 0, disable_progbar=True).run(data()[0], y)


def test_a_constant_of_the_models_own_may_be_observed_in_every_row():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("ones", dist.Bernoulli(logits=x @ w), obs=torch.tensor(1.0))

    assert deep_ensemble(model, data()[:1], num_members=1, num_steps=1, optim=Adam({"lr": 0.01}))["w"].shape == (1, 3)
