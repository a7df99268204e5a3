"""``PosteriorRegressor``: the Normals that draws of a model predict."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_advbayes as ab
from models.heteroscedastic_regression import HeteroscedasticRegression
from models.linear_regression import LinearRegression
from models.logistic_regression import LogisticRegression


def draws_of(model, x, count=7):
    """From the prior."""
    traces = [pyro.poutine.trace(model).get_trace(x).nodes for _ in range(count)]
    names = [name for name, node in traces[0].items() if node["type"] == "sample" and name.startswith("net")]
    return {name: torch.stack([nodes[name]["value"] for nodes in traces]) for name in names}


def by_hand(model, draws, x, y):
    """Mean and scale at the observed site, draw by draw, through Pyro's handlers."""
    moments = []
    for index in range(len(next(iter(draws.values())))):
        conditioned = pyro.poutine.condition(model, {name: value[index] for name, value in draws.items()})
        fn = pyro.poutine.trace(conditioned).get_trace(x, y).nodes["obs"]["fn"]
        moments.append(torch.stack([fn.mean, fn.stddev]))
    return torch.stack(moments).unbind(1)


@pytest.mark.parametrize("model", [HeteroscedasticRegression(3, hidden=(5,)), LinearRegression(3, noise_scale=0.3)], ids=["hnn", "linear"])
def test_means_and_scales_are_those_of_the_observed_site_at_each_draw(model):
    x = torch.randn(11, 3)
    draws = draws_of(model, x)
    law = ab.PosteriorRegressor(model, draws)
    for inputs in (x, torch.randn(4, 3)):
        mean, scale = law(inputs)
        expected = by_hand(model, draws, inputs, torch.zeros(len(inputs)))
        torch.testing.assert_close(mean, expected[0])
        torch.testing.assert_close(scale, expected[1])
        assert not mean.requires_grad


def column(x, y=None):
    """Whose targets are a column, and whose scale is one number for all rows."""
    weight = pyro.sample("net.weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    sigma = pyro.sample("net.sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x @ weight)[:, None], sigma).to_event(1), obs=y)


def test_columns_and_shared_scales_are_one_number_for_each_input():
    x = torch.randn(6, 3)
    draws = {"net.weight": torch.randn(5, 3), "net.sigma": torch.rand(5) + 0.1}
    mean, scale = ab.PosteriorRegressor(column, draws)(x)
    torch.testing.assert_close(mean, draws["net.weight"] @ x.T)
    torch.testing.assert_close(scale, draws["net.sigma"][:, None].expand(5, 6))


def test_the_law_of_the_exact_posterior_has_the_exact_predictive():
    model, x = LinearRegression(3, noise_scale=0.3), torch.randn(20, 3)
    y = x.sum(-1) + 0.3 * torch.randn(20)
    weights = model.exact_posterior(x, y).sample((4000,))
    law = ab.PosteriorRegressor(model, {"net.weight": weights[:, None, :3], "net.bias": weights[:, 3:]})
    x_new = torch.randn(50, 3)
    y_new = x_new.sum(-1) + 0.3 * torch.randn(50)
    mean, scale = law(x_new)
    exact = model.exact_predictive(x, y, x_new)
    found = ab.diagnostics.gaussian_nll(mean, scale, y_new)
    # the error of a log of a mean of 4000 densities
    density = torch.distributions.Normal(mean, scale).log_prob(y_new).exp()
    error = density.std(0) / density.mean(0) / 4000**0.5
    assert ((found + exact.log_prob(y_new)).abs() < 5 * error).all()


def test_a_guide_takes_the_place_of_draws():
    model, x = LinearRegression(2), torch.randn(9, 2)
    y = x.sum(-1)
    guide = AutoNormal(model, init_scale=1e-4)
    guide(x, y)
    mean, scale = ab.PosteriorRegressor(model, guide=guide, num_samples=5)(x)
    expected = by_hand(model, {name: value[None] for name, value in guide.median().items()}, x, y)[0]
    assert mean.shape == scale.shape == (5, 9)
    torch.testing.assert_close(mean, expected.expand(5, 9), atol=5e-3, rtol=0)


def test_gradients_reach_inputs_that_ask_for_them():
    model, x = HeteroscedasticRegression(3, hidden=(4,)), torch.randn(5, 3, requires_grad=True)
    mean, _ = ab.PosteriorRegressor(model, draws_of(model, x.detach()))(x)
    mean.mean(0).sum().backward()
    assert x.grad.abs().max() > 0


def several(x, y=None):
    mean = pyro.sample("net.mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        for name in ("left", "right"):
            pyro.sample(name, dist.Normal(mean + x[:, 0] * (1 if name == "left" else -1), 1.0))


def test_one_of_several_observed_sites_is_named():
    x, draws = torch.randn(4, 1), {"net.mean": torch.tensor([0.0, 2.0])}
    with pytest.raises(ValueError, match=r"observes 'left', 'right': name the one"):
        ab.PosteriorRegressor(several, draws)(x)
    mean, _ = ab.PosteriorRegressor(several, draws, site="right")(x)
    torch.testing.assert_close(mean, draws["net.mean"][:, None] - x[:, 0])


def student(x, y=None):
    mean = pyro.sample("net.mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.StudentT(3.0, mean.expand(len(x)), 1.0), obs=y)


def pair(x, y=None):
    mean = pyro.sample("net.mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean.expand(len(x), 2), 1.0).to_event(1), obs=y)


def unobserved(x):
    return x * pyro.sample("net.mean", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (student, r"observed site 'obs', StudentT, is no Normal: draw the target with Predictive"),
        (pair, r"observed site 'obs', Normal, is of 8 numbers for 4 inputs, and not one for each"),
        (unobserved, r"the model observes nothing in a plate of as many rows .* pyro.sample\('obs'"),
    ],
)
def test_other_likelihoods_are_refused_with_what_to_take(model, message):
    with pytest.raises(ValueError, match=message):
        ab.PosteriorRegressor(model, {"net.mean": torch.zeros(3)})(torch.randn(4, 3))


def test_a_classifier_is_sent_to_the_classifier():
    model, x = LogisticRegression(3), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"Bernoulli, is no Normal: PosteriorClassifier is for classes"):
        ab.PosteriorRegressor(model, draws_of(model, x))(x)


def test_draws_are_needed():
    with pytest.raises(ValueError, match="needs posterior_samples, or a guide"):
        ab.PosteriorRegressor(column)


def test_one_draw_that_is_no_number_is_refused_by_name():
    draws = {"net.weight": torch.zeros(3, 1, 3), "net.bias": torch.zeros(3, 1)}
    draws["net.bias"][1] = torch.nan
    with pytest.raises(ValueError, match=r"posterior_samples\['net.bias'\] holds NaN in 1 of 3 draws, first in number 1: leave it out"):
        ab.PosteriorRegressor(LinearRegression(3), draws)
