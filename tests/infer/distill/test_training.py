"""What training a generator is, whatever the objective."""

from __future__ import annotations

import pytest
import torch

from pyro_advbayes.infer.autoguide.generators import MLPGenerator
from pyro_advbayes.infer.distill.energy import EnergyDistance, energy_loss
from pyro_advbayes.infer.distill.training import Settings
from pyro_advbayes.infer.distill.wgan import WGAN

DATA = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double()
SMALL = Settings(batch_size=10, critic_hidden=(8,), critic_steps=1, learning_rate=0.02)


def training(kind, settings):
    generator = MLPGenerator(noise=4, hidden=(8,))
    generator.build([torch.Size([3])], torch.float64, torch.device("cpu"))
    return kind(generator, 3, settings, lambda count: DATA[torch.randint(500, (count,))])


@pytest.mark.parametrize("kind", [EnergyDistance, WGAN])
def test_the_learning_rate_of_all_optimisers_falls_as_the_half_life_says(kind, monkeypatch):
    monkeypatch.setattr(kind, "half_life", 4.0)
    run = training(kind, SMALL)
    rates = []
    for _ in range(9):
        run.step()
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers])
    assert len(rates[0]) == (2 if kind is WGAN else 1)
    for step, found in enumerate(rates):
        assert found == pytest.approx([0.02 / (1.0 + step / 4.0)] * len(found), rel=1e-12)
    assert rates[4] == pytest.approx([0.01] * len(found))


def test_the_learning_rate_without_a_half_life_stays():
    run = training(WGAN, SMALL)
    for _ in range(3):
        run.step()
        assert run.optimizers[0].param_groups[0]["lr"] == 0.02


def test_steps_on_the_energy_distance_are_those_of_adam_at_the_falling_rate():
    run = training(EnergyDistance, SMALL)
    generator = MLPGenerator(noise=4, hidden=(8,))
    generator.build([torch.Size([3])], torch.float64, torch.device("cpu"))
    generator.load_state_dict(run.generator.state_dict())
    adam = torch.optim.Adam(generator.parameters(), betas=(0.9, 0.99))
    torch.manual_seed(1)
    for _ in range(3):
        run.step()
    torch.manual_seed(1)
    for step in range(3):
        adam.param_groups[0]["lr"] = 0.02 / (1.0 + step / 500.0)
        adam.zero_grad()
        real = DATA[torch.randint(500, (10,))]
        energy_loss(generator.code(generator.latent(10)), real).backward()
        adam.step()
    for one, two in zip(run.generator.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(one, two)
