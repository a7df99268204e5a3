"""What a prior believes before it has seen data: :func:`prior_predictive`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, warn
from pyro_advbayes.infer.likelihood import read_likelihood
from pyro_advbayes.model.layers import kept_statistics
from pyro_advbayes.model.outcomes import Likelihood, likelihood_at
from pyro_advbayes.model.program import run

SURE = 0.9  # a prior whose untrained networks have a higher mean top probability has decided before it has seen data
INDIFFERENT = 0.3  # logits with a smaller standard deviation leave ten classes a top probability of at most 0.16
MOST_DEAD = 0.5

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold)


@dataclass(frozen=True)
class PriorPredictive:
    """
    The result of :func:`prior_predictive`; ``str(...)`` is a table of it. None where a model has no such number.

    :ivar num_draws: draws from the prior.
    :ivar logits: of a classifier: standard deviation of the logits, each input's mean over classes taken off.
    :ivar top_probability: of a classifier: mean probability of the likeliest class.
    :ivar num_classes: of a classifier: K; 1/K is the smallest that ``top_probability`` can be.
    :ivar mean: of a Normal likelihood: standard deviation of the predicted means, over draws and inputs.
    :ivar scale: of a Normal likelihood: median of the predicted standard deviations, the noise.
    :ivar dead_units: share of the units of ReLU modules that are 0 at every input, mean over draws.
    """

    num_draws: int
    logits: float | None = None
    top_probability: float | None = None
    num_classes: int | None = None
    mean: float | None = None
    scale: float | None = None
    dead_units: float | None = None

    def __str__(self) -> str:
        told = {
            "standard deviation of the logits": self.logits,
            "mean top probability": self.top_probability,
            "standard deviation of the predicted means": self.mean,
            "median of the predicted noise": self.scale,
            "share of dead units": self.dead_units,
        }
        lines = [f"{name:42} {value:8.3f}" for name, value in told.items() if value is not None]
        return "\n".join([f"{self.num_draws} draws from the prior", *lines])


@checked
def prior_predictive(model: Callable, *args: Any, num_draws: int = 50, site: str | None = None, **kwargs: Any) -> PriorPredictive:
    """
    What the prior of a classifier, or of a regression with a Normal likelihood, believes about inputs before it has seen data. Warns where
    that is absurd: of a classifier that is sure of one class (mean top probability above 0.9) or sees no difference between inputs (logits
    with a standard deviation below 0.3), and of networks whose units are dead for the most part. ::

        print(ab.prior_predictive(model, x[:200]))

    Layers keep their mode; BatchNorm that has never seen data passes on what it gets.

    :param model: a Pyro model with one outcome for each input.
    :param args: its arguments: ``x``, a few hundred inputs on the scale on which it will be trained. Observations do no harm.
    :param num_draws: draws from the prior, >= 2, each a run of the model.
    :param site: the observed site, where there are several.
    :param kwargs: its keyword arguments.
    :raises ValueError: if the model has no such outcome, naming what it has.
    """
    check_int(num_draws, "num_draws", 2)
    likelihood = read_likelihood(model, args, kwargs, site=site)
    if likelihood is None:
        raise ValueError("prior_predictive: the model observes nothing in a plate of as many rows as its inputs; it needs an observed site")
    normal = isinstance(likelihood.fn, Normal)
    if not normal:
        likelihood.check_classes("prior_predictive", "it takes classifiers and Normal likelihoods")
    drawn, dead = [], []
    with torch.no_grad(), kept_statistics():
        for _ in range(num_draws):
            with _dead_units(model) as shares:
                trace = run(model, (args, kwargs))
            drawn.append(_parameters(likelihood_at(trace, likelihood.site, likelihood.rows)))
            dead.append(shares)
    values = torch.stack(drawn).double()  # [draws, N, K], or [draws, 2, N]
    dead_units = float(torch.tensor([unit for shares in dead for unit in shares.values()]).mean()) if dead[0] else None
    if normal:
        mean, scale = values.unbind(1)
        found = PriorPredictive(num_draws, mean=float(mean.std()), scale=float(scale.median()), dead_units=dead_units)
    else:
        spread = (values - values.mean(-1, keepdim=True)).std()
        top = values.softmax(-1).amax(-1).mean()
        found = PriorPredictive(num_draws, float(spread), float(top), values.shape[-1], dead_units=dead_units)
    _tell(found)
    return found


def _parameters(likelihood: Likelihood) -> Tensor:
    if isinstance(likelihood.fn, Normal):
        return torch.stack([value.expand(likelihood.shape).flatten() for value in (likelihood.fn.loc, likelihood.fn.scale)])
    return likelihood.logits()


@contextlib.contextmanager
def _dead_units(model: Callable) -> Iterator[dict[nn.Module, float]]:
    """Within it, notes of every ReLU module that runs which share of its units is 0 at all inputs."""
    shares: dict[nn.Module, float] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        shares[module] = float((output == 0).all(0).double().mean())

    modules = model.modules() if isinstance(model, nn.Module) else ()
    hooks = [module.register_forward_hook(note) for module in modules if isinstance(module, _RECTIFIERS)]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def _tell(found: PriorPredictive) -> None:
    if found.top_probability is not None and found.top_probability > SURE:
        warn(
            f"the prior is sure of one class before it has seen data: mean top probability {found.top_probability:.2f}, logits with a "
            f"standard deviation of {found.logits:.3g}: take a narrower prior (nn.FanIn, a smaller scale), or standardise the inputs"
        )
    if found.logits is not None and found.logits < INDIFFERENT:
        warn(
            f"the prior's networks answer alike whatever the input is: logits with a standard deviation of {found.logits:.3g}: take a "
            "wider prior (nn.FanIn, a larger scale), or standardise the inputs"
        )
    if found.dead_units is not None and found.dead_units > MOST_DEAD:
        warn(
            f"{found.dead_units:.0%} of the units of ReLU layers are 0 at every input under the prior: centre the inputs, or take a "
            "narrower prior for the biases"
        )
