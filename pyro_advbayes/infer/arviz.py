"""The draws of a sampler or a guide, with predictions, likelihood and data, for ArviZ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.arviz import to_inference_data
from pyro_advbayes.given import warn
from pyro_advbayes.infer.mcmc.runner import SGMCMC
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.infer.row_terms import DataRows, data_rows, find_terms, is_observed, masked_variables, row_terms
from pyro_advbayes.kinds import Node, sites, subsampling_plates
from pyro_advbayes.model.program import Call, run
from pyro_advbayes.model.refusals import Given, told
from pyro_advbayes.model.structure import try_model
from pyro_advbayes.tracing.guard import RandomState
from pyro_advbayes.tracing.replay import quiet_batching


@checked
def to_arviz(
    posterior: AbstractMCMC | Callable,
    *,
    model: Callable | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    sites: Sequence[str] | None = None,
    log_likelihood: bool = False,
    posterior_predictive: bool | Mapping[str, Tensor] = False,
    chunk_size: int | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """
    Samples with their statistics, predictions, likelihood and data, for ``az.summary``, ``az.plot_trace``, ``az.loo`` and the rest of
    ArviZ, 0.x and 1.x.

    Example::

        idata = to_arviz(mcmc, sites=["net.2.bias"], log_likelihood=True, posterior_predictive=True)
        az.loo(idata)

    :param posterior: a finished :class:`~pyro_advbayes.SGMCMC` or :class:`pyro.infer.MCMC`, or a guide.
    :param model: the model; by default the kernel's. A guide needs it.
    :param args: the model's arguments with the data; by default those of the run, and the first batch after a run from a loader. A guide
        needs them.
    :param kwargs: its keyword arguments.
    :param int num_samples: how many draws to take from a guide, >= 1.
    :param sites: which sites go into the posterior; by default all, which for a network is every weight.
    :param log_likelihood: adds the log-likelihood of every observed row, ``[chains, draws, rows]``, in nats, unscaled. A ``pyro.factor`` in
        the plates of an observed site is a part of its rows; one that shares its plates with several sites, or with none, is a variable of
        its own. Rows that a mask leaves nothing of are no data: they are left out, here and of ``observed_data`` and the predictions, and
        those that stay keep their numbers as labels. Where a mask leaves parts of rows, what stays is a flat list of entries.
    :param posterior_predictive: True adds predictions of the observed sites at the model's arguments; or what a ``Predictive`` gave,
        ``[chains * draws, ...]`` by site.
    :param int chunk_size: how many draws are computed side by side; by default as in ``Predictive`` and one at a time for the likelihood
        of a large network.
    :param coords: as in ArviZ.
    :param dims: as in ArviZ, from a variable to its dimensions after ``[chains, draws]``.
    :return: ``arviz.InferenceData`` (0.x) or ``xarray.DataTree`` (1.x).
    :raises ValueError: if a site is unknown, a guide comes without its model or arguments, or likelihoods or predictions are wanted of a
        model that takes other rows in every run, or of a run from a loader without ``args``.
    """
    kwargs = dict(kwargs or {})
    groups: dict[str, Mapping[str, Any]] = {}
    if isinstance(posterior, AbstractMCMC):
        mcmc = cast(MCMC, posterior)  # AbstractMCMC does not declare what ArviZ's own reader expects of every MCMC
        model = mcmc.kernel.model if model is None else model
        if args is None:
            if isinstance(posterior, SGMCMC) and posterior.from_loader and (log_likelihood or posterior_predictive is True):
                raise ValueError(
                    "the run was given a loader, and likelihoods and predictions are wanted of all rows: give them as args=, the model's "
                    "arguments with all the data"
                )
            args, kwargs = mcmc._args or (), kwargs or mcmc._kwargs or {}  # Pyro has no public names for them
        samples = mcmc.get_samples(group_by_chain=True)
        groups["sample_stats"] = posterior.sample_stats() if isinstance(posterior, SGMCMC) else _divergences(mcmc)
    else:
        if model is None or args is None:
            raise ValueError(
                "posterior is a guide, which needs model= and args= (the arguments with the data) to be drawn from and compared"
            )
        samples = _draw_guide(posterior, num_samples, args, kwargs)
    num_chains = next(iter(samples.values())).shape[0]
    flat = {name: value.flatten(0, 1) for name, value in samples.items()}

    def by_chain(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().reshape(num_chains, -1, *value.shape[1:]) for name, value in values.items()}

    groups["posterior"] = _chosen(samples, sites)
    predictions = {} if isinstance(posterior_predictive, bool) else posterior_predictive
    if model is not None:
        every_draw = log_likelihood or posterior_predictive is True
        given = Given(model, args, kwargs)
        with RandomState().again():  # looking takes no random numbers
            told(lambda values: try_model(model, *given.call(values)), given.values)
        nodes = _look(model, {name: value[0] for name, value in flat.items()}, (args, kwargs), every_draw)
        observed = {name: node["value"] for name, node in nodes.items() if is_observed(node)}
        masked = masked_variables({name: holds[None] for name, holds in data_rows(nodes).items()})
        if log_likelihood:
            _warn_of_factors(find_terms(nodes).outside)
            values, there = _row_terms(model, flat, args, kwargs, chunk_size)
            masked = masked_variables(there)
            groups["log_likelihood"] = by_chain(_data_only(values, masked, 1))
        if posterior_predictive is True:
            predictive = Predictive(poutine.uncondition(model), flat, return_sites=list(observed), chunk_size=chunk_size)
            predictions = _data_only(predictive(*args, **kwargs), masked, 1)
        groups["observed_data"] = data = _data_only(observed, masked, 0)
        dims, coords = _labels(data, masked, dims, coords)
    if predictions:
        groups["posterior_predictive"] = by_chain(predictions)
    return to_inference_data(groups, coords=coords, dims=dims)


def log_likelihoods(
    model: Callable, samples: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], chunk_size: int | None = None
) -> dict[str, Tensor]:
    """
    The log-density of every observed row under every draw, by site ``[draws, rows]``, in nats; no plate's scale is applied, and what is
    masked has 0.

    :param samples: ``[draws, *shape]`` by site.
    :param chunk_size: how many draws are computed side by side; by default one where they hold over 20 000 numbers each, else all.
    """
    return _row_terms(model, samples, args, kwargs, chunk_size)[0]


def _row_terms(
    model: Callable, samples: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], chunk_size: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As :func:`log_likelihoods`, and which of these are data, bool."""

    def one(values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trace = run(model, (args, kwargs), values, validated=False)
        nodes = {name: node for name, node in sites(trace).items() if name not in values}
        return row_terms(nodes), data_rows(nodes)

    with torch.no_grad(), pyro.validation_enabled(False):
        size = sum(value[0].numel() for value in samples.values())
        count = len(next(iter(samples.values())))
        if chunk_size != 1 and size <= 20_000:
            try:
                with quiet_batching():
                    return torch.func.vmap(one, chunk_size=chunk_size)(dict(samples))
            except RuntimeError:  # an operation without a batching rule: one draw after the other gives the same numbers
                pass
        rows = [one({name: value[i] for name, value in samples.items()}) for i in range(count)]
    values, there = ({name: torch.stack([row[i][name] for row in rows]) for name in rows[0][i]} for i in range(2))
    return values, there


def _divergences(posterior: MCMC) -> dict[str, Tensor]:
    diverging = torch.zeros(posterior.num_chains, posterior.num_samples, dtype=torch.bool)
    # the public diagnostics() computes n_eff of every weight on the way, minutes for a network
    for chain, found in enumerate(posterior._diagnostics):
        if found is not None:
            diverging[chain, list(found.get("divergences", []))] = True
    return {"diverging": diverging}


def _draw_guide(guide: Callable, num_samples: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    rows: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for _ in range(num_samples):
            drawn = sites(run(guide, (args, kwargs), hidden=False))
            rows.append({name: node["value"] for name, node in drawn.items() if not node["infer"].get("is_auxiliary")})
    return {name: torch.stack([row[name] for row in rows]).unsqueeze(0) for name in rows[0]}


def _look(model: Callable, draw: Mapping[str, Tensor], call: Call, every_draw: bool) -> dict[str, Node]:
    """The sites of a run, without those of the draw; ``every_draw`` says whether all draws will be computed, too."""
    with torch.no_grad():
        trace = run(model, call, draw, validated=False)
    for name, (plate, rows) in subsampling_plates(trace).items() if every_draw else ():
        raise ValueError(
            f"plate {name!r} takes {len(rows)} of its {plate.size} rows, other ones for every draw, so that no column of "
            "log_likelihood or posterior_predictive would belong to one row: give model=, the same model without subsample_size"
        )
    return {name: node for name, node in sites(trace).items() if name not in draw}


def _warn_of_factors(outside: Sequence[str]) -> None:
    if outside:
        warn(
            f"log_likelihood leaves out the factors {', '.join(map(repr, outside))}, which are in no plate of the data and so belong to no "
            "row: right for a term of the prior; move a term of the likelihood into the plate of its rows",
        )


def _data_only(values: Mapping[str, Tensor], masked: Mapping[str, DataRows | None], sampled: int) -> dict[str, Tensor]:
    """Variables without masked rows; ``sampled`` dimensions come before the rows."""
    found = {}
    for name, value in values.items():
        kept = masked.get(name, value)
        if kept is not None:
            found[name] = kept.take(value, sampled) if isinstance(kept, DataRows) else value
    return found


def _labels(
    observed: Mapping[str, Tensor], masked: Mapping[str, DataRows | None], dims: Any, coords: Any
) -> tuple[Mapping[str, Sequence[str]] | None, Mapping[str, Sequence[Any]] | None]:
    """``dims`` and ``coords``, with the numbers of the rows that are left as labels."""
    kept = {name: rows for name, rows in masked.items() if rows is not None and name in observed}
    if not kept:
        return dims, coords
    dims, coords = dict(dims or {}), dict(coords or {})
    for name, rows in kept.items():
        dims[name], labels = rows.labels(name, observed[name].dim(), dims.get(name), coords)
        coords[dims[name][0]] = labels
    return dims, coords


def _chosen(samples: Mapping[str, Tensor], sites: Sequence[str] | None) -> dict[str, Tensor]:
    unknown = sorted(set(sites or ()) - set(samples))
    if unknown:
        raise ValueError(f"sites: {unknown[0]!r} is not among {sorted(samples)}")
    return {name: samples[name] for name in (samples if sites is None else sites)}
