"""``step_size="auto"``: curvature by power iteration, a noise estimate, and a temperature that stays within its share."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc.step_size import largest_curvature

PRECISION = torch.tensor([1.0, 20.0, 500.0])
KERNELS = [ab.SGLD, ab.SGAdaLD, ab.SGHMC, lambda model, **options: ab.SGHMC(model, adaptive=True, **options)]


def gaussian():
    pyro.sample("x", dist.Normal(torch.zeros(3), PRECISION.rsqrt()).to_event(1))


def means(y):
    """Posterior precision N + 1 in every coordinate; minibatch gradients have variance N²/B · var(y), whatever the state."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(x, 1.0).to_event(1), obs=y)


def run(kernel, *args, warmup=60, samples=10, chains=8):
    mcmc = ab.SGMCMC(kernel, samples, warmup, chains, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def test_curvature_is_the_largest_eigenvalue_on_a_gaussian():
    kernel = ab.SGLD(gaussian)
    kernel.setup_chains(2, 0, (), {})
    assert largest_curvature(kernel.run) == pytest.approx(500.0, rel=1e-3)


def test_curvature_is_measured_in_the_metric_of_a_scaled_rule():
    kernel = ab.SGAdaLD(gaussian)
    kernel.setup_chains(2, 10, (), {})
    kernel.variables["V"].copy_(PRECISION.square().expand(2, -1))  # V^-1/4 H V^-1/4 is then the identity
    assert largest_curvature(kernel.run) == pytest.approx(1.0, rel=1e-3)


def test_full_data_leave_curvature_to_decide():
    kernel = ab.SGLD(gaussian, auto_share=0.2)
    run(kernel)
    # T / lambda / (1 - step lambda / 2) is 20 % off at this step
    assert kernel.step_size.value == pytest.approx(2 * 0.2 / 1.2 / 500.0, rel=1e-2)
    assert set(kernel.effective_temperatures().values()) == {1.0}


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_noise_is_estimated_and_bounds_the_step(temperature):
    N, B, spread = 4000, 20, 3.0
    y = spread * torch.randn(N, 2)
    kernel = ab.SGLD(means, batch_size=B, temperature=temperature)
    run(kernel, y, warmup=400, chains=1000)
    variance = N**2 / B * y.var(0) * (1 - B / N)
    seen = kernel.chains.noise.variance
    # 32 differences in 1000 chains: a variance estimate's standard error is sqrt(2 / 32000)
    assert ((seen / variance - 1).abs() < 4.5 * (2 / 32_000) ** 0.5).all()
    assert kernel.step_size.value == pytest.approx(2 * 0.1 * temperature / float(seen.mean()), rel=0.05)
    assert kernel.effective_temperatures()["x"] <= 1.1 * temperature * 1.001


@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_no_kernel_predicts_more_heat_than_its_share(make, temperature):
    y = 3.0 * torch.randn(2000, 2)
    kernel = make(means, batch_size=20, temperature=temperature)
    mcmc = run(kernel, y, warmup=300)
    assert mcmc.diagnostics()["T_eff"]["x"] <= 1.1 * temperature * 1.001
    assert mcmc.diagnostics()["clamped"] == 0.0
    assert mcmc.diagnostics()["step size"] == kernel.step_size.value


@pytest.mark.parametrize("make", KERNELS)
def test_a_first_run_without_tuning_has_the_right_law(make):
    """A thousand chains on a Gaussian of condition number 500 along the axes: variances within the stated share of the target."""
    mcmc = run(make(gaussian, num_steps_per_sample=20), warmup=150, samples=40, chains=500)
    x = mcmc.get_samples(group_by_chain=True)["x"][:, 20:].double()
    ratio = x.square().mean((0, 1)) * PRECISION
    error = (x.square().mean(1).std(0) / 500**0.5) * PRECISION
    assert (ratio > 1 - 0.1 - 4 * error).all() and (ratio < 1 + 0.1 + 4 * error).all(), (ratio, error)


def test_a_given_step_is_left_alone():
    kernel = ab.SGLD(gaussian, step_size=1.5e-4)
    assert run(kernel).diagnostics()["step size"] == 1.5e-4


def test_without_warm_up_the_step_is_found_at_the_start():
    kernel = ab.SGLD(means, batch_size=20)
    run(kernel, torch.randn(200, 2), warmup=0, samples=3)
    assert kernel.step_size.value > 0 and kernel.effective_temperatures()["x"] <= 1.1 * 1.001


def test_the_next_run_finds_its_own_step():
    kernel = ab.SGLD(means, batch_size=20)
    run(kernel, torch.randn(200, 2))
    first = kernel.step_size.value
    run(kernel, 30.0 * torch.randn(2000, 2))
    assert kernel.step_size.value < 0.1 * first


@pytest.mark.parametrize("make", KERNELS)
def test_without_a_temperature_curvature_alone_bounds_the_step(make):
    kernel, y = make(means, batch_size=20, temperature=0.0), torch.randn(200, 2)
    run(kernel, y, warmup=60, samples=2)
    alive = {name: value[kernel.alive] for name, value in kernel.variables.items()}
    bound = kernel.update_rule.largest_step(kernel.step_size.curvature, torch.zeros(1), 0.0, 0.1, alive)
    assert 0.0 < kernel.step_size.value <= bound


def test_a_density_of_straight_pieces_has_no_curvature_to_go_by():
    def straight(x, y):
        w = pyro.sample("w", dist.Laplace(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Laplace(x @ w, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"finds no curvature.*Give a step_size"):
        run(ab.SGLD(straight), torch.randn(20, 2), torch.randn(20))
