"""Every kernel's draws have the law that its step size, its temperature and the minibatch noise lead to, to Monte-Carlo error."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_advbayes as ab
from tests.infer.mcmc.harness import (
    CASES,
    LIMIT,
    assert_law,
    assert_mean,
    closed_form,
    estimate,
    gaussian,
    injected_variance,
    noisy_gaussian,
    noisy_variance,
    rotated,
    run,
)

TARGETS = {
    "isotropic": 4.0 * torch.eye(2, dtype=torch.float64),
    "correlated": rotated(0.2, 4.0),
    "condition number 1e2, rotated": rotated(0.04, 0.4, 4.0),
}
ALONG_AXES = {"condition number 1e4, along axes": torch.diag(torch.tensor([4e-4, 4e-2, 4.0], dtype=torch.float64))}


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_law_on_gaussians_is_the_closed_form(name, temperature):
    """Mean, covariance and KL on full data, from a start far off; the largest hλ is 0.8, where SGLD's variance is 1.67 T/λ."""
    case, replicas = CASES[name], 1000
    targets = TARGETS | (ALONG_AXES if case.scaled else {})
    precision = torch.block_diag(*targets.values())
    step_size = case.step_size(0.8, temperature, precision)
    kernel = case.kernel(gaussian(precision, 1.0, replicas), step_size=step_size, temperature=temperature)
    draws = run(kernel, warmup=20, samples=30, start=4.0, every=40)[:, 14:]

    rates = case.rates(kernel, step_size)
    taken = case.taken(kernel, rates).reshape(1, replicas, -1)
    rates = rates.reshape(1, replicas, -1)
    start = 0
    for label, block in targets.items():
        place = slice(start, start := start + len(block))
        covariance = closed_form(case, block, rates[..., place], temperature, taken[..., place])
        assert_law(draws[..., place], 1.0, covariance, label)


