"""Independently trained networks as draws: :func:`deep_ensemble`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int
from pyro_advbayes.handlers import CoveredMessenger
from pyro_advbayes.model.batches import Arguments, TensorRows
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.model.program import run
from pyro_advbayes.model.refusals import Given, told
from pyro_advbayes.model.scale import minibatch
from pyro_advbayes.model.structure import prior_factors, try_model
from pyro_advbayes.tracing.guard import RandomState


@checked
def deep_ensemble(
    model: Callable,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_members: int = 5,
    num_steps: int,
    optim: PyroOptim,
    batch_size: int | None = None,
    loss: ELBO | None = None,
    init_loc_fn: Callable = init_to_fan_in,
) -> dict[str, Tensor]:
    """
    MAP estimates from independent starts, as draws: a deep ensemble (Lakshminarayanan et al., 2017) with the model's priors as weight
    decay. ::

        members = deep_ensemble(model, (x, y), num_steps=2000, optim=Adam({"lr": 1e-3}), batch_size=100)
        ensemble = PosteriorClassifier(model, members)   # PosteriorRegressor(model, members) of a Normal likelihood

    Each member is an ``AutoDelta`` trained by Pyro's SVI, in a separate parameter store (in one store guides share parameters by name) and
    on separately shuffled epochs; ``num_members=1`` is one network trained by SGD.

    :param model: a Pyro model with continuous latent sites.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param int num_members: number of networks, >= 1.
    :param int num_steps: updates of each, >= 1.
    :param PyroOptim optim: every member starts with a copy. Not a scheduler, since it would not be stepped; ``ClippedAdam`` decays its step
        size itself (``lrd``).
    :param int batch_size: rows in a minibatch, whose likelihood is scaled to all rows; None for all rows at every step.
    :param ELBO loss: ``Trace_ELBO()`` by default; :class:`~pyro_advbayes.TraceRobust_ELBO` makes an ensemble of adversarially
        trained networks.
    :param init_loc_fn: the start of a member, as in ``AutoDelta``; it must be random, or all members are equal.
    :return: site -> ``[members, *site]``, as ``posterior_samples``.
    :raises ValueError: if a count is below 1, ``optim`` is a scheduler, there are fewer than ``batch_size`` rows, or the model has
        trainable parameters without a prior, which draws do not include.
    """
    check_int(num_members, "num_members", 1)
    check_int(num_steps, "num_steps", 1)
    if isinstance(optim, PyroLRScheduler):
        raise ValueError("optim is a scheduler, which would not be stepped: give an optimiser, such as ClippedAdam with lrd")
    given = Given(model, args, kwargs)
    arguments = told(lambda values: _examined(model, *given.call(values), batch_size), given.values)
    members = []
    with tqdm(total=num_members * num_steps, desc="deep ensemble", disable=None) as bar:
        for _ in range(num_members):
            with pyro.get_param_store().scope():
                guide = AutoDelta(model, init_loc_fn=init_loc_fn)
                members.append(_train(model, guide, arguments, num_steps, copy.deepcopy(optim), batch_size, loss or Trace_ELBO(), bar))
    return {site: torch.stack([member[site] for member in members]) for site in members[0]}


def _examined(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], batch_size: int | None) -> Arguments:
    """The model's arguments, once it has run on them."""
    arguments = Arguments(model, args, kwargs)
    if arguments.not_finite() is not None:
        with RandomState().again():
            Potential(model, args, kwargs, backend="handlers")  # refuses what no mask covers
    if batch_size is not None:
        _, size = arguments.rows(None)
        check_int(batch_size, "batch_size", 1, "rows of a minibatch", most=size)
    with RandomState().again():  # looking takes no random numbers from the members
        try_model(model, args, kwargs)
    _refuse_parameters(model, args, kwargs)
    return arguments


def _refuse_parameters(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    # looking takes no random numbers from the members
    trace = run(model, (args, kwargs), None, pyro.get_param_store().scope(), RandomState().again())
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
    own = [name for name, value in values.items() if value is not None and value.requires_grad]
    if own:
        raise ValueError(
            f"the model has parameters without a prior ({', '.join(own[:3])}{', ...' if len(own) > 3 else ''}), which all members would "
            "train in turn, and draws do not include: give them priors (ab.nn.bayesianize), or freeze them (requires_grad_(False))"
        )


def _train(
    model: Callable,
    guide: AutoDelta,
    arguments: Arguments,
    num_steps: int,
    optim: PyroOptim,
    batch_size: int | None,
    loss: ELBO,
    bar: tqdm,
) -> dict[str, Tensor]:
    """One member's values, by site."""
    tensors, places, batches = arguments.tensors, list[int](), None
    if batch_size is not None:
        places, size = arguments.rows(None)
        few = arguments.replace([t[: max(2, batch_size)] if i in places else t for i, t in enumerate(tensors)])
        with RandomState().again():
            factors = prior_factors(model, few, min(max(2, batch_size), size))
        batches = TensorRows([tensors[i] for i in places], batch_size, 1, seed=int(torch.randint(2**31 - 1, ())))
        model = minibatch(model, size, prior_factors=factors)
    svi = SVI(CoveredMessenger()(model), guide, optim, loss)
    for _ in range(num_steps):
        if batches is not None:
            for place, rows in zip(places, batches.next(), strict=True):
                tensors[place] = rows
        args, kwargs = arguments.replace(tensors)
        svi.step(*args, **kwargs)
        bar.update()
    return guide.median(*args, **kwargs)
