r"""
An attack that fits a distribution over perturbed inputs: :class:`AdversarialDistribution`.

The fit ascends :math:`\mathbb{E}_q[\ell] + \frac{\lambda}{D} H(q)` by reparameterised draws :math:`\tilde x = x + \epsilon a`,
:math:`a = \tanh u`, :math:`u = \mu + \sigma r`, :math:`\sigma = \mathrm{softplus}(\rho)`, :math:`r \sim N(0, 1)`. With
:math:`H(q) = \mathbb{E} \sum \log \sigma + \log(1 - a^2) + \text{const}`, one draw's share of the gradient is

.. math::
    g_\mu = \epsilon (1 - a^2) \nabla_{\tilde x} \ell(\tilde x) - \frac{2 \lambda}{D} a, \qquad
    g_\sigma = g_\mu r + \frac{\lambda}{D \sigma}, \qquad
    g_\rho = g_\sigma\, \mathrm{sigmoid}(\rho).

Where the range clips a draw, the loss's gradient is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro.distributions import Normal, TorchDistribution, TransformedDistribution
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import functional as F

from pyro_advbayes.attacks.base import GradientAttack
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked

LEAST_RHO = -40.0  # softplus(-40) = 4e-18: single precision holds its square, by which a normal density divides


class Law(NamedTuple):
    r"""
    The distribution :math:`x + \epsilon \tanh(N(\mu, \mathrm{softplus}(\rho)^2))` of every number of every input.

    :ivar mu: ``[N, ...]``.
    :ivar rho: ``[N, ...]``.
    """

    mu: Tensor
    rho: Tensor


def over_inputs(law: Law, x: Tensor, eps: float) -> TorchDistribution:
    """The law as a distribution of batch shape ``[N]`` and event shape ``[...]``, around inputs ``x`` ``[N, ...]``."""
    return TransformedDistribution(Normal(law.mu, F.softplus(law.rho)), [_IntoBall(x, eps)]).to_event(x.dim() - 1)


def slope_of_mu(a: Tensor, gradient: Tensor, eps: float, weight: float) -> Tensor:
    r"""
    One draw's :math:`g_\mu`.

    :param a: the draw, in units of eps from the clean input, ``[N, ...]``.
    :param gradient: of each row's loss with respect to its input, ``[N, ...]``; 0 where the range clips the draw.
    :param weight: of the entropy of one number, :math:`\lambda / D`.
    """
    return a.square().neg_().add_(1).mul_(gradient).mul_(eps).sub_(a, alpha=2 * weight)


@checked
@dataclass(frozen=True, repr=False)
class AdversarialDistribution(GradientAttack):
    r"""
    Fits a distribution over perturbed inputs to each input, and returns one draw of it,

    .. math::
        \tilde x = x + \epsilon \tanh(u), \quad u \sim N(\mu, \sigma^2), \quad \sigma = \mathrm{softplus}(\rho), \qquad
        \max_{\mu, \rho} \; \mathbb{E}_q[\ell(\tilde x)] + \frac{\text{entropy\_weight}}{D} H(q),

    where :math:`\mu` and :math:`\rho` have the shape of the input, :math:`D` is how many numbers it has, and :math:`H(q)` is the entropy in
    nats. From :math:`\mu = 0` and :math:`\sigma` = ``init_scale``, ``steps`` times

    .. math::
        G \leftarrow G + \sum_{k=1}^{\text{num\_samples}} \nabla_{(\mu, \rho)} \Big[\ell(\tilde x_k)
        + \frac{\text{entropy\_weight}}{D} \sum \big(\log \sigma + \log(1 - \tanh^2 u_k)\big)\Big], \qquad
        (\mu, \rho) \leftarrow (\mu, \rho) + \text{step\_size}\, \mathrm{sign}(G);

    without ``accumulate``, :math:`G` starts from 0 at every step. One call takes ``steps * num_samples`` gradients, 35 by default: compare
    with other attacks at equal gradients.

    **What it is for**: adversarial distributional training, ``TraceRobust_ELBO(AdversarialDistribution(eps))``, and a look at a
    classifier's adversarial inputs as a distribution, :meth:`fit`. **What it is not for**: an evaluation of robustness. A draw lies inside
    the ball (:math:`|\mu| \le \text{step\_size} \cdot \text{steps}`, so that the median perturbation is at most .97 eps by default), and
    is weaker than the result of :class:`PGD` at as many gradients. The mean of a classifier's predictions over several draws is no
    adversary, either. Evaluate with :class:`PGD` and :class:`APGD`.

    Signs ignore the size of a gradient. With one draw a step and no accumulation, or where the loss of a confident classifier has no
    gradient, :math:`\rho` takes a random walk, or follows the entropy whatever its weight; the entropy is largest at :math:`\mu = 0`,
    :math:`\sigma = 0.874`. Several draws and ``accumulate`` average this noise.

    The attack clips its draws to the range. A clipped number has no gradient of the loss, so that half of the first draws of a white or
    black pixel do not count. The fitted distribution, its density and its entropy are those before clipping.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack` and ``loss``; ``norm`` is ``"linf"``, the ball of tanh.

    Source: Y. Dong et al., Adversarial distributional training for robust deep learning, NeurIPS 2020, ADT-EXP, with the signs of the
    gradients and their accumulation over all steps in the authors' code. The defaults are its settings, but for ``init_scale``: there it is
    log 2 = softplus(0), from which seven noisy signs seldom narrow a distribution, so that its expected loss stays lower.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int steps: >= 1.
    :param int num_samples: draws for each step, >= 1.
    :param float step_size: of mu and rho, > 0.
    :param float entropy_weight: >= 0, in the units of a row's loss for one nat of each number on average.
    :param float init_scale: the first :math:`\sigma`, > 0.
    :param bool accumulate: whether gradients add up over steps.
    :raises ValueError: for a setting out of its range, or ``norm="l2"``.
    """

    steps: int = 7
    num_samples: int = 5
    step_size: float = 0.3
    entropy_weight: float = 0.01
    init_scale: float = 0.13
    accumulate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "num_samples"):
            self.check_count(name)
        for name in ("step_size", "init_scale"):
            self.check_positive(name)
        if not 0 <= self.entropy_weight < math.inf:
            raise ValueError(f"entropy_weight={self.entropy_weight!r}: a finite number >= 0")
        if self.norm != "linf":
            raise ValueError(f"norm={self.norm!r}: tanh fills the ball of the maximum norm only: leave norm='linf', or take PGD")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        """Fits the distribution, and draws once."""
        mu, rho = self._fitted(problem, region)
        a = torch.addcmul(mu, F.softplus(rho), torch.randn_like(mu)).tanh()
        return region.center + self.eps * a.to(region.center.dtype)

    @checked
    def fit(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> TorchDistribution:
        """
        The distribution of which a call returns a draw, before clipping::

            q = AdversarialDistribution(eps=0.1).fit(classifier, x, y)
            draws = q.sample((100,))  # [100, N, ...], within the ball; draws.clamp(0, 1) is within the range, too
            q.log_prob(draws)         # [100, N], exact

        Draws may leave the range ``clip``; the density is that of unclipped draws, and at a clipped one it leaves out the draws that clip
        to the same input.

        :param classifier: as for a call, as are ``x`` ``[N, ...]`` and ``y`` ``[N]``.
        :return: of batch shape ``[N]`` and event shape ``[...]``, on the ball. In half precision it is that of inputs in float32.
        :raises ValueError: as for a call.
        """
        laws = self.in_batches(lambda problem, inputs: self._fitted(problem, self.region(inputs)), classifier, x, y)
        law = Law(*(torch.cat(parts) for parts in zip(*laws, strict=True)))
        return over_inputs(law, x.detach().to(law.mu.dtype), self.eps)

    def _fitted(self, problem: Problem, ball: Ball) -> Law:
        x = ball.center
        mu = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))  # half precision rounds off tanh's slope
        first = self.init_scale + math.log(-math.expm1(-self.init_scale))  # the inverse of softplus, also of a large number
        rho = torch.full_like(mu, max(first, LEAST_RHO))
        of_mu, of_rho = torch.zeros_like(mu), torch.zeros_like(mu)
        weight = self.entropy_weight / x[0].numel()
        for _ in range(self.steps):
            if not self.accumulate:
                of_mu, of_rho = torch.zeros_like(mu), torch.zeros_like(mu)
            scale = F.softplus(rho)
            of_scale = self.num_samples * weight / scale
            for _ in range(self.num_samples):
                noise = torch.randn_like(mu)
                a = torch.addcmul(mu, scale, noise).tanh_()
                wide = x + self.eps * a.to(x.dtype)
                inside = ball.restrict(wide)
                slope = slope_of_mu(a, problem.gradient(inside).gradient * (inside == wide), self.eps, weight)
                of_mu += slope
                of_scale.addcmul_(slope, noise)
            of_rho.addcmul_(of_scale, rho.sigmoid())
            mu = mu + self.step_size * of_mu.sign()
            rho = (rho + self.step_size * of_rho.sign()).clamp_min(LEAST_RHO)
        return Law(mu, rho)


class _IntoBall(Transform):
    r"""
    :math:`u \mapsto x + \epsilon \tanh u`. The composition of PyTorch's own transforms gives NaN for the density at a draw that is
    rounded to the ball's surface; here it is taken at the nearest point inside.
    """

    bijective, domain, sign = True, constraints.real, +1

    def __init__(self, x: Tensor, eps: float) -> None:
        super().__init__(cache_size=1)  # so that the density of the latest draws is that of their u, which rounding does not touch
        self._x, self._eps = x, eps
        self.codomain = constraints.interval(x - eps, x + eps)

    def _call(self, u: Tensor) -> Tensor:
        return self._x + self._eps * u.tanh()

    def _inverse(self, x: Tensor) -> Tensor:
        most = 1 - torch.finfo(x.dtype).eps
        return ((x - self._x) / self._eps).clamp(-most, most).atanh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # x is u, y the input: PyTorch's names
        return math.log(self._eps) + 2 * (math.log(2) - x - F.softplus(-2 * x))  # eps (1 - tanh^2), without the cancellation
