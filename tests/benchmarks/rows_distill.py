"""Rows about the time of distilling a posterior, and of drawing from what it was distilled into."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_advbayes.infer.autoguide.factored import FactoredGenerator
from pyro_advbayes.infer.autoguide.generators import MLPGenerator
from pyro_advbayes.infer.distill.apd import PRESETS
from pyro_advbayes.infer.distill.wgan import WGAN
from tests.benchmarks.measure import Contender, Result, Stopwatch, Target
from tests.benchmarks.rows_sampling import compare

WEIGHTS = 478_410  # of 784-400-400-10
RANK = 8
OURS, LOOP = "WGAN", "hand-written loop"
DRAW, PARTS = "FactoredGenerator", "its random numbers and product"


def _wgan(draws: Tensor) -> Contender:
    generator = MLPGenerator()
    generator.build([draws.shape[1:]], draws.dtype, draws.device)
    return Contender(WGAN(generator, draws.shape[1], PRESETS["paper"], lambda count: _batch(draws, count)).step)


def _loop(draws: Tensor) -> Contender:
    """The published settings as one writes them in PyTorch."""

    def network(*widths: int) -> nn.Sequential:
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1]).to(draws.device)

    settings = PRESETS["paper"]
    size, batch = draws.shape[1], settings.batch_size
    generator, critic = network(32, 100, 100, 100, size), network(size, 100, 100, 100, 1)
    options = {"lr": settings.learning_rate, "betas": settings.betas}
    of_generator, of_critic = (torch.optim.Adam(module.parameters(), **options) for module in (generator, critic))

    def made() -> Tensor:
        return generator(torch.randn(batch, 32, device=draws.device))

    def step() -> None:
        for _ in range(settings.critic_steps):
            real = _batch(draws, batch)
            with torch.no_grad():
                fake = made()
            share = torch.rand(batch, 1, device=draws.device)
            mixed = (share * real + (1 - share) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            loss = critic(fake).mean() - critic(real).mean() + settings.penalty * ((slope.norm(dim=1) - 1) ** 2).mean()
            of_critic.zero_grad()
            loss.backward()
            of_critic.step()
        of_generator.zero_grad()
        (-critic(made()).mean()).backward()
        of_generator.step()

    return Contender(step)


def _batch(draws: Tensor, count: int) -> Tensor:
    return draws[torch.randint(len(draws), (count,), device=draws.device)]


def _race(watch: Stopwatch, size: int) -> list[Result]:
    draws = torch.randn(200, 20 if watch.quick else size, device=watch.device)
    makers = {OURS: partial(_wgan, draws), LOOP: partial(_loop, draws)}
    return [compare(watch, f"a step of WGAN-GP on draws of {draws.shape[1]} weights", makers, [(OURS, LOOP, Target("<=", 1.05))])]


def distill_small(watch: Stopwatch) -> list[Result]:
    """A step of WGAN-GP at the published settings on draws of six weights, against a hand-written loop."""
    return _race(watch, 6)


def distill_medium(watch: Stopwatch) -> list[Result]:
    """The same on draws of 64-50-10."""
    return _race(watch, 3760)


def factored_draws(watch: Stopwatch) -> list[Result]:
    """Drawing networks of 784-400-400-10 from the factored generator, against its random numbers and its matrix product alone."""
    size, count = (1000, 10) if watch.quick else (WEIGHTS, 100)

    def ours() -> Contender:
        generator = FactoredGenerator(RANK)
        generator.build([torch.Size([size])], torch.float32, watch.device)
        for buffer in (buffer for buffer in generator.buffers() if buffer.is_floating_point()):
            buffer.uniform_(0.1, 1.0)
        return Contender(lambda: generator.sample(count), count)

    def parts() -> Contender:
        codes, basis = torch.randn(count, RANK, device=watch.device), torch.randn(RANK, size, device=watch.device)
        return Contender(lambda: (torch.randn(count, size, device=watch.device), codes @ basis), count)

    return [compare(watch, f"a draw of {size} weights, {count} at a time", {DRAW: ours, PARTS: parts}, [(DRAW, PARTS, Target("<=", 1.2))])]
