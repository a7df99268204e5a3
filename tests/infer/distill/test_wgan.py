from __future__ import annotations

import copy
import dataclasses
import warnings

import pyro
import pytest
import torch

from pyro_advbayes.infer.autoguide.generators import MLPGenerator
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.distill import APD, PRESETS, wgan
from pyro_advbayes.infer.distill.training import Settings
from pyro_advbayes.infer.distill.wgan import WGAN
from tests.small_models import data, regression

DATA = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double()


def training(settings: Settings) -> WGAN:
    generator = MLPGenerator(noise=4, hidden=(8,))
    generator.build([torch.Size([3])], torch.float64, torch.device("cpu"))
    return WGAN(generator, 3, settings, lambda count: DATA[torch.randint(500, (count,))])


def by_hand(generator, critic, settings: Settings, steps: int) -> None:
    """The published algorithm, with autograd."""
    options = {"lr": settings.learning_rate, "betas": WGAN.betas}
    of_critic, of_generator = (torch.optim.Adam(module.parameters(), **options) for module in (critic, generator))
    size, count = settings.batch_size, settings.critic_steps
    for step in range(steps):
        reals = DATA[torch.randint(500, (count * size,))].split(size)
        fakes = generator.code(torch.randn(count * size, 4, dtype=DATA.dtype)).detach().split(size)
        shares = torch.rand(count * size, dtype=DATA.dtype).split(size)
        for real, fake, share in zip(reals, fakes, shares, strict=True):
            mixed = (share[:, None] * real + (1 - share[:, None]) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            loss = critic(fake).mean() - critic(real).mean() + settings.penalty * ((slope.norm(dim=1) - 1) ** 2).mean()
            of_critic.zero_grad()
            loss.backward()
            of_critic.step()
        if step > 0:
            of_generator.zero_grad()
            (-critic(generator.code(torch.randn(size, 4, dtype=DATA.dtype))).mean()).backward()
            of_generator.step()


def test_three_steps_are_those_of_the_published_algorithm():
    settings = dataclasses.replace(PRESETS["paper"], batch_size=20, critic_hidden=(8, 8), learning_rate=1e-3)
    ours = training(settings)
    generator, critic = copy.deepcopy(ours.generator), copy.deepcopy(ours.critic)
    torch.manual_seed(1)
    for _ in range(3):
        ours.step()
    torch.manual_seed(1)
    by_hand(generator, critic, settings, 3)
    for module, other in ((ours.generator, generator), (ours.critic, critic)):
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("together", [2**22, 0])
def test_every_critic_step_has_a_real_batch_of_its_own(monkeypatch, together):
    monkeypatch.setattr(wgan, "CODES_TOGETHER", together)
    taken = []
    run = training(Settings(objective="wgan-gp", batch_size=10, critic_steps=4, critic_hidden=(8,)))
    run.draw = lambda count: taken.append(torch.randint(500, (count,))) or DATA[taken[-1]]
    run.step()
    rows = torch.cat(taken)
    assert len(rows) == 40 and len({tuple(batch.tolist()) for batch in rows.split(10)}) == 4


def test_what_is_kept_is_the_moving_average_of_the_generators_parameters():
    run = training(Settings(objective="wgan-gp", batch_size=10, critic_hidden=(8,), ema=0.8))
    expected = [p.detach().clone() for p in run.generator.parameters()]
    for step in range(60):
        run.step()
        if step:  # in the first step only the critic learns
            decay = min(0.8, step / (step + 10))
            expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, run.generator.parameters(), strict=True)]
    for average, value in zip(run.average, expected, strict=True):
        torch.testing.assert_close(average, value)
    run.swap()
    for p, value in zip(run.generator.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


def test_sites_with_a_support_are_fitted_in_unconstrained_space():
    x, y = data(30)
    samples = {"w": torch.randn(2000, 3), "b": torch.randn(2000) - 100, "scale": torch.randn(2000).mul(0.5).add(3.0).exp()}
    guide = AutoImplicit(regression, MLPGenerator(noise=8, hidden=(32, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        APD(guide, num_steps=1500).fit(samples, x, y)
    log_scale = guide.sample(4000)["scale"].log()
    assert float(log_scale.mean()) == pytest.approx(3.0, abs=0.1)  # as a number it would be 23 with sd 12
    assert float(log_scale.std()) == pytest.approx(0.5, abs=0.1)
    assert list(pyro.get_param_store().keys()) == []
