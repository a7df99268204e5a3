"""Schedules are the equations in their docstrings, and samples are taken only where they say so."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc.schedules import Constant, Cyclical, Polynomial, as_schedule, check_value, keeps_sample


def test_a_number_is_a_constant_schedule():
    schedule = as_schedule(0.3, "step_size")
    assert schedule == Constant(0.3) and [schedule(step) for step in (0, 7, 10**9)] == [0.3] * 3
    assert as_schedule(1, "temperature")(5) == 1.0


@pytest.mark.parametrize("initial,scale,power", [(0.1, 10.0, 0.55), (2.0, 1.0, 1.0), (0.5, 3.0, 0.0)])
def test_polynomial_decay_is_a_times_one_plus_t_over_b_to_minus_gamma(initial, scale, power):
    schedule = Polynomial(initial, scale, power)
    for step in (0, 1, 10, 1000):
        assert schedule(step) == pytest.approx(initial * (1 + step / scale) ** -power, rel=1e-12)
    assert schedule(scale) == pytest.approx(initial * 2**-power)


def test_a_cycle_is_half_a_cosine_from_the_initial_value_to_zero():
    schedule = Cyclical(0.2, 10)
    for step in range(40):
        assert schedule(step) == pytest.approx(0.1 * (math.cos(math.pi * (step % 10) / 10) + 1))
    assert schedule(0) == schedule(10) == 0.2 and 0 < schedule(9) < 0.01


@pytest.mark.parametrize("explore,kept", [(0.0, range(10)), (0.5, range(5, 10)), (0.75, range(8, 10)), (0.9, [9])])
def test_samples_are_kept_in_the_cold_part_of_a_cycle(explore, kept):
    schedule = Cyclical(0.2, 10, explore)
    assert [step for step in range(10) if schedule.keeps(step)] == list(kept)
    assert [step - 10 for step in range(10, 20) if schedule.keeps(step)] == list(kept)


def test_every_schedule_decides_what_is_kept():
    one, other = Cyclical(0.2, 10, 0.5), Cyclical(1.0, 4, 0.5)
    assert [step for step in range(20) if keeps_sample((one, other), step)] == [6, 7, 15, 18, 19]
    assert keeps_sample((Constant(1.0), Polynomial(1.0, 1.0), lambda step: 1.0), 3)


@pytest.mark.parametrize("options", [{"period": 1}, {"period": 10, "explore": 1.0}, {"period": 10, "explore": -0.1}])
def test_a_cycle_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="period must be at least 2 updates and explore in"):
        Cyclical(0.1, **options)


def test_a_cycle_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves no update of a cycle to take a sample from: lower explore"):
        Cyclical(0.1, period=10, explore=0.95)


def test_zero_is_a_temperature_but_no_step():
    assert check_value(0.0, "temperature", 3) == 0.0
    with pytest.raises(ValueError, match=r"step_size is 0.0 at step 3: it must be finite and > 0"):
        check_value(0.0, "step_size", 3)


def test_a_number_may_come_in_a_tensor():
    assert check_value(torch.tensor(0.5), "step_size", 0) == 0.5


def flat():
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_a_run_follows_its_schedules_update_by_update():
    step_size, temperature = Polynomial(0.1, 5.0, 1.0), lambda step: 1.0 / (1 + step)
    mcmc = ab.SGMCMC(ab.SGLD(flat, step_size, temperature, num_steps_per_sample=3, backend="handlers"), 4, 2, disable_progbar=True)
    mcmc.run()
    last = torch.tensor([3.0 * (2 + i) + 2 for i in range(4)], dtype=torch.float64)  # the number of each sample's last update
    torch.testing.assert_close(mcmc.sample_stats()["step_size"][0], 0.1 / (1 + last / 5))
    torch.testing.assert_close(mcmc.sample_stats()["temperature"][0], 1 / (1 + last))


def test_a_cyclical_run_takes_its_samples_in_the_cold_part_only():
    schedule = Cyclical(0.1, 10, 0.6)
    mcmc = ab.SGMCMC(ab.SGLD(flat, schedule, backend="handlers"), 12, 0, disable_progbar=True)
    mcmc.run()
    cold = torch.tensor([schedule(step) for step in range(6, 10)], dtype=torch.float64)
    torch.testing.assert_close(mcmc.sample_stats()["step_size"][0], cold.repeat(3))
    assert mcmc.kernel.steps == 30


def test_warmup_takes_every_update_of_a_cycle():
    seen = []
    schedule = Cyclical(0.1, 10, 0.6)
    mcmc = ab.SGMCMC(
        ab.SGLD(flat, schedule, backend="handlers"), 4, 10, hook_fn=lambda kernel, *_: seen.append(kernel.steps), disable_progbar=True
    )
    mcmc.run()
    assert seen == [*range(1, 11), 17, 18, 19, 20]
