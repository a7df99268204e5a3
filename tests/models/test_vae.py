from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.nn.functional import logsigmoid

import pyro_advbayes as ab
from models.vae import VAE


@pytest.fixture
def model() -> VAE:
    return VAE(num_pixels=12, hidden=(5,), num_latents=2)


def examples(rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, 1, 3, 4), torch.randn(rows, 2)


def drawn(model: VAE, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    trace = poutine.trace(model).get_trace(x, noise)
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "data"}


def by_hand(w: dict[str, torch.Tensor], x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Every row's ELBO at one draw of the noise."""
    x = x.flatten(1)
    code = torch.relu(x @ w["encoder.1.weight"].T + w["encoder.1.bias"]) @ w["encoder.3.weight"].T + w["encoder.3.bias"]
    mean, scale = code[:, :2], code[:, 2:].exp()
    z = mean + scale * noise
    logits = torch.relu(z @ w["decoder.1.weight"].T + w["decoder.1.bias"]) @ w["decoder.3.weight"].T + w["decoder.3.bias"]
    likelihood = (x * logsigmoid(logits) + (1 - x) * logsigmoid(-logits)).sum(-1)
    kl = torch.distributions.kl_divergence(dist.Normal(mean, scale), dist.Normal(torch.zeros_like(mean), 1.0)).sum(-1)
    return likelihood - kl


def test_the_density_of_every_row_is_its_elbo(model):
    x, noise = examples()
    values = drawn(model, x, noise)
    trace = poutine.trace(poutine.condition(model, values)).get_trace(x, noise)
    trace.compute_log_prob()
    rows = trace.nodes["obs"]["log_prob"] + trace.nodes["minus_kl"]["log_prob"]
    torch.testing.assert_close(rows, by_hand(values, x, noise), rtol=1e-4, atol=1e-4)
    prior = sum(trace.nodes[name]["log_prob"].sum() for name in values)
    torch.testing.assert_close(trace.log_prob_sum(), prior + rows.sum())
    for name in ("obs", "minus_kl"):
        assert [(frame.name, frame.size) for frame in trace.nodes[name]["cond_indep_stack"]] == [("data", 7)]


def test_averaged_over_noise_the_elbo_is_the_one_with_a_drawn_code(model):
    x = examples()[0]
    values = drawn(model, *examples())
    noises = torch.randn(2000, 7, 2)
    elbos = torch.stack([by_hand(values, x, noise) for noise in noises]).sum(-1)

    mean, scale = poutine.condition(model.encode, values)(x)
    z = dist.Normal(mean, scale).sample((2000,))
    kl = torch.distributions.kl_divergence(dist.Normal(mean, scale), dist.Normal(torch.zeros_like(mean), 1.0)).sum()
    hidden = torch.relu(z @ values["decoder.1.weight"].T + values["decoder.1.bias"])
    logits = hidden @ values["decoder.3.weight"].T + values["decoder.3.bias"]
    other = (x.flatten(1) * logits + logsigmoid(-logits)).sum((1, 2)) - kl
    error = ((elbos.var() + other.var()) / 2000).sqrt()
    assert (elbos.mean() - other.mean()).abs() < 4 * error


def test_encode_gives_the_law_of_the_code_under_given_weights(model):
    x, noise = examples()
    values = drawn(model, x, noise)
    mean, scale = poutine.condition(model.encode, values)(x)
    hidden = torch.relu(x.flatten(1) @ values["encoder.1.weight"].T + values["encoder.1.bias"])
    code = hidden @ values["encoder.3.weight"].T + values["encoder.3.bias"]
    torch.testing.assert_close(mean, code[:, :2])
    torch.testing.assert_close(scale, code[:, 2:].exp())


def test_sizes_and_priors_are_those_asked_for():
    model = VAE(hidden=(30, 20), num_latents=4, prior=dist.Normal(0.0, 0.1))
    x, noise = torch.rand(3, 1, 28, 28), torch.randn(3, 4)
    trace = poutine.trace(model).get_trace(x, noise)
    shapes = {name: tuple(trace.nodes[name]["value"].shape) for name in trace.stochastic_nodes if name.endswith("weight")}
    assert list(shapes.values()) == [(30, 784), (20, 30), (8, 20), (20, 4), (30, 20), (784, 30)]
    assert all(trace.nodes[name]["fn"].base_dist.scale.flatten()[0] == pytest.approx(0.1) for name in shapes)
    assert model(x.flatten(1), noise).shape == (3, 784) and list(model.parameters()) == []


def test_it_is_sampled_from_minibatches(model):
    x, noise = examples(40)
    potential = ab.Potential(model, (x, noise), batch_size=10)
    assert [site.name.split(".")[0] for site in potential.sites] == 4 * ["encoder"] + 4 * ["decoder"]
    state = potential.init()
    values = {name: value[0] for name, value in potential.constrain(state).items()}
    batch = potential.batches.next()
    prior = sum(
        dist.Normal(0.0, (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 1.0).log_prob(value).sum() for value in values.values()
    )
    torch.testing.assert_close(potential.energy(state, batch)[0], -prior - 4 * by_hand(values, *batch).sum(), rtol=1e-4, atol=1e-3)


def test_sgld_on_minibatches_raises_the_elbo(model):
    x, noise = (torch.arange(40) % 2).float().view(40, 1, 1, 1) * torch.ones(1, 1, 3, 4), torch.randn(40, 2)
    mcmc = ab.SGMCMC(ab.SGLD(model, batch_size=20, num_steps_per_sample=20), num_samples=10, warmup_steps=40)
    mcmc.run(x, noise)
    draws = mcmc.get_samples()
    elbo = torch.stack([by_hand({name: value[s] for name, value in draws.items()}, x, noise).mean() for s in range(10)]).mean()
    assert elbo > -4 > -12 * 0.693  # without a code, the two kinds of images cost log 2 a pixel