@pytest.mark.parametrize("mode", ["batch_size", "plate", "loader"])
@pytest.mark.parametrize("name", CASES)
def test_variance_under_minibatches_is_as_predicted_however_data_arrive(name, mode):
    """Shuffled epochs of 20 batches, whose noise, if it were white, would heat by a quarter and a half; hλ = 0.1 and 0.4."""
    case, temperature, rate, num_data, batch_size, chains, replicas = CASES[name], 0.5, 0.1, 40, 2, 2, 150
    precision = torch.tensor([1.0, 4.0], dtype=torch.float64)
    noise = torch.tensor([0.25, 0.5], dtype=torch.float64) * 2.0 * case.friction * temperature / rate
    step_size = float(rate * (precision[1] * temperature + noise[1]).sqrt()) ** 0.5 if case.scaled else rate
    problem = noisy_gaussian(mode, torch.diag(precision), torch.diag(noise), num_data, batch_size, replicas)
    # draws 21 updates apart have forgotten each other, and come from every place in an epoch
    kernel = case.kernel(problem.model, step_size, temperature, **problem.options)
    draws = run(kernel, *problem.args, warmup=10, samples=44, chains=chains, every=21)[:, 4:]

    rates = case.rates(kernel, step_size)
    injected = injected_variance(case, kernel, rates, temperature)
    rates, injected = (value.reshape(chains, 1, replicas, 2) for value in (rates, injected))
    predicted = noisy_variance(case, precision, rates, injected, noise, num_data // batch_size)
    # chains of a loader see the same rows, and replicas do in every mode: it is the draws that are independent
    assert_mean(((draws - 1.0) / predicted.sqrt()).mean((0, 2)), 0.0, "mean")
    assert_mean(((draws - 1.0).square() / predicted).mean((0, 2)), 1.0, "variance over the predicted one")


@pytest.mark.parametrize("name", CASES)
def test_kernels_take_the_same_steps_on_pyros_handlers_as_on_the_graph(name):
    """To rounding: what the tests above show of one backend they show of all."""
    assert_same_steps(name, "batch_size", torch.float32, {"backend": "handlers"})


@pytest.mark.parametrize(
    "mode, dtype", [("full", torch.float64), ("batch_size", torch.float64), ("plate", torch.float32), ("loader", torch.float64)]
)
def test_handlers_and_chunks_agree_with_the_graph_however_data_arrive(mode, dtype):
    assert_same_steps("SGLD", mode, dtype, {"backend": "handlers"}, {"chunk_size": 1}, {"chunk_size": 2})


@pytest.mark.parametrize("name, mode, dtype", [("SGAdaLD", "batch_size", torch.float32), ("SGHMC-adaptive", "plate", torch.float64)])
def test_compiled_updates_take_the_same_steps_as_the_graph(name, mode, dtype):
    assert_same_steps(name, mode, dtype, {"backend": "compile"})


def assert_same_steps(name, mode, dtype, *options):
    reference = steps(name, mode, dtype)
    for option in options:
        torch.testing.assert_close(steps(name, mode, dtype, **option), reference, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0.0)


def steps(name, mode, dtype, **options):
    """Draws of three chains over eight updates, four of them in warm-up, and their energies."""
    pyro.set_rng_seed(1)
    precision = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    problem = noisy_gaussian(mode, precision, precision, 12, 3, 2, dtype)
    kernel = CASES[name].kernel(problem.model, 0.05, **problem.options, **options)
    mcmc = ab.SGMCMC(kernel, num_samples=4, warmup_steps=4, num_chains=3, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a backend that falls back to another would compare it with itself
        warnings.simplefilter("ignore", ab.SamplingWarning)  # at these steps noise is hot
        mcmc.run(*problem.args)
    draws, energies = mcmc.get_samples()["x"], mcmc.sample_stats()["energy"]
    assert draws.dtype == dtype and energies.isfinite().all()
    return draws, energies


@pytest.mark.parametrize("name", ["SGLD", "SGAdaLD-uncorrected", "SGHMC", "SGHMC-adaptive"])
def test_bias_of_the_variance_halves_with_the_step_size_and_quarters_for_scaled_kernels(name):
    """The excess over T/λ at one step size, over the excess at half of it, as the closed form 1 / (1 − x) − 1 has it."""
    case, replicas = CASES[name], 3000
    precision = torch.ones(1, 1, dtype=torch.float64)
    first = case.step_size(0.4 * (2.0 - case.friction), 1.0, precision)  # x = 0.2
    options = {"averaging_window": 300} if case.scaled else {}  # a V that does not depend on the step
    seen, errors, expected = [], [], []
    for step_size in (first, 0.5 * first):
        kernel = case.kernel(gaussian(precision, 1.0, replicas), step_size, **options)
        draws = run(kernel, warmup=30, samples=100, every=10)[:, 10:]
        variance, error = estimate((draws - 1.0).square().mean(1).flatten())
        rates = case.rates(kernel, step_size).reshape(replicas, 1)
        seen.append(float(variance) - 1.0)
        errors.append(float(error))
        expected.append(float(closed_form(case, precision, rates, 1.0, torch.zeros_like(rates)).mean()) - 1.0)
    error = seen[0] / seen[1] * math.hypot(errors[0] / seen[0], errors[1] / seen[1])
    assert abs(seen[0] / seen[1] - expected[0] / expected[1]) < LIMIT * error
    assert expected[0] / expected[1] == pytest.approx(4.4 if case.scaled else 2.25, abs=0.2), "not of the order that is claimed"
    assert error < 0.1 * seen[0] / seen[1]


@pytest.mark.parametrize("name", CASES)
def test_constrained_sites_have_the_tempered_law_in_their_own_space(name):
    """
    The law is p(s)^(1/T), by numerical integration. At T = 0.25 and for a standard LogNormal the mean of log s is −0.75; were the
    Jacobian tempered too, it would be 0. Draws of two step sizes are extrapolated to 0, which leaves a bias of second order.
    """
    case, temperature, replicas = CASES[name], 0.25, 3000
    laws = {"a": dist.LogNormal(torch.tensor(0.0), torch.tensor(1.0)), "b": dist.Gamma(torch.tensor(2.0), torch.tensor(1.0))}

    def model():
        for site, law in laws.items():
            pyro.sample(site, law.expand([replicas]).to_event(1))

    step = case.step_size(0.2, temperature, torch.eye(1, dtype=torch.float64))
    options = {"averaging_window": 300} if case.scaled else {}
    moments = {site: [] for site in laws}
    for step_size in (step, step * 0.5 ** (0.5 if case.scaled else 1.0)):
        kernel = case.kernel(model, step_size, temperature, **options)
        mcmc = ab.SGMCMC(kernel, num_samples=600, warmup_steps=450, disable_progbar=True)
        mcmc.run()
        for site, draws in mcmc.get_samples().items():
            s = draws[120::15].double()
            moments[site].append(estimate(torch.stack([s.log(), s, s.square()], -1).mean(0)))
    for site, ((mean, error), (mean_of_half, error_of_half)) in moments.items():
        expected = tempered_moments(laws[site].log_prob, temperature)
        scores = (2.0 * mean_of_half - mean - expected) / torch.hypot(2.0 * error_of_half, error)
        assert (scores.abs() < LIMIT).all(), (site, scores)


def tempered_moments(log_prob, temperature):
    """The means of log s, s and s² under p(s)^(1/T), by numerical integration in the model's own space."""
    s = torch.linspace(1e-6, 60.0, 200_001, dtype=torch.float64)
    weight = torch.softmax(log_prob(s) / temperature, 0)
    return torch.stack([(weight * f).sum() for f in (s.log(), s, s.square())])
