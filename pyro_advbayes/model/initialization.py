"""Where chains start."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor
from torch.distributions import constraints

from pyro_advbayes.checked import checked

FEW = 20  # elements, of which a linear predictor stays within a few units where each starts up to 2 away


@checked
def init_to_fan_in(site: dict[str, Any]) -> Tensor:
    r"""
    Draws real sites around the mean of their prior :math:`p`. Weights (sites of a module, of two or more dimensions, or of more than 20
    elements) start at the scale at which networks are trained:

    .. math:: \theta = \mathrm{E}_p[\theta] + \min\bigl(\mathrm{sd}_p, 1/\sqrt{\mathrm{fan\_in}}\bigr)\, n,
        \qquad n \sim \mathrm{Normal}(0, 1),

    where fan_in is the number of inputs of a weight ``[out, in, ...]`` and the number of elements of anything smaller. A draw
    from a unit-normal prior, Pyro's usual start, makes a wide network's logits so large that its first gradients are useless.
    Any other site starts as far out as in Pyro's NUTS, so that chains in different modes can be told apart:

    .. math:: \theta = \mathrm{E}_p[\theta] + \min(\mathrm{sd}_p, 2)\, u, \qquad u \sim \mathrm{Uniform}(-1, 1).

    Sites of other support start at Pyro's ``init_to_uniform(radius=1)``.

    An initialisation strategy like those in ``pyro.infer.autoguide.initialization``.

    :param site: a Pyro sample message.
    :return: a value of the site's shape.
    """
    if not {"name", "fn"} <= set(site):
        raise ValueError(f"site holds {sorted(site)}: a Pyro sample message is needed, with name and fn")
    fn = site["fn"]
    support = fn.support
    while hasattr(support, "base_constraint"):  # of to_event, of a mixture
        support = support.base_constraint
    if support is not constraints.real and support is not constraints.real_vector:
        return init_to_uniform(site, radius=1.0)
    shape = fn.shape()
    weights = len(shape) > 1 or shape.numel() > FEW or "." in site["name"]  # a module's sites have its attributes' names
    fan_in = shape[1:].numel() if len(shape) > 1 else shape.numel()
    like = fn.sample()
    scale = torch.full_like(like, fan_in**-0.5 if weights else 2.0)
    direction = torch.randn_like(like) if weights else 2.0 * torch.rand_like(like) - 1.0
    centre = torch.zeros_like(like)
    try:
        mean, variance = fn.mean.expand(shape), fn.variance.expand(shape)
    except (NotImplementedError, AttributeError):
        return scale * direction
    centre = torch.where(mean.isfinite(), mean, centre)
    scale = torch.where(variance.isfinite(), torch.minimum(variance.sqrt(), scale), scale)
    return centre + scale * direction
