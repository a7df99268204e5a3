r"""
A Wasserstein GAN with gradient penalty (Gulrajani et al., 2017), as Adversarial Posterior Distillation (Wang et al., ICML 2018) uses it:
with codes :math:`c` of draws, generated codes :math:`\tilde c = g(z)`, and points between them,
:math:`\hat c = u c + (1 - u) \tilde c` with one uniform :math:`u` for each pair, the critic D minimises

.. math:: \mathrm E\, D(\tilde c) - \mathrm E\, D(c) + \lambda\, \mathrm E\, (|\nabla D(\hat c)| - 1)^2,

and the generator minimises :math:`-\mathrm E\, D(g(z))`. Every critic step takes a new batch of draws; in the first step only the critic
learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_advbayes.infer.autoguide.generators import RowGenerator
from pyro_advbayes.infer.distill.critic import Critic
from pyro_advbayes.infer.distill.training import Settings, Training

# The largest size, in numbers, of the draws' codes of one step that are computed together.
CODES_TOGETHER = 2**22


class WGAN(Training):
    """A generator and its critic; see :class:`~pyro_advbayes.infer.distill.training.Training`."""

    betas: ClassVar[tuple[float, float]] = (0.5, 0.9)  # those of the authors' code, and a constant learning rate
    half_life: ClassVar[float | None] = None

    def __init__(self, generator: RowGenerator, code_size: int, settings: Settings, draw: Callable[[int], Tensor]) -> None:
        super().__init__(generator, code_size, settings, draw)
        like = next(generator.parameters())
        self.critic = Critic(code_size, settings.critic_hidden, like.dtype, like.device)
        self.optimizers.append(self.adam(self.critic))
        together = settings.critic_steps * settings.batch_size * code_size <= CODES_TOGETHER
        self._pieces = settings.critic_steps if together else 1

    def _step(self) -> Tensor:
        settings = self.settings
        for _ in range(0, settings.critic_steps, self._pieces):
            count = self._pieces * settings.batch_size
            real = self.draw(count)
            with torch.no_grad():  # the generator does not change while the critic learns
                fake = self.made(count)
            share = torch.rand(count, dtype=real.dtype, device=real.device)
            size = settings.batch_size
            for batch in zip(real.split(size), fake.split(size), share.split(size), strict=True):
                distance = self.critic.backward(*batch, settings.penalty)
                self.optimizers[1].step()
        if self.steps:
            codes = self.made(settings.batch_size)
            self.optimizers[0].zero_grad()
            codes.backward(self.critic.slope(codes.detach()) / -len(codes))
            self.optimizers[0].step()
            self._keep_average()
        return distance

    def state(self) -> dict[str, Any]:
        return {**super().state(), "critic": dict(self.critic.state_dict())}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.critic.load_state_dict(state["critic"])
