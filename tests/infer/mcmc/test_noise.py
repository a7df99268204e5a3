"""Minibatch noise of known size: what each kernel makes of it, what it reports about it, and where it refuses."""

from __future__ import annotations

import pytest
import torch

import pyro_advbayes as ab
from tests.infer.mcmc.harness import CASES, FRICTION, LIMIT, assert_mean, estimate, noisy_gaussian, run

N, B = 1_000_000, 2


def white(precision, noise, replicas=1000):
    """White minibatch noise of this variance in a target of this precision, for every coordinate apart or as matrices."""
    precision, noise = (torch.diag(v) if v.dim() == 1 else v for v in (precision, noise))
    return noisy_gaussian("white", precision, noise, N, B, replicas)


def squares(draws):
    """The variance of every replica ``[replicas, dim]`` about the known mean, 1."""
    return (draws - 1.0).square().mean(1).flatten(0, 1)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------- SGAdaLD


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_sgadald_has_the_target_variance_where_its_correction_is_valid(temperature):
    """Four coordinates with e²√V / 2T = 0.1, 0.25, 0.5 and 0.75, half to nine tenths of V being noise; 5 % is METHODS' claim."""
    share = numbers(0.1, 0.25, 0.5, 0.75)
    V, precision = 25.0 * share**2, 1.25 * share / temperature  # so that hλ = 0.1
    problem = white(precision, V - precision * temperature)
    kernel = ab.SGAdaLD(problem.model, step_size=(0.4 * temperature) ** 0.5, temperature=temperature, **problem.options)
    draws = run(kernel, *problem.args, warmup=40, samples=60, every=20)[:, 5:]

    measured = kernel.state()["variables"]["moment"].double().reshape(-1, 4)
    assert ((measured.mean(0) / V - 1.0).abs() < 0.02).all(), measured.mean(0) / V
    ratio, error = estimate(squares(draws) * precision / temperature)
    assert ((ratio - 1.0).abs() < 0.05).all() and (error < 0.01).all(), (ratio, error)


@pytest.mark.parametrize("corrected", [True, False])
def test_sgadald_under_correlated_noise_has_the_predicted_ratio_in_each_eigendirection(corrected):
    """
    A target of correlation 0.9, noise in proportion to its Hessian, e²√V = 0.35 T: eigendirection i gets
    1 + (h / 2T) (E gᵢ² − V) with the correction and 1 + (h / 2T) E gᵢ² without; of the marginals, METHODS has seen 0.86 and 1.04.
    """
    precision = torch.linalg.inv(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64))
    V = 2.0 * precision[0, 0]
    step_size = float(0.35 / V.sqrt()) ** 0.5
    problem = white(precision, precision, replicas=2000)
    kernel = ab.SGAdaLD(problem.model, step_size, averaging_window=500, noise_correction=corrected, **problem.options)
    draws = run(kernel, *problem.args, warmup=30, samples=30, every=50)[:, 4:]

    eigenvalues, directions = torch.linalg.eigh(precision)
    V = kernel.state()["variables"]["V"].double().mean()  # 7 % above the target's E g², since the law is not the target's
    h, V = step_size**2 / V.sqrt(), V if corrected else 0.0
    # E g² = λ² Σ + λ, with Σ = ratio / λ, put into the formula and solved for the ratio
    predicted = (1.0 + 0.5 * h * (eigenvalues - V)) / (1.0 - 0.5 * h * eigenvalues)
    assert_mean(squares((draws - 1.0) @ directions + 1.0) * eigenvalues, predicted, "variance along eigendirections")
    marginal = float(squares(draws).mean())
    assert abs(marginal - (0.86 if corrected else 1.04)) < 0.015


@pytest.mark.parametrize("temperature, step_size, seen", [(0.5, 0.1, 1.40), (0.1, 0.05, 1.73), (0.1, 0.1, 7.0)])
def test_clamped_sgadald_samples_at_the_temperature_that_it_reports(temperature, step_size, seen):
    """The minibatch noise alone is hotter than T; ``seen`` is METHODS' ratio for λ = 1000 and a noise variance of 19 000."""
    problem = white(numbers(1000.0), numbers(19_000.0))
    kernel = ab.SGAdaLD(problem.model, step_size, temperature, clamp=True, **problem.options)
    draws = run(kernel, *problem.args, warmup=60, samples=40, every=50)[:, 5:]

    ratio, error = estimate(squares(draws) * 1000.0 / temperature)
    reported = kernel.diagnostics()
    assert reported["clamped"] > 0.9
    assert abs(ratio / (reported["T_eff"]["x"] / temperature) - 1.0) < LIMIT * error / ratio
    assert abs(float(ratio) / seen - 1.0) < 0.02


