from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_advbayes as ab
from models.heteroscedastic_regression import HeteroscedasticRegression
from models.mlp import mlp_network


def conditioned(num_features: int = 3):
    """The model at the weights of a plain network, and that network."""
    network = mlp_network((num_features, 16, 16, 2))
    values = {f"net.{name}": value.detach() for name, value in network.named_parameters()}
    return pyro.poutine.condition(HeteroscedasticRegression(num_features), values), network


def test_the_default_network_has_two_hidden_layers_of_16_and_two_outputs():
    trace = pyro.poutine.trace(HeteroscedasticRegression(8)).get_trace(torch.zeros(1, 8))
    shapes = {name: list(trace.nodes[name]["value"].shape) for name in trace.stochastic_nodes if name.startswith("net")}
    assert shapes == {
        "net.1.weight": [16, 8],
        "net.1.bias": [16],
        "net.3.weight": [16, 16],
        "net.3.bias": [16],
        "net.5.weight": [2, 16],
        "net.5.bias": [2],
    }
    assert all(isinstance(trace.nodes[name]["fn"].base_dist, dist.Normal) for name in shapes)


def test_its_density_is_that_of_normals_with_the_networks_outputs():
    model, network = conditioned()
    x, y = torch.randn(5, 3), torch.randn(5)
    mean, log_scale = network(x).unbind(-1)
    torch.testing.assert_close(model(x), torch.stack([mean, log_scale.exp()], -1))
    site = pyro.poutine.trace(model).get_trace(x, y).nodes["obs"]
    expected = -0.5 * ((y - mean) / log_scale.exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)
    assert site["is_observed"] and [(frame.name, frame.size) for frame in site["cond_indep_stack"]] == [("data", 5)]


def test_a_drawn_observation_has_the_mean_and_the_noise_returned():
    model, _ = conditioned()
    trace = pyro.poutine.trace(model).get_trace(torch.randn(4000, 3))
    mean, scale = trace.nodes["_RETURN"]["value"].unbind(-1)
    residual = (trace.nodes["obs"]["value"] - mean) / scale
    assert residual.mean().abs() < 4 / math.sqrt(4000) and (residual.square().mean() - 1).abs() < 4 * math.sqrt(2 / 4000)


def test_draws_from_a_wide_prior_have_a_finite_density():
    model, x, y = HeteroscedasticRegression(8, prior=dist.Normal(0.0, 5.0)), 3 * torch.randn(50, 8), torch.randn(50)
    for _ in range(20):
        trace = pyro.poutine.trace(model).get_trace(x, y)
        scale = trace.nodes["_RETURN"]["value"][:, 1]
        assert scale.min() >= 0.99e-6 and scale.max() <= 1.01e6
        assert math.isfinite(trace.log_prob_sum().item())


def noisy(rows: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """A line whose noise is 0.1 on the left and 1 on the right."""
    x = torch.rand(rows, 1) * 2 - 1
    return x, x[:, 0] + torch.where(x[:, 0] < 0, 0.1, 1.0) * torch.randn(rows)


def test_a_sampler_finds_where_the_noise_is():
    (x, y), (x_test, y_test) = noisy(), noisy(1000)
    model = HeteroscedasticRegression(1)
    kernel = ab.SGHMC(model, num_steps_per_sample=10)
    mcmc = ab.SGMCMC(kernel, num_samples=40, warmup_steps=40, num_chains=2, disable_progbar=True)
    mcmc.run(x, y)
    mean, scale = ab.Predictive(model, mcmc.get_samples(), return_sites=["_RETURN"])(x_test)["_RETURN"].unbind(-1)
    assert mean.shape == scale.shape == (80, 1000)
    left = x_test[:, 0] < -0.2
    right = x_test[:, 0] > 0.2
    assert scale.mean(0)[left].mean() < 0.3 and 0.6 < scale.mean(0)[right].mean() < 1.6
    found = ab.diagnostics.regression_scores(mean, scale, y_test)
    true = ab.diagnostics.gaussian_nll(x_test[:, 0], torch.where(x_test[:, 0] < 0, 0.1, 1.0), y_test).mean().item()
    assert true < found.nll.value < true + 0.35


def test_it_goes_to_pyros_own_kernel():
    x, y = noisy(20)
    mcmc = MCMC(NUTS(HeteroscedasticRegression(1, hidden=(2,)), max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(x, y)
    assert mcmc.get_samples()["net.3.weight"].shape == (3, 2, 2)


def test_hidden_layers_and_activation_may_be_others():
    model = HeteroscedasticRegression(2, hidden=(), activation=torch.nn.Tanh)
    trace = pyro.poutine.trace(model).get_trace(torch.randn(3, 2))
    assert trace.nodes["net.1.weight"]["value"].shape == (2, 2)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 4))
