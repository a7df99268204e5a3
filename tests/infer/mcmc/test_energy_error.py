"""Step sizes from the energy error, and steps of each chain's own: SGHMC. Microcanonical Langevin's are in test_mclmc.py."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc import step_size
from pyro_advbayes.infer.mcmc.energy_error import LARGEST_ERROR, trial_errors
from pyro_advbayes.infer.mcmc.restart import restart
from pyro_advbayes.infer.mcmc.sghmc import SGHMCRule


def gaussian(precision: Tensor) -> Any:
    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros_like(precision), precision.rsqrt()).to_event(1))

    return model


def run(kernel: Any, chains: int = 16, samples: int = 20, warmup: int = 40, **options: Any) -> ab.SGMCMC:
    mcmc = ab.SGMCMC(kernel, samples, warmup, chains, disable_progbar=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.SamplingWarning)  # of modes that do not mix, and short runs
        mcmc.run()
    return mcmc


def gaussian_error(square: Tensor) -> Tensor:
    r"""The mean of :math:`\Delta H^2` over one leapfrog step of length s from a standard normal (x, p), for s² given."""
    x, p, both = -(square**2) / 4 * (1 - square / 4), square**2 / 4, square**1.5 / 2 * (1 - square / 2)
    return (3 * x**2 + 3 * p**2 + 2 * x * p + both**2) / 4


@pytest.mark.parametrize(("adaptive", "temperature"), [(False, 0.5), (True, 1.0)])
def test_the_energy_error_of_updates_is_that_of_leapfrog_steps(adaptive: bool, temperature: float) -> None:
    precision = torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64)
    step = 0.6 if adaptive else 0.36
    mcmc = run(ab.SGHMC(gaussian(precision), step_size=step, temperature=temperature, adaptive=adaptive), chains=4000, samples=2, warmup=0)
    chains = mcmc.kernel.chains
    relative = torch.linspace(0.8, 1.2, 4000, dtype=torch.float64)[:, None]
    if adaptive:
        chains.variables["V"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    rate = (step * relative) ** 2 * chains.variables["V"].rsqrt() if adaptive else step * relative
    chains.theta.copy_(torch.randn(4000, 3, dtype=torch.float64) * (temperature / precision).sqrt())
    seen = trial_errors(mcmc.kernel.run, step * relative, 0, LARGEST_ERROR)
    expected = gaussian_error(rate * precision).mean(-1)
    parts = torch.stack([(seen[i::2] / expected[i::2]).mean() for i in range(2)])
    assert torch.allclose(parts, torch.ones_like(parts), rtol=0.1)
    assert torch.allclose(seen[:1000].mean() / seen[-1000:].mean(), expected[:1000].mean() / expected[-1000:].mean(), rtol=0.15)


def test_the_target_is_the_error_of_equal_precisions_at_the_step_of_their_curvature() -> None:
    rule, square = SGHMCRule(friction=0.3), torch.tensor(0.05 * 2 * 1.7 / 1.05)
    assert rule.largest_step(1.0, torch.zeros(1), 1.0, 0.05, {}) == pytest.approx(float(square))
    assert rule.target_error(10, 0.05) == pytest.approx(float(gaussian_error(square)), rel=0.02)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_stiff_direction_among_many_does_not_bound_the_step(adaptive: bool) -> None:
    """Curvature would allow h of 0.35 over the largest precision; all other directions then crawl."""
    precision = torch.ones(400)
    precision[0] = 100.0
    kernel = ab.SGHMC(gaussian(precision), num_steps_per_sample=10, adaptive=adaptive)
    mcmc = run(kernel, chains=32, samples=100, warmup=100)
    alone = kernel.update_rule.largest_step(kernel.step_size.curvature, torch.zeros(1), 1.0, 0.1, kernel.variables)
    assert mcmc.diagnostics()["step size"] > (2.0**0.5 if adaptive else 2.0) * alone
    ratio = mcmc.get_samples()["x"].square().mean(0) * precision
    assert 0.95 < float(ratio.mean()) < 1.1  # the share of the temperature
    errors = torch.tensor(mcmc.diagnostics()["energy error"])
    target = kernel.update_rule.target_error(400, 0.1)
    assert target / 11 < float(errors.median()) < 11 * target  # a length within 1.5 times of the target's: the sixth power


def test_no_update_counts_with_more_than_the_given_error() -> None:
    """A wall that a chain seldom meets must not rule its step: the search counts at most 20 times the target in an update."""
    mcmc = run(ab.SGHMC(gaussian(torch.ones(3)), step_size=0.3), chains=500, samples=2, warmup=0)
    whole = trial_errors(mcmc.kernel.run, torch.full((500, 1), 0.3), 0, LARGEST_ERROR)
    most = float(whole.median())
    kept = trial_errors(mcmc.kernel.run, torch.full((500, 1), 0.3), 0, most)
    assert float(kept.max()) <= most < float(whole.max())
    assert float(kept.min()) > 0.0 and bool((kept <= whole).all())
    assert not bool(trial_errors(mcmc.kernel.run, torch.full((500, 1), 1e30), 0, most).isnan().any())


@pytest.mark.parametrize("kernel_type", [ab.SGHMC, ab.MCLMC])
def test_rounding_of_a_large_energy_does_not_shorten_the_step(kernel_type: Any) -> None:
    """Many rows, or targets in large units: float32 resolves an energy of 1e7 to 1, and the error of no step is smaller."""
    steps = []
    for offset in (0.0, 1e7):

        def model(offset: float = offset) -> None:
            pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.factor("rows", torch.tensor(-offset))

        pyro.set_rng_seed(0)
        steps.append(run(kernel_type(model, num_steps_per_sample=5), warmup=60).diagnostics()["step size"])
    assert steps[1] > 0.5 * steps[0]
    if kernel_type is ab.SGHMC:  # which curvature bounds
        assert steps[1] < 1.5 * steps[0]


def test_chains_in_modes_of_different_width_get_steps_of_their_own() -> None:
    centers = torch.tensor([0.0, 60.0])

    def model() -> None:
        widths = torch.tensor([[1.0], [3.0]]).expand(2, 400)
        law = dist.Independent(dist.Normal(centers[:, None].expand(2, 400), widths), 1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), law))

    initial = {"x": centers.repeat(4)[:, None].expand(8, 400).clone()}
    kernel = ab.SGHMC(model, num_steps_per_sample=5)
    mcmc = run(kernel, chains=8, samples=100, warmup=100, initial_params=initial)
    relative = kernel.variables["relative_step"].flatten()
    assert float(relative[1::2].min() / relative[::2].max()) > 4.0
    draws = mcmc.get_samples(group_by_chain=True)["x"] - initial["x"][:, None]
    deviation = draws[:, 50:].square().mean((1, 2)).sqrt()
    assert torch.allclose(deviation, torch.tensor([1.0, 3.0]).repeat(4), rtol=0.1)


@pytest.mark.parametrize("kernel_type", [ab.SGHMC, ab.MCLMC])
def test_every_chain_moves_by_the_step_that_is_given_for_it(kernel_type: Any) -> None:
    steps = torch.tensor([0.01, 0.04, 0.09])
    draws = []
    for given in (steps, steps.tolist(), steps.numpy(), 0.04):
        pyro.set_rng_seed(0)
        mcmc = run(kernel_type(gaussian(torch.ones(4)), step_size=given), chains=3, samples=5, warmup=2)
        draws.append(mcmc.get_samples(group_by_chain=True)["x"])
        found = mcmc.diagnostics()
        assert found["step sizes"] == (None if isinstance(given, float) else pytest.approx(steps.tolist()))
    one, *others, same = draws
    assert all(torch.equal(one, other) for other in others)
    assert torch.allclose(one[1], same[1], atol=1e-5)
    assert not torch.allclose(one[::2], same[::2], atol=1e-3)
    length = (one[:, 1] - one[:, 0]).norm(dim=-1)
    assert length[0] < length[1] < length[2]
    assert found["energy error"] is None


@pytest.mark.parametrize(
    ("kernel_type", "steps", "message"),
    [
        (ab.SGHMC, [0.1, 0.2], "step_size holds 2 numbers, one for each chain: there are 3 chains"),
        (ab.MCLMC, torch.tensor([0.1, 0.2, 0.3, 0.4]), "step_size holds 4 numbers"),
        (ab.SGHMC, [0.1, -0.2, 0.1], r"step_size\[1\] is -0.2"),
        (ab.SGHMC, [0.1, "x", 0.1], r"step_size\[1\] is 'x'"),
        (ab.SGLD, [0.1, 0.2, 0.3], "SGLDRule has one step for all chains"),
    ],
)
def test_steps_that_do_not_fit_the_chains_are_refused(kernel_type: Any, steps: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(kernel_type(gaussian(torch.ones(4)), step_size=steps), chains=3)


def test_a_chain_that_starts_again_keeps_the_step_that_it_has_now() -> None:
    kernel = ab.SGHMC(gaussian(torch.ones(30)), num_steps_per_sample=2)
    kernel.setup_chains(3, 50, (), {})
    params = kernel.initial_params
    for _ in range(5):
        params = kernel.sample(params)
    kernel.variables["relative_step"].copy_(torch.tensor([[1.0], [0.25], [4.0]]))
    lost, theta = torch.tensor([False, True, False]), kernel.theta.clone()
    assert restart(kernel.chains, lost, theta).tolist() == lost.tolist()
    assert not torch.equal(theta[1], kernel.theta[1])
    assert kernel.variables["relative_step"].flatten().tolist() == [1.0, 0.25, 4.0]


def test_a_lost_chain_does_not_shorten_the_others_steps_at_the_end_of_warm_up() -> None:
    kernel = ab.SGHMC(gaussian(torch.ones(30)), num_steps_per_sample=2)
    kernel.setup_chains(3, 50, (), {})
    params = kernel.initial_params
    for _ in range(5):
        params = kernel.sample(params)
    chains, relative = kernel.chains, kernel.variables["relative_step"]
    assert chains.auto is not None and chains.auto.value is not None
    chains.alive[1] = False
    relative.copy_(torch.tensor([[0.5], [1e-4], [2.0]]))
    found, before = chains.auto.value, 1e-3 * chains.auto.value
    chains.auto.value = before
    step_size.finish(kernel.run, chains.auto)
    assert chains.auto.value == before and relative.flatten().tolist() == [0.5, pytest.approx(1e-4), 2.0], "nothing bounds these steps"
    chains.auto.value = 1e3 * found  # now the bound does, of the chains that are left
    step_size.finish(kernel.run, chains.auto)
    first, _, last = (chains.auto.value * relative).flatten().tolist()
    assert first == pytest.approx(last) and chains.auto.value == pytest.approx(first) and first > 0.1 * found