def test_unclamped_sgadald_refuses_at_the_end_of_warm_up_and_names_site_and_remedy():
    problem = white(numbers(1000.0), numbers(19_000.0), replicas=5)
    seen = []
    mcmc = ab.SGMCMC(
        ab.SGAdaLD(problem.model, 0.1, 0.1, **problem.options),
        num_samples=5,
        warmup_steps=50,
        hook_fn=lambda kernel, params, stage, i: seen.append((stage, i)),
        disable_progbar=True,
    )
    with pytest.raises(ValueError, match=r"site 'x'.*step_size=0\.1.*temperature=0\.1.*smaller step_size.*clamp=True"):
        mcmc.run(*problem.args)
    assert seen[-1] == ("Warmup", 49)


def test_constant_friction_gives_every_weight_its_own_temperature():
    """The paper's form: T C e / √V, since what is taken off is there in the gradient; at C = 1000 METHODS predicts 0.37."""
    problem = white(numbers(1000.0, 4000.0), numbers(19_000.0, 19_000.0))
    kernel = ab.SGAdaLD(problem.model, 0.05, friction=1000.0, **problem.options)
    draws = run(kernel, *problem.args, warmup=60, samples=40, every=50)[:, 5:]

    temperatures = 1000.0 * 0.05 * kernel.state()["variables"]["V"].double().reshape(-1, 2).rsqrt().mean(0)
    assert_mean(squares(draws) * numbers(1000.0, 4000.0), temperatures, "variance over the target's")
    assert kernel.diagnostics()["T_eff"]["x"] == pytest.approx(float(temperatures.mean()), rel=1e-3)
    assert 0.35 < temperatures[0] < 0.39


# ------------------------------------------------------------------------------------------------------------------ SGHMC


@pytest.mark.parametrize("adaptive", [False, True])
def test_sghmc_with_an_estimate_of_the_noise_has_the_target_variance(adaptive):
    """Minibatch noise that would heat by a quarter and a half. The step's own bias, hλ / (2 (2 − a)), stays: 1 % here."""
    precision, temperature, rate = numbers(1.0, 1.0), 0.5, 0.05
    noise = numbers(0.25, 0.5) * 2.0 * FRICTION * temperature / rate
    step_size = float(rate * (noise[1] + temperature).sqrt()) ** 0.5 if adaptive else rate
    problem = white(precision, noise)
    kernel = ab.SGHMC(
        problem.model,
        step_size,
        temperature,
        friction=FRICTION,
        adaptive=adaptive,
        noise_correction=True,
        **problem.options,
    )
    draws = run(kernel, *problem.args, warmup=40, samples=60, every=20)[:, 5:]

    estimated = kernel.state()["variables"]["noise"].double().reshape(-1, 2)
    assert_mean(estimated, noise, "estimated variance of the minibatch gradient")
    assert kernel.diagnostics()["T_eff"]["x"] == pytest.approx(temperature, rel=0.01)
    ratio, error = estimate(squares(draws) * precision / temperature)
    assert ((ratio - 1.0).abs() < 0.05).all() and (error < 0.01).all(), (ratio, error)


# -------------------------------------------------------------------------------------------------------------- all kernels


@pytest.mark.parametrize("name", CASES)
def test_reported_temperature_is_the_sampled_one(name):
    """T_eff as ``diagnostics`` predicts it, against variance · λ without the closed form's factor for the step."""
    case, temperature, rate = CASES[name], 0.5, 0.1
    noise = numbers(0.5 * 2.0 * case.friction * temperature / rate)
    step_size = float(rate * (noise + temperature).sqrt()) ** 0.5 if case.scaled else rate
    problem = white(numbers(1.0), noise, replicas=2000)
    kernel = case.kernel(problem.model, step_size, temperature, **problem.options)
    draws = run(kernel, *problem.args, warmup=30, samples=50, every=20)[:, 5:]

    rates = case.rates(kernel, step_size).reshape(-1, 1)
    bend = 1.0 if case.corrected else 1.0 - rates / (2.0 * (2.0 - case.friction))
    seen, error = estimate(squares(draws) * bend)
    reported = kernel.diagnostics()["T_eff"]["x"]
    assert abs(float(seen) - reported) < LIMIT * float(error)
    assert reported > 1.3 * temperature or case.corrected


# ----------------------------------------------------------------------------------------------------- minibatch gradients


def test_noise_estimate_takes_shuffled_epochs_into_account():
    """Two batches of one epoch differ by more than two drawn apart, and the variance of a batch is smaller by 1 − B/N."""
    noise = numbers(2.0, 0.5)
    problem = noisy_gaussian("batch_size", torch.diag(numbers(1.0, 1.0)), torch.diag(noise), 30, 3, replicas=100)
    kernel = ab.SGHMC(problem.model, 0.05, noise_correction=True, **problem.options)
    run(kernel, *problem.args, warmup=400, samples=1, chains=10)
    estimated = kernel.state()["variables"]["noise"].double()[0].reshape(-1, 2).mean(0)
    # 200 pairs for each of 10 chains, and of 100 replicas whose rows correlate by 1/√30: a standard error of 0.7 %
    torch.testing.assert_close(estimated, noise, rtol=0.03, atol=0.0)
