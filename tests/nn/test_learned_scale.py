"""A prior whose widths are learnt: its law, its posterior, and every method on it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_advbayes as ab
from pyro_advbayes.nn import LearnedScale, bayesianize


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def test_the_law_of_the_weights_is_that_of_the_formula():
    model = bayesianize(network(), prior=LearnedScale(scale=2.0, bias_scale=0.5))
    draws = ab.Predictive(model, num_samples=20_000, return_sites=["0.weight", "0.bias", "1.weight", "3.weight", "0.weight_scale"])(
        torch.zeros(1, 6)
    )
    # second moments: the mean of s² is scale²; of 20 000 draws (of one weight), whose kurtosis is 9: 2 % of it
    for site, variance in (("0.weight", 4.0 / 6), ("3.weight", 4.0 / 8), ("0.bias", 0.25)):
        values = draws[site].flatten(1)[:, 0]
        assert float(values.square().mean()) == pytest.approx(variance, rel=4 * math.sqrt(8 / 20_000)), site
        assert float(values.mean()) == pytest.approx(0.0, abs=4 * math.sqrt(variance / 20_000)), site
    gains = draws["1.weight"][:, 0]
    assert float(gains.mean()) == pytest.approx(1.0, abs=4 * 0.5 / math.sqrt(20_000))
    assert float(draws["0.weight_scale"].mean()) == pytest.approx(2.0 * math.sqrt(2 / math.pi), rel=0.02)
    # the weights of a tensor share their scale: their squares are correlated, with 4 / (2 · 4) = (E s⁴ − (E s²)²) / (3 E s⁴ − (E s²)²)
    squares = draws["0.weight"].flatten(1)[:, :2].square().T
    assert float(torch.corrcoef(squares)[0, 1]) == pytest.approx(0.25, abs=0.1)


def test_the_density_of_a_run_is_that_of_scales_and_raw_weights():
    model = bayesianize(nn.Linear(4, 2), prior=LearnedScale(scale=3.0, bias_scale=0.7))
    trace = poutine.trace(model).get_trace(torch.ones(1, 4))
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    expected = (
        dist.HalfNormal(3.0).log_prob(values["weight_scale"])
        + dist.HalfNormal(0.7).log_prob(values["bias_scale"])
        + dist.Normal(0.0, 0.5).log_prob(values["weight_raw"]).sum()
        + dist.Normal(0.0, 1.0).log_prob(values["bias_raw"]).sum()
    )
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    torch.testing.assert_close(values["weight"], values["weight_scale"] * values["weight_raw"])


class Regression(PyroModule):
    """Of known noise, on a linear layer without a bias."""

    def __init__(self, noise: float):
        super().__init__()
        self.net = bayesianize(nn.Linear(20, 1, bias=False), prior=LearnedScale(scale=3.0))
        self.noise = noise

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, self.noise), obs=y)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_posterior_of_a_scale_is_that_of_quadrature(seed):
    """Under s, the targets are Normal with covariance s² X Xᵀ / 20 + noise²."""
    pyro.set_rng_seed(seed)
    x = torch.randn(60, 20)
    y = x @ (1.5 / math.sqrt(20) * torch.randn(20)) + 0.5 * torch.randn(60)
    grid = torch.linspace(0.01, 8.0, 1600, dtype=torch.double)
    covariance = grid[:, None, None] ** 2 * (x @ x.T / 20).double() + 0.25 * torch.eye(60, dtype=torch.double)
    log_density = dist.MultivariateNormal(torch.zeros(60, dtype=torch.double), covariance).log_prob(y.double())
    weights = (log_density + dist.HalfNormal(3.0).log_prob(grid)).softmax(0)
    mean = float((weights * grid).sum())
    sd = math.sqrt(float((weights * (grid - mean) ** 2).sum()))

    mcmc = ab.SGMCMC(ab.SGHMC(Regression(0.5), adaptive=True, num_steps_per_sample=10), 1000, 500, 4, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ab.SamplingWarning)
        mcmc.run(x, y)
    scales = mcmc.get_samples()["net.weight_scale"]
    effective = float(mcmc.diagnostics()["sites"]["net.weight_scale"]["n_eff"])
    assert effective > 100
    error = sd / math.sqrt(effective)
    assert float(scales.mean()) == pytest.approx(mean, abs=0.1 * sd + 4 * error)
    assert float(scales.std()) == pytest.approx(sd, rel=0.1 + 4 / math.sqrt(2 * effective))


def classes():
    x = torch.randn(60, 6)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def test_every_method_takes_it(tmp_path):
    x, y = classes()
    model = ab.nn.Classifier(bayesianize(network(), prior=LearnedScale()))
    path = tmp_path / "run.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel in (ab.SGLD, ab.SGAdaLD, ab.SGHMC, ab.MCLMC):
            mcmc = ab.SGMCMC(kernel(model, batch_size=30), 30, 10, 2, disable_progbar=True)
            mcmc.run(x, y)
        ab.SGMCMC(ab.SGHMC(model, batch_size=30), 10, 10, 2, disable_progbar=True, checkpoint=path, checkpoint_every=7).run(x, y)
        resumed = ab.SGMCMC.resume(path, ab.SGHMC(model, batch_size=30), x, y)
        small = ab.AutoImplicit(model, generator=ab.distill.FactoredGenerator(rank=4, hidden=None))
        ab.distill.APD(small).fit(mcmc.get_samples(), x, y)
    sites = {f"net.{layer}.{which}_{part}" for layer in (0, 1, 3) for which in ("weight", "bias") for part in ("raw", "scale")}
    assert set(mcmc.get_samples()) == set(resumed.get_samples()) == sites
    weights = ab.Predictive(model, mcmc.get_samples(), return_sites=["net.1.weight"])(x)["net.1.weight"]
    expected = 1.0 + mcmc.get_samples()["net.1.weight_scale"][:, None] * mcmc.get_samples()["net.1.weight_raw"]
    torch.testing.assert_close(weights.reshape(expected.shape), expected)
    losses = []
    for guide, loss in ((AutoNormal(model), Trace_ELBO()), (ab.AutoAdversarialNormal(model), ab.TraceAdversarial_ELBO(mix=0.8))):
        pyro.clear_param_store()
        svi = SVI(ab.minibatch(model, size=len(x)), guide, pyro.optim.Adam({"lr": 0.01}), loss)
        losses += [svi.step(x[:30], y[:30])]
    assert all(map(math.isfinite, losses))
    for of in ({"posterior_samples": mcmc.get_samples()}, {"guide": guide, "num_samples": 3}, {"guide": small, "num_samples": 3}):
        assert ab.PosteriorClassifier(model, **of)(x).shape == (60, 3)


def test_copies_dtypes_and_exclusions():
    model = ab.nn.Classifier(bayesianize(network(), prior=LearnedScale(), exclude="0.*")).double()
    names = set(poutine.trace(model).get_trace(torch.randn(2, 6, dtype=torch.double)).nodes)
    assert "net.0.weight_raw" not in names and "net.3.weight_raw" in names
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        trace = poutine.trace(again).get_trace(torch.randn(2, 6, dtype=torch.double))
        assert set(trace.nodes) == names and trace.nodes["net.3.weight"]["value"].dtype == torch.double


def test_bad_input_is_refused_by_name():
    for name in ("scale", "bias_scale"):
        for wrong in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name}"):
                LearnedScale(**{name: wrong})
    layer = nn.Linear(2, 2)
    layer.register_buffer("weight_scale", torch.ones(()))
    with pytest.raises(ValueError, match="'weight': the module has an attribute 'weight_scale', which LearnedScale needs: rename it"):
        bayesianize(layer, prior=LearnedScale())
