"""Predictions of a Pyro model for many posterior draws at once: :class:`Predictive`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_advbayes.checked import checked
from pyro_advbayes.given import need_tensor
from pyro_advbayes.infer.conditioned import ConditionedModel
from pyro_advbayes.infer.subsampled import predict_all_rows, subsampling_plate
from pyro_advbayes.tracing.guard import DIFFERS, RandomState, agree, reason, warn_of_handlers
from pyro_advbayes.tracing.record import record
from pyro_advbayes.tracing.replay import Interpreter, Replays, draws_together


@checked
class Predictive(pyro.infer.Predictive):
    """
    Samples from the predictive distribution; takes the arguments of :class:`pyro.infer.Predictive` and gives its results,
    without running the model anew for every draw.

    ::

        probs = Predictive(model, mcmc.get_samples(), return_sites=["obs"])(x_test)["obs"]   # [draws, N]

    The first draws go through Pyro's handlers. What the model did is recorded (:mod:`pyro_advbayes.tracing`), compared with a draw
    of its own, and replayed for the others: side by side where the numbers that a draw makes are few, one after the other
    where they are many. What comes before the first latent site (a deterministic feature extractor, say) is computed once. A
    model that cannot be recorded, because its Python looks at drawn values, runs draw by draw as in Pyro.

    All inputs are predicted, in order, by a model whose plate takes some of them, ``pyro.plate("data", N, subsample_size=B)``, too: B at
    a time, where Pyro's class gives a random B of them for every draw. (A return value is taken for rows where its first dimension is
    B. Without ``subsample_size`` the model predicts faster.) To choose the rows, give their numbers ``[draws, B]`` under the plate's name
    in ``posterior_samples``.

    Random sites are drawn afresh for each draw, under ``pyro.set_rng_seed``. If an argument requires a gradient (and gradients
    are enabled), results are attached to it.

    :param model: a Pyro model.
    :param dict posterior_samples: site -> ``[draws, *site]``. Sites of the model that are missing are drawn from the prior.
    :param guide: a guide to draw the latent sites from, in place of ``posterior_samples``.
    :param int num_samples: number of draws, where no ``posterior_samples`` tell it.
    :param return_sites: names of sites, ``"_RETURN"`` for the model's return value; by default every site that is not in
        ``posterior_samples``, and every site if there is a guide.
    :param bool parallel: as in Pyro, where it needs a model that batches; the results are the same here.
    :param int chunk_size: how many draws are computed side by side, >= 1; 1 means one after the other. The default is a fixed
        rule: as many as make 2²¹ numbers together, at least one.
    :raises ValueError: at the first call, if a sample's site or shape is not the model's, if the model is in training mode
        where that would disturb it, or if it is not known of which rows samples are.
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
        :return: site -> ``[draws, *site]``, with 1s in the place of plates that the site is not in, as in Pyro.
        """
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
    """:raises ValueError: naming the draws that hold NaN, which a mean over them would be then, too."""
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
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r}: the number of draws that are computed together, an int >= 1")


def predict(
    model: ConditionedModel,
    return_sites: Sequence[str] | set[str] | None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """
    What a model returns for every draw, as :class:`Predictive` gives it.

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

    first = [trace.nodes[name]["value"] for name in shapes]
    probes, recorded = [first], None
    if model.num_samples > 3:
        leaves = _attached((args, kwargs)) if torch.is_grad_enabled() else []
        recorded = record_draws(model, run, probes, state, leaves)
    results = _gather(_pieces(model, run, probes, recorded, chunk_size), model.num_samples, list(shapes))
    model.check_categories(dict(zip(shapes, results, strict=True)))
    return {name: result.reshape(model.num_samples, *shape) for (name, shape), result in zip(shapes.items(), results, strict=True)}


def _attached(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _shapes(trace: Trace, return_sites: Any, samples: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Which sites are returned, and with which shapes: the rules of Pyro's ``Predictive``."""
    frames = [f for node in trace.nodes.values() if node["type"] == "sample" for f in node["cond_indep_stack"] if f.vectorized]
    nesting = -min((frame.dim for frame in frames), default=0)
    pruned = prune_subsample_sites(trace)
    shapes = {}
    for name in pruned.stochastic_nodes + pruned.observation_nodes:
        if name in return_sites if return_sites else return_sites is None or name not in samples:
            node = pruned.nodes[name]
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
    """What ``run`` returns for all draws, in order, in pieces ``[chunk, *site]``; ``probes`` is what it returned for the first."""
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
        warnings.warn(
            f"chunk_size={chunk_size} was not to be had, draws were computed one by one: an operation of the model cannot be batched, "
            "or its Python looks at drawn values",
            stacklevel=7,  # the call of the module
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
    Records what a model does with a draw, and compares the recording with Pyro's handlers on another draw.

    :param run: function of a draw's values (and ``shared``) to what is wanted of it, through Pyro's handlers.
    :param probes: what ``run`` returned for the first draw; what it returns for others is appended.
    :param state: the state of the random generators before the first draw.
    :param leaves: tensors whose gradients must agree, too.
    :param shared: further inputs of ``run``.
    :param others: other values of ``shared``, to record with.
    :return: the recording; None, with a warning that says why, if there is none to trust.
    """
    index = [min(i, model.num_samples - 1) for i in range(3)]
    try:
        with pyro.validation_enabled(False):
            recording, second = record(run, (*model.draw(index[1]), *others))
        probes.append(second)
        recorded = Interpreter(recording)
        with state.again():
            agrees = agree(recorded.replay_all((*model.draw(0), *shared)), probes[0], leaves)
        if not agrees:  # the first call may have drawn more: a guide makes its prototype, a model its parameters
            state = RandomState()
            probes.append(run(*model.draw(index[2]), *shared))
            with state.again():
                agrees = agree(recorded.replay_all((*model.draw(index[2]), *shared)), probes[2], leaves)
    except Exception as error:  # whatever a model's Python does under a recorder: the handlers still run it, and raise what is its own
        warn_of_handlers("prediction", f"it cannot be recorded: {reason(error)}")
        return None
    if not agrees:
        warn_of_handlers("prediction", DIFFERS)
    return recorded if agrees else None


def _gather(pieces: Iterator[Sequence[Tensor]], count: int, names: Sequence[str]) -> list[Tensor]:
    """The pieces put together along their first dimension, without a second copy of them unless gradients need it."""
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
                    "so that its draws make no tensor"
                )
            result[done : done + len(value)] = value
        done += len(piece[0])
    return results
