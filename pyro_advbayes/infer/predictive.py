"""Predictions of a Pyro model for many posterior draws at once: :class:`Predictive`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.fx.node import map_aggregate

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, need_dense, need_tensor, warn
from pyro_advbayes.handlers import in_a_line
from pyro_advbayes.infer.conditioned import ConditionedModel
from pyro_advbayes.infer.subsampled import predict_all_rows, subsampling_plate
from pyro_advbayes.kinds import latent_sites, sites
from pyro_advbayes.model.program import values_of
from pyro_advbayes.model.refusals import label_of
from pyro_advbayes.tracing.guard import DIFFERS, RandomState, agree, warn_of_handlers
from pyro_advbayes.tracing.record import record
from pyro_advbayes.tracing.replay import Interpreter, Replays, draws_together


@checked
class Predictive(pyro.infer.Predictive):
    """
    Samples from the predictive distribution, with the arguments and results of :class:`pyro.infer.Predictive`, but without a run of the
    model for every draw.

    ::

        probs = Predictive(model, mcmc.get_samples(), return_sites=["obs"])(x_test)["obs"]   # [draws, N]

    Pyro's handlers run the model on the first draws. The operations of one run are recorded (:mod:`pyro_advbayes.tracing`), compared with
    the handlers on another draw, and replayed for the others: side by side if a draw makes few numbers, else one after the other. What
    comes before the first latent site (a deterministic feature extractor, say) is computed once. A model that cannot be recorded,
    because its Python depends on drawn values, runs draw by draw as in Pyro.

    A model whose plate takes some of the rows, ``pyro.plate("data", N, subsample_size=B)``, also predicts all inputs, in order, B at a
    time; Pyro's class gives a random B of them for every draw. (A return value holds rows if its first dimension is B. Without
    ``subsample_size`` the model predicts faster.) To choose the rows, give their numbers ``[draws, B]`` under the plate's name in
    ``posterior_samples``.

    Random sites are drawn afresh for each draw, under ``pyro.set_rng_seed``. If an argument requires a gradient (and gradients
    are enabled), results are attached to it.

    :param model: a Pyro model.
    :param dict posterior_samples: site -> ``[draws, *site]``. Sites of the model that are missing are drawn from the prior.
    :param guide: a guide to draw the latent sites from, in place of ``posterior_samples``.
    :param int num_samples: number of draws, without ``posterior_samples``.
    :param return_sites: names of sites, ``"_RETURN"`` for the model's return value; by default every site that is not in
        ``posterior_samples``, and every site if there is a guide.
    :param bool parallel: accepted as in Pyro; it changes nothing here.
    :param int chunk_size: how many draws are computed side by side, >= 1; 1 means one after the other. The default is a fixed
        rule: as many as make 2²¹ numbers together, at least one.
    :raises ValueError: at the first call, if a sample's site or shape is not the model's, if a BatchNorm or Dropout layer is in training
        mode, or if it is unknown of which rows samples are.
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        return_sites: Sequence[str] | set[str] = (),
        parallel: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        check_samples(posterior_samples or {})
        check_chunk_size(chunk_size)
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        self.chunk_size = chunk_size

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        :return: site -> ``[draws, *site]``, with dimensions of size 1 for plates that the site is not in, as in Pyro.
        :raises ValueError: for a tensor without data.
        """
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for key, value in given:
            if isinstance(value, Tensor) and value.is_meta:
                need_dense(value, f"argument {label_of(self.model, key)}")
        samples, return_sites = self.posterior_samples, self.return_sites
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(_attached((args, kwargs)))):
            if self.guide is not None:
                return_sites = return_sites or None
                guide = ConditionedModel(self.guide, {}, self.num_samples)
                samples = predict(guide, None, args, kwargs, self.chunk_size)
            model = ConditionedModel(self.model, samples, self.num_samples, strict=self.guide is None)
            return predict(model, return_sites, args, kwargs, self.chunk_size)


def check_samples(samples: Mapping[str, Tensor]) -> None:
    """:raises ValueError: unless all are tensors, and as long as each other."""
    for name, sample in samples.items():
        sample = need_tensor(sample, f"posterior_samples[{name!r}]")
        if sample.dim() == 0 or len(sample) == 0:
            raise ValueError(f"posterior_samples[{name!r}] must be a tensor [draws, *site] of one draw or more")
    sizes = {name: len(sample) for name, sample in samples.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"posterior_samples must hold equally many draws of every site, got {sizes}")


def refuse_nan(samples: Mapping[str, Tensor]) -> None:
    """:raises ValueError: naming the draws that hold NaN, which would make a mean over draws NaN."""
    for name, sample in samples.items():
        bad = (
            sample.detach().isnan().flatten(1).any(1).nonzero().flatten()
            if sample.dim() > 1
            else sample.detach().isnan().nonzero().flatten()
        )
        if len(bad):
            which = f"{len(bad)} of {len(sample)} draws, first in number {int(bad[0])}"
            raise ValueError(f"posterior_samples[{name!r}] holds NaN in {which}: leave {'it' if len(bad) == 1 else 'them'} out")


def check_chunk_size(chunk_size: int | None) -> None:
    """:raises ValueError: unless it is None or an int >= 1."""
    if chunk_size is not None:
        check_int(chunk_size, "chunk_size", 1, "the number of draws that are computed together")


def predict(
    model: ConditionedModel,
    return_sites: Sequence[str] | set[str] | None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """
    The values of sites for every draw, as :class:`Predictive` gives them.

    :param return_sites: as there; None is every site.
    :param args: the model's arguments.
    :param kwargs: its keyword arguments.
    :param int chunk_size: as there.
    """
    kwargs = dict(kwargs or {})
    state = RandomState()
    trace = model.look(*args, **kwargs)
    shapes = _shapes(trace, return_sites, model.samples)
    if not shapes:
        return {}
    plate = subsampling_plate(trace, model.samples)
    if plate is not None:
        return predict_all_rows(lambda piece, names: predict(piece, names, args, kwargs, chunk_size), model, trace, plate, list(shapes))

    def run(*values: Tensor) -> list[Tensor]:
        return model.run(values, list(shapes), *args, **kwargs)

    probes: list[Sequence[Tensor]] = [values_of(trace, shapes)]
    recorded = None
    if model.num_samples > 3:
        leaves = _attached((args, kwargs)) if torch.is_grad_enabled() else []
        recorded = record_draws(model, run, probes, state, leaves)
    results = _gather(_pieces(model, run, probes, recorded, chunk_size), model.num_samples, list(shapes))
    model.check_categories(dict(zip(shapes, results, strict=True)))
    return {name: result.reshape(model.num_samples, *shape) for (name, shape), result in zip(shapes.items(), results, strict=True)}


def _attached(arguments: Any) -> list[Tensor]:
    leaves: list[Any] = []
    map_aggregate(arguments, leaves.append)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def _shapes(trace: Trace, return_sites: Any, samples: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The sites that are returned, with their shapes, by the rules of Pyro's ``Predictive``."""
    nodes = sites(trace)
    stacks = [node["cond_indep_stack"] for node in trace.nodes.values() if node["type"] == "sample"]
    nesting, shapes = -min((frame.dim for stack in stacks for frame in stack if frame.dim is not None), default=0), {}
    for name in (*latent_sites(trace), *(name for name, node in nodes.items() if node["is_observed"])):
        if name in return_sites if return_sites else return_sites is None or name not in samples:
            node = nodes[name]
            shapes[name] = (1,) * (nesting - len(node["fn"].batch_shape)) + tuple(node["value"].shape)
    if return_sites is not None and "_RETURN" in return_sites:
        value = trace.nodes["_RETURN"]["value"]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"return_sites has '_RETURN', but the model returns {type(value).__name__}, not a tensor: return one, or name "
                "pyro.deterministic sites instead"
            )
        shapes["_RETURN"] = tuple(value.shape)
    return shapes


