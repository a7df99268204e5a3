"""Microcanonical Langevin: its equation, its law on Gaussians, its temperature under minibatch noise, and its step size."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc.energy_error import measure
from pyro_advbayes.infer.mcmc.mclmc import MCLMCRule

F64 = torch.float64


def gaussian(size: int, condition: float, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    precision = torch.logspace(-math.log10(condition), 0.0, size, dtype=dtype)

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros_like(precision), precision.rsqrt()).to_event(1))

    return model, precision


def run(model: Any, *args: Any, chains: int = 64, samples: int = 300, warmup: int = 150, updates: int = 10, **options: Any) -> ab.SGMCMC:
    mcmc = ab.SGMCMC(ab.MCLMC(model, num_steps_per_sample=updates, **options), samples, warmup, chains, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def start(rule: MCLMCRule, size: int, chains: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    theta, gradient = torch.randn(2, chains, size, dtype=F64)
    return theta, gradient, rule.variables(theta)


def test_an_update_is_the_equation_of_the_docstring() -> None:
    rule, eps, T, size = MCLMCRule(memory=20.0), 0.3, 0.7, 5
    theta, gradient, variables = start(rule, size)
    noise = torch.randn_like(theta)
    u, norm = variables["direction"].clone(), gradient.norm(dim=-1, keepdim=True)
    e, zeta = -gradient / norm, torch.exp(-eps * norm / (2 * (size - 1) * T))

    def force(u: Tensor) -> Tensor:
        new = 2 * zeta * u + (1 - zeta) * (1 + zeta + (e * u).sum(-1, keepdim=True) * (1 - zeta)) * e
        return new / new.norm(dim=-1, keepdim=True)

    u = force(u) + math.sqrt((math.exp(2 / 20.0) - 1) / size) * noise
    u = force(u / u.norm(dim=-1, keepdim=True))
    new = rule.step(theta, gradient.clone(), noise, torch.tensor(eps, dtype=F64), torch.tensor(T, dtype=F64), variables, None)
    assert torch.allclose(new, theta + eps * u, atol=1e-12)
    assert torch.allclose(variables["direction"], u, atol=1e-12)


def test_half_a_force_is_the_flow_of_its_differential_equation() -> None:
    """du/dt = (e - u (u·e)) |g| / ((d - 1) T), solved by many small steps; the kinetic energy falls by the work, -(u·g)."""
    rule, eps, T, size = MCLMCRule(), 0.8, 0.7, 4
    _, gradient, variables = start(rule, size)
    u, work, steps = variables["direction"].clone(), torch.zeros(3, dtype=F64), 2_000
    for _ in range(steps):
        push = -(gradient - u * (u * gradient).sum(-1, keepdim=True)) / ((size - 1) * T)
        middle = u + 0.25 * eps / steps * push
        middle = middle / middle.norm(dim=-1, keepdim=True)
        push = -(gradient - middle * (middle * gradient).sum(-1, keepdim=True)) / ((size - 1) * T)
        work += -(middle * gradient).sum(-1) / T * 0.5 * eps / steps
        u = u + 0.5 * eps / steps * push
        u = u / u.norm(dim=-1, keepdim=True)
    after, change = rule.half_kick(gradient, torch.full((3, 1), eps, dtype=F64), T, variables)
    assert torch.allclose(after["direction"], u, atol=1e-6)
    assert torch.allclose(change, work, atol=1e-6)


@pytest.mark.parametrize(("size", "condition", "temperature"), [(2, 1.0, 1.0), (20, 1.0, 0.25), (20, 100.0, 1.0)])
def test_variances_of_gaussians_with_the_default_step(size: int, condition: float, temperature: float) -> None:
    model, precision = gaussian(size, condition)
    draws = run(model, temperature=temperature).get_samples()["x"]
    ratio = draws.square().mean(0) * precision / temperature
    assert 0.95 < float(ratio.mean()) < 1.05
    assert float(ratio[-1]) < 1.21  # a standard deviation 10 % too large, along the stiffest axis


def test_coordinates_are_normal_and_not_those_of_a_sphere() -> None:
    """Constant speed is no law of fixed radius: |x|² has the spread of a chi-square with d degrees of freedom."""
    model, _ = gaussian(10, 1.0)
    radius = run(model, energy_error=1e-5).get_samples()["x"].square().sum(-1)
    assert 9.7 < float(radius.mean()) < 10.3
    assert 17.5 < float(radius.var()) < 22.5  # 2 d


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_predicted_temperature_under_noise_that_is_larger_where_curvature_is(temperature: float) -> None:
    size, condition, memory, step = 20, 30.0, 50.0, 1.2
    precision = torch.logspace(-math.log10(condition), 0.0, size)
    noise = 2.0 * temperature * precision
    variables = {"relative_step": torch.ones(1, 1), "direction": torch.ones(1, size)}
    predicted = MCLMCRule(memory).temperatures(noise, step, temperature, variables)
    kappa = memory * step**2 / (2 * temperature**2 * size)
    assert torch.allclose(predicted, temperature * (1 + kappa * noise) / (1 + kappa * noise.mean()))
    rule, theta, buffer = MCLMCRule(memory), torch.randn(256, size), torch.empty(256, size)
    variables, total, eps, T = rule.variables(theta), torch.zeros(size), torch.tensor(step), torch.tensor(temperature)
    theta *= (temperature / precision).sqrt()
    for update in range(6000):
        gradient = precision * theta + noise.sqrt() * torch.randn_like(theta)
        theta, buffer = rule.step(theta, gradient, buffer.normal_(), eps, T, variables, None), theta
        total += theta.square().mean(0) if update >= 1000 else 0.0
    seen = total / 5000 * precision
    assert float(predicted.max() / temperature) > 1.5 and float(predicted.min() / temperature) < 0.85
    assert torch.allclose(seen, predicted[0], rtol=0.1)


def test_noise_that_is_the_same_in_all_directions_does_not_heat() -> None:
    size = 20
    rule, theta, buffer = MCLMCRule(50.0), torch.randn(256, size), torch.empty(256, size)
    variables, total, eps = rule.variables(theta), 0.0, torch.tensor(1.0)
    for update in range(3000):
        gradient = theta + 2.0 * torch.randn_like(theta)  # eps s / sqrt(d) = 0.45
        theta, buffer = rule.step(theta, gradient, buffer.normal_(), eps, torch.tensor(1.0), variables, None), theta
        total += float(theta.square().mean()) / 2500 if update >= 500 else 0.0
    assert abs(total - 1.0) < 0.1
    assert torch.allclose(rule.temperatures(torch.full((size,), 4.0), 1.0, 1.0, variables), torch.ones(256, size))


def test_auto_keeps_minibatch_noise_to_its_share_and_a_longer_step_warns() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])
    y = x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 0.3]) + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(1))

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc = run(model, x, y, chains=4, samples=600, warmup=500, batch_size=100)
    found = mcmc.diagnostics()
    assert 1.0 < found["T_eff direction"] < 1.25
    covariance = torch.linalg.inv(x.T.double() @ x.double() / 0.25 + torch.eye(5))
    mean, draws = covariance @ (x.T.double() @ y.double()) / 0.25, mcmc.get_samples()["w"].double()
    assert bool(((draws.mean(0) - mean).abs() < 0.3 * covariance.diagonal().sqrt()).all())
    assert torch.allclose(draws.std(0), covariance.diagonal().sqrt(), rtol=0.15)
    with pytest.warns(ab.SamplingWarning, match="T_eff of site 'w' may be as low as"):
        run(model, x, y, chains=4, samples=30, warmup=20, updates=2, batch_size=10, step_size=8 * found["step size"])


def test_the_energy_error_is_near_its_target_in_every_chain() -> None:
    model, _ = gaussian(20, 100.0)
    mcmc = run(model, chains=16, samples=2, warmup=100, updates=20, energy_error=0.01)
    errors = mcmc.diagnostics()["energy error"]
    assert len(errors) == 16
    median = float(torch.tensor(errors).median())
    assert 0.01 / 1.5**6 < median < 0.01 * 1.5**6  # a step within 1.5 times of the one that has the target: the sixth power
    chains = mcmc.kernel.chains
    before = {name: value.clone() for name, value in chains.variables.items()}
    error = measure(mcmc.kernel.run, 2.0 * mcmc.diagnostics()["step size"])
    assert float(error.median()) > 16 * median  # 2 to the sixth, in the limit of short steps
    assert all(torch.equal(before[name], value) for name, value in chains.variables.items())


def test_the_error_is_that_of_the_energy_over_one_update() -> None:
    """An update without noise conserves U + K; over a short step its error is of third order, so that ΔE² goes like eps⁶."""
    model, _ = gaussian(5, 3.0, F64)
    mcmc = run(model, chains=256, samples=2, warmup=20)
    one, two = (float(measure(mcmc.kernel.run, step).mean()) for step in (0.2, 0.4))
    assert 45 < two / one < 85


def test_chains_in_modes_of_different_width_get_steps_of_their_own() -> None:
    centers = torch.tensor([0.0, 60.0])

    def model() -> None:
        law = dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Independent(dist.Normal(centers[:, None].expand(2, 6), torch.tensor([[1.0], [8.0]]).expand(2, 6)), 1),
        )
        pyro.sample("x", law)

    initial = {"x": centers.repeat(4)[:, None].expand(8, 6).clone()}
    kernel = ab.MCLMC(model, num_steps_per_sample=5)
    mcmc = ab.SGMCMC(kernel, 50, 100, 8, initial_params=initial, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.SamplingWarning)  # of modes that do not mix
        mcmc.run()
    relative = kernel.chains.variables["relative_step"].flatten()
    assert float(relative[1::2].min() / relative[::2].max()) > 4.0


def test_no_chain_is_lost_at_sixteen_times_the_step_that_curvature_allows() -> None:
    model, _ = gaussian(20, 100.0)
    longest = 2.0 * math.sqrt(0.1 / 1.1 * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.SamplingWarning)
        mcmc = run(model, chains=46, samples=50, warmup=10, step_size=16 * longest)
    assert all(bool(value.isfinite().all()) for value in mcmc.get_samples().values())
    assert not any(mcmc.diagnostics()["divergences"].values())


def test_chains_one_after_the_other_and_side_by_side_make_the_same_updates() -> None:
    model, _ = gaussian(4, 10.0)
    draws = []
    for chunk_size in (1, 3):
        pyro.set_rng_seed(0)
        draws.append(run(model, chains=3, samples=5, warmup=10, step_size=0.5, chunk_size=chunk_size).get_samples()["x"])
    assert torch.allclose(*draws, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0.0}, "memory=0.0"),
        ({"memory": math.inf}, "memory=inf"),
        ({"energy_error": 0.0}, "energy_error=0.0"),
        ({"energy_error": -1.0}, "energy_error=-1.0"),
        ({"temperature": 0.0}, "temperature=0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ab.MCLMC(gaussian(3, 1.0)[0], **options)


def test_a_model_of_one_number_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two unknown numbers"):
        run(gaussian(1, 1.0)[0], chains=1)
