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
from pyro_advbayes.infer.mcmc.noise import NormalNoise
from tests.benchmarks.measure import Contender, Result, Stopwatch, Target
from tests.benchmarks.rows_sampling import compare

WEIGHTS = 478_410  # of 784-400-400-10
RANK, PACKED_RANK = 8, 32
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
    options = {"lr": settings.learning_rate, "betas": WGAN.betas}
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


def distill_large(watch: Stopwatch) -> list[Result]:
    """The same on draws of 784-400-400-10, for which the generator and the critic have 48 million weights each."""
    return _race(watch, WEIGHTS)


def factored_draws(watch: Stopwatch) -> list[Result]:
    """
    Drawing networks of 784-400-400-10 from factored generators, with a network and with kept codes in bytes, against their random numbers
    and their matrix products alone.
    """
    size, count = (1000, 10) if watch.quick else (WEIGHTS, 100)

    def ours(rank: int, packed: bool) -> Contender:
        generator = FactoredGenerator(rank, hidden=None, packed=True) if packed else FactoredGenerator(rank)
        generator.build([torch.Size([size])], torch.float32, watch.device)
        for buffer in (buffer for buffer in generator.buffers() if buffer.is_floating_point()):
            buffer.uniform_(0.1, 1.0)
        if packed:
            generator.codes = torch.randn(count, rank, device=watch.device)
            generator.finish()
        return Contender(lambda: generator.sample(count), count)

    def parts(rank: int) -> Contender:
        codes, basis = torch.randn(count, rank, device=watch.device), torch.randn(rank, size, device=watch.device)

        def alone() -> Tensor:
            rows = torch.empty(count, size, device=watch.device)
            noise = NormalNoise(rows)
            for row in rows.split(1):  # as the generator does, and no second array for the product
                noise.fill(row)
            return rows.addmm_(codes, basis)

        return Contender(alone, count)

    results = []
    for rank, packed, what in ((RANK, False, "a network"), (PACKED_RANK, True, "kept codes, packed")):
        makers = {DRAW: partial(ours, rank, packed), PARTS: partial(parts, rank)}
        results.append(
            compare(watch, f"a draw of {size} weights, {count} at a time, rank {rank}, {what}", makers, [(DRAW, PARTS, Target("<=", 1.2))])
        )
    return results
