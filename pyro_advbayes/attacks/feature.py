"""An attack on the activations of a hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_advbayes.attacks.base import Attack, BallAttack, ascend
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Ascent, ClassifierProblem, Problem, check_gradient, differentiate
from pyro_advbayes.checked import checked
from pyro_advbayes.kinds import sample_sites
from pyro_advbayes.model.layers import refuse_inference_mode
from pyro_advbayes.model.program import run


@checked
@dataclass(frozen=True, repr=False)
class FeatureAttack(BallAttack):
    r"""
    Moves the activations :math:`a_s` of a layer away from those of the clean input, or towards those of other inputs :math:`x'`: PGD from a
    random point on

    .. math::
        \ell(\tilde x) = \frac1S \sum_s \|a_s(\tilde x) - a_s(x)\|_2^2
        \qquad\text{or}\qquad
        \ell(\tilde x) = -\frac1S \sum_s \|a_s(\tilde x) - a_s(x')\|_2^2.

    It needs a network, or a posterior with ``model`` and ``posterior_samples``, such as :class:`~pyro_advbayes.PosteriorClassifier`. The
    draws run one by one through Pyro, and the reference activations of all draws are kept, so that memory grows with the draws. Labels are
    not used.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack` and ``norm``, without ``objective`` and ``eot``.

    Source: S. Sabour et al., Adversarial manipulation of deep representations, ICLR 2016 (towards).

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param str layer: the name of a layer in the network's (or the model's) ``named_modules()``; its output must be a tensor ``[N, ...]``.
    :param int steps: >= 1.
    :param float step_size: > 0; by default 2.5 eps / steps.
    :param Tensor towards: inputs of the shape of ``x`` whose activations are the target; None moves away from the clean ones.
    """

    layer: str
    steps: int = 40
    step_size: float | None = None
    towards: Tensor | None = field(default=None, compare=False)

    needs_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("steps")
        if self.step_size is not None:
            self.check_positive("step_size")
        if self.towards is not None and self.batch_size is not None:
            raise ValueError("batch_size cannot be combined with towards, whose rows match those of the inputs")
        if self.targeted or self.eot > 1 or self.objective != Attack.objective:
            raise ValueError("FeatureAttack uses no labels and the model's own draws: leave targeted, eot and objective at their defaults")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        """PGD on the distance of the activations, from a random point of the ball."""
        assert isinstance(problem, ClassifierProblem)  # since needs_classifier
        problem.examine(region.center)  # raises for anything but a classifier
        reference = region.center if self.towards is None else self.towards.to(region.center)
        if reference.shape != region.center.shape:
            raise ValueError(f"towards must be {tuple(region.center.shape)}, like the inputs, not {tuple(reference.shape)}")
        start = region.random()
        layer = _Layer(problem.classifier, self.layer, region.center)
        away = _Distance(layer, reference, 1.0 if self.towards is None else -1.0)
        return ascend(away, region, start, self.steps, self.step_size or 2.5 * self.eps / self.steps)


class _Distance:
    """Squared distance (times ``sign``) of a layer's activations from those at ``reference``, draw by draw."""

    def __init__(self, layer: _Layer, reference: Tensor, sign: float) -> None:
        self._layer, self._sign = layer, sign
        with torch.no_grad():
            self._references = list(layer.activations(reference))

    def gradient(self, x: Tensor) -> Ascent:
        """The distance at inputs ``[N, ...]``, averaged over draws, and its gradient."""
        refuse_inference_mode("the attack")
        x, losses, gradients = x.detach().requires_grad_(), torch.zeros((), device=x.device), torch.zeros_like(x)
        with torch.enable_grad():
            for activation, reference in zip(self._layer.activations(x), self._references, strict=True):
                loss = self._sign * (activation - reference).square().sum(1)
                gradients = gradients + differentiate(loss, x)
                losses = losses + loss.detach()
        count = len(self._references)
        return Ascent(losses / count, check_gradient(gradients / count), None)


class _Layer:
    """A layer's output, in a network or in every draw of a posterior."""

    def __init__(self, classifier: Callable, name: str, x: Tensor) -> None:
        samples = getattr(classifier, "posterior_samples", None)
        model = classifier if samples is None else getattr(classifier, "model", None)
        if not isinstance(model, nn.Module):
            raise ValueError("FeatureAttack needs the network as a torch.nn.Module, or a posterior whose model is one")
        self._model, layers = model, dict(model.named_modules())
        if name not in layers:
            raise ValueError(f"layer={name!r}: the network has {', '.join(repr(n) for n in layers if n)}")
        self._name, self._layer = name, layers[name]
        self._draws: list[dict[str, Tensor]] = [{}]
        if samples:
            sites = sample_sites(run(model, ((x,), {}), None, torch.no_grad()))
            count = len(next(iter(samples.values())))
            # Pyro's Predictive puts dimensions of size 1 in front, which a weight matrix must not have
            self._draws = [{n: v[i].reshape(sites[n]["fn"].shape()) for n, v in samples.items() if n in sites} for i in range(count)]

    def activations(self, x: Tensor) -> Iterator[Tensor]:
        """``[N, features]`` for each draw."""
        for draw in self._draws:
            kept: list[Any] = []
            handle = self._layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(_as_it_is(output)))
            try:
                run(self._model, ((x,), {}), draw)
            finally:
                handle.remove()
            if not kept or not isinstance(kept[-1], Tensor) or kept[-1].shape[:1] != x.shape[:1]:
                raise ValueError(f"layer={self._name!r} does not give one tensor [N, ...] when the network is called: name another")
            yield kept[-1].flatten(1)


def _as_it_is(output: Any) -> Any:
    """A copy of a layer's output, since a later layer may write into it."""
    return output.clone() if isinstance(output, Tensor) else output