def _pieces(
    model: ConditionedModel, run: Callable, probes: list[Sequence[Tensor]], recorded: Interpreter | None, chunk_size: int | None
) -> Iterator[Sequence[Tensor]]:
    """The results of ``run`` for all draws, in order, in pieces ``[chunk, *site]``; ``probes`` are those of the first draws."""
    for values in probes:
        yield _alone(values)
    if recorded is None:
        chunk = 1
        for index in range(len(probes), model.num_samples):
            yield _alone(run(*model.draw(index)))
    else:
        replays = Replays(recorded, draws_together(recorded) if chunk_size is None else chunk_size)
        yield from replays.run(model.draws, len(probes), model.num_samples)
        chunk = replays.chunk
    if chunk == 1 and chunk_size is not None and chunk_size > 1:
        warn(
            f"chunk_size={chunk_size} is not possible, and draws were computed one by one: an operation of the model cannot be batched, "
            "or its Python depends on drawn values",
        )


def _alone(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.unsqueeze(0) for value in values]


def record_draws(
    model: ConditionedModel,
    run: Callable,
    probes: list[Sequence[Tensor]],
    state: RandomState,
    leaves: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    others: Sequence[Tensor] = (),
) -> Interpreter | None:
    """
    Records a run on one draw, and compares the recording with Pyro's handlers on another draw.

    :param run: function of a draw's values (and ``shared``) to results, through Pyro's handlers.
    :param probes: the result of ``run`` for the first draw; its results for others are appended.
    :param state: the state of the random generators before the first draw.
    :param leaves: tensors whose gradients must also agree.
    :param shared: further inputs of ``run``.
    :param others: other values of ``shared``, to record with.
    :return: the recording; None, with a warning that says why, if it fails or differs.
    """
    index = [min(i, model.num_samples - 1) for i in range(3)]
    try:
        with pyro.validation_enabled(False):
            recording, second = record(run, (*model.draw(index[1]), *others))
        probes.append(second)
        recorded = Interpreter(recording)
        with state.again():
            agrees = agree(recorded.replay_all((*model.draw(0), *shared)), probes[0], leaves)
        if not agrees:  # the first call may have drawn more: a guide makes its prototype then, a model its parameters
            state = RandomState()
            probes.append(run(*model.draw(index[2]), *shared))
            with state.again():
                agrees = agree(recorded.replay_all((*model.draw(index[2]), *shared)), probes[2], leaves)
    except Exception as error:  # any error of a model's Python under a recorder: the handlers still run it, and raise its own errors
        warn_of_handlers("prediction", f"it cannot be recorded: {in_a_line(error)}")
        return None
    if not agrees:
        warn_of_handlers("prediction", DIFFERS)
    return recorded if agrees else None


def _gather(pieces: Iterator[Sequence[Tensor]], count: int, names: Sequence[str]) -> list[Tensor]:
    """The pieces concatenated along their first dimension, without a second copy of them unless gradients need it."""
    if torch.is_grad_enabled():
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    results: list[Tensor] = []
    done = 0
    for piece in pieces:
        results = results or [value.new_empty((count, *value.shape[1:])) for value in piece]
        for name, result, value in zip(names, results, piece, strict=True):
            if value.shape[1:] != result.shape[1:]:
                raise RuntimeError(
                    f"site {name!r} has shape {tuple(value.shape[1:])} in one draw and {tuple(result.shape[1:])} in another, "
                    "so that its draws cannot be stacked"
                )
            result[done : done + len(value)] = value
        done += len(piece[0])
    return results
