"""Looking at a model before it is sampled: its latent sites, its data plate, and what would go wrong silently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Transform, biject_to
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_advbayes.handlers import minibatch

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Site(NamedTuple):
    """One continuous latent site: its constrained shape and dtype, its map from unconstrained space, its place in a flat row."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    unconstrained_shape: torch.Size
    transform: Transform
    start: int

    @property
    def numel(self) -> int:
        """How many unconstrained numbers the site holds."""
        return self.unconstrained_shape.numel()


class Arguments:
    """
    A model's arguments, with the tensors among them apart, so that a graph can take them as inputs and a minibatch can replace
    some of them.

    :param model: the model; names its arguments in messages.
    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """

    def __init__(self, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self.keys: list[int | str] = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        self.keys += [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        self.labels = [_label(model, key) for key in self.keys]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor arguments: positional ones first, then keywords."""
        return [self.args[key] if isinstance(key, int) else self.kwargs[key] for key in self.keys]

    def replace(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with these tensors in the place of :attr:`tensors`."""
        new = dict(zip(self.keys, tensors, strict=True))
        args = tuple(new.get(i, value) for i, value in enumerate(self.args))
        return args, {name: new.get(name, value) for name, value in self.kwargs.items()}

    def rows(self, batch_args: Sequence[int | str] | None) -> tuple[list[int], int]:
        """
        Which tensors hold a row per data point, and how many rows there are.

        :param batch_args: positions or names; by default every tensor as long as the first one.
        :return: places in :attr:`tensors`, and the number of rows.
        :raises ValueError: if there is no such tensor, a name is unknown, or the lengths differ.
        """
        tensors = self.tensors
        if batch_args is None:
            places = [i for i, value in enumerate(tensors) if value.dim() > 0]
            if not places:
                raise ValueError("batch_size: none of the model's arguments is a tensor with rows to take a minibatch from")
            size = len(tensors[places[0]])
            return [i for i in places if len(tensors[i]) == size], size
        known = {**{key: i for i, key in enumerate(self.keys)}, **{label: i for i, label in enumerate(self.labels)}}
        unknown = [key for key in batch_args if key not in known]
        if unknown or not batch_args:
            raise ValueError(f"batch_args={list(batch_args)!r}: the model's tensor arguments are {self.labels}")
        places = sorted({known[key] for key in batch_args})
        if len({len(tensors[i]) for i in places}) > 1:
            raise ValueError(f"batch_args: the arguments differ in length: {self.lengths()}")
        return places, len(tensors[places[0]])

    def lengths(self) -> str:
        """The first dimension of every tensor argument, in words."""
        return ", ".join(f"{label} has {len(t)} rows" for label, t in zip(self.labels, self.tensors, strict=True) if t.dim())

    def check_finite(self) -> None:
        """:raises ValueError: if a tensor argument holds NaN or infinity."""
        for label, value in zip(self.labels, self.tensors, strict=True):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                bad = int((~value.isfinite()).sum())
                raise ValueError(f"argument {label} holds {bad} non-finite values (NaN or infinity): clean the data first")


def _label(model: Callable, key: int | str) -> str:
    if isinstance(key, str):
        return key
    try:
        names = list(inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters)
    except (TypeError, ValueError):
        names = []
    return names[key] if key < len(names) else f"args[{key}]"


class Structure(NamedTuple):
    """
    What :func:`look` found: the latent sites in flat order, and the data plate.

    ``scaling`` is ``"none"`` (full data, or a model that is given its indices and scales itself), ``"minibatch"``
    (:func:`~pyro_advbayes.handlers.minibatch` scales the plate) or ``"indices"`` (the plate draws its own subsample and scales
    itself: a sampler supplies the indices).
    """

    sites: tuple[Site, ...]
    scaling: str = "none"
    plate: str | None = None
    plate_size: int | None = None
    plate_batch: int | None = None


def look(
    model: Callable,
    few: tuple[Sequence[Any], Mapping[str, Any]],
    fewer: tuple[Sequence[Any], Mapping[str, Any]] | None,
    rows: tuple[int, int] | None,
    num_data: int | None,
    lengths: str = "",
    loader: bool = False,
) -> Structure:
    """
    Looks at a model on two sets of arguments, which may hold a different number of rows, and on two draws of its latents.

    :param model: a Pyro model.
    :param few: ``(args, kwargs)`` of the first look.
    :param fewer: ``(args, kwargs)`` of the second; None looks twice at the first.
    :param rows: how many rows the two hold, if the model is to be scaled from minibatches of such rows; else None.
    :param num_data: number of rows that a minibatch stands for.
    :param lengths: the lengths of the arguments, in words, for the message when they don't fit.
    :param loader: whether the rows come from a loader, which may supply a plate's indices too, ``plate(subsample=...)``.
    :raises ValueError: naming the site, plate or layer that a sampler cannot treat, and the remedy.
    """
    try:
        with refuse_random_layers(model):
            first = _trace(model, few)
            second = _trace(model, few if fewer is None else fewer)
    except (RuntimeError, ValueError) as error:
        if rows is None or isinstance(error, _Refused):
            raise
        raise ValueError(
            f"the model fails on minibatches of {rows[0]} and {rows[1]} rows ({lengths}): {str(error).splitlines()[0]}. The "
            "arguments that hold data must be equally long (batch_args= names them) and the plate must take its size from "
            "them, pyro.plate('data', len(x))"
        ) from error
    sites = _latent_sites(first, second)
    own = _own_plate(first)
    if own is not None:
        _check_plate(first, own.plate)
        if rows is not None and (own.scaling == "indices" or not loader):
            raise ValueError(
                f"plate {own.plate!r} subsamples itself ({own.plate_batch} of {own.plate_size} rows): cut into minibatches as "
                "well it would be scaled twice. Drop batch_size, or the plate's subsample"
            )
        return own._replace(sites=sites)
    if rows is None:
        return Structure(sites)
    plate = _following_plate(first, second, rows)
    _trace(minibatch(model, num_data, plate), few)  # refuses, by name, what it would scale wrongly
    _check_rows(first, plate, rows[0], lengths)
    return Structure(sites, "minibatch", plate, num_data, rows[0])


class _Refused(ValueError):
    """A refusal that already names culprit and remedy."""


@contextmanager
def refuse_random_layers(model: Callable) -> Iterator[None]:
    """Within it, a BatchNorm or Dropout layer that runs in training mode raises an error with the layer's name."""
    names = {m: name for name, m in model.named_modules()} if isinstance(model, nn.Module) else {}

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, _NORMS + _DROPOUTS) and module.training:
            why = "changes its statistics" if isinstance(module, _NORMS) else "draws a new mask"
            raise _Refused(
                f"layer {names.get(module) or type(module).__name__!r} ({type(module).__name__}) is in training mode, where it "
                f"{why} at every evaluation, so that there is no fixed log-density: call .eval() on the network first"
            )

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _trace(model: Callable, arguments: tuple[Sequence[Any], Mapping[str, Any]]) -> Trace:
    args, kwargs = arguments
    with torch.no_grad(), poutine.block():
        return poutine.trace(InitMessenger(init_to_sample)(model)).get_trace(*args, **kwargs)


def _latents(trace: Trace) -> dict[str, dict[str, Any]]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


def _latent_sites(first: Trace, second: Trace) -> tuple[Site, ...]:
    latents, again = _latents(first), _latents(second)
    if not latents:
        raise ValueError("the model has no latent site: give it priors (pyro.sample, PyroSample, nn.bayesianize)")
    changed = set(latents) ^ set(again)
    if changed:
        raise ValueError(
            f"site {sorted(changed)[0]!r} is there in one run of the model and not in the next: a sampler needs the same sites in every run"
        )
    sites, start = [], 0
    for name, node in latents.items():
        support = _support(name, node)
        if node["value"].shape != again[name]["value"].shape:
            raise ValueError(
                f"site {name!r} has shape {tuple(node['value'].shape)} in one run and {tuple(again[name]['value'].shape)} in the "
                "next: its shape depends on other draws or on the number of rows. Draw it with a fixed shape, outside the "
                "data plate"
            )
        transform = biject_to(support)
        shape = torch.Size(transform.inverse_shape(node["value"].shape))
        _check_same_support(name, transform, biject_to(_support(name, again[name])), shape, node["value"])
        sites.append(Site(name, node["value"].shape, node["value"].dtype, shape, transform, start))
        start += shape.numel()
    return tuple(sites)


def _support(name: str, node: dict[str, Any]) -> Any:
    try:
        support = node["fn"].support
    except NotImplementedError:
        support = None
    if support is None or support.is_discrete:
        raise ValueError(
            f"latent site {name!r} ({type(node['fn']).__name__}) is discrete or has no support: gradients cannot move it. Sum it "
            "out (a mixture distribution), or give its value as obs="
        )
    return support


def _check_same_support(name: str, one: Transform, other: Transform, shape: torch.Size, like: Tensor) -> None:
    probe = torch.linspace(-1.0, 1.0, shape.numel(), dtype=like.dtype, device=like.device).reshape(shape)
    if not torch.equal(one(probe), other(probe)):
        raise ValueError(
            f"site {name!r}: its support changes with other draws (Uniform(0, s) with a random s, say), so that no fixed map to "
            "unconstrained space exists. Draw it on a fixed support and scale it: s * Uniform(0, 1)"
        )


def _own_plate(trace: Trace) -> Structure | None:
    own = [
        Structure((), "none" if node["fn"].subsample_size is None else "indices", name, node["fn"].size, len(node["value"]))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and site_is_subsample(node) and len(node["value"]) != node["fn"].size
    ]
    if len(own) > 1:
        raise ValueError(f"plates {', '.join(repr(row.plate) for row in own)} all subsample themselves: only one plate can")
    return own[0] if own else None


def _check_plate(trace: Trace, plate: str) -> None:
    for name, node in _latents(trace).items():
        if plate in {frame.name for frame in node["cond_indep_stack"]}:
            raise ValueError(
                f"site {name!r} is a local latent: it is drawn inside the data plate {plate!r}, so that it belongs to the rows "
                "of one minibatch. Draw it outside the plate or integrate it out"
            )
    for node in trace.nodes.values():
        for frame in node.get("cond_indep_stack", ()):
            if frame.name == plate and not frame.vectorized:
                raise ValueError(f"plate {plate!r} is sequential (a for loop): minibatches need a vectorised one, `with pyro.plate(...):`")


def _following_plate(first: Trace, second: Trace, rows: tuple[int, int]) -> str:
    sizes: list[dict[str, int]] = []
    for trace in (first, second):
        frames = [frame for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ())]
        sequential = {frame.name for frame in frames if not frame.vectorized}
        if sequential:
            raise ValueError(
                f"plate {sorted(sequential)[0]!r} is sequential (a for loop): minibatches need a vectorised one, `with pyro.plate(...):`"
            )
        sizes.append({frame.name: frame.size for frame in frames})
    found = [name for name, size in sizes[0].items() if (size, sizes[1].get(name)) == rows]
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{name!r} of {size}" for name, size in sizes[0].items()) or "none"
    if not found:
        raise ValueError(
            f"no plate follows the number of rows of a minibatch (plates seen on {rows[0]} rows: {seen}). Put the observed site "
            "into `with pyro.plate('data', len(x)):`, or use the full data (batch_size=None)"
        )
    raise ValueError(
        f"plates {', '.join(map(repr, found))} all follow the number of rows of a minibatch: it is not clear which holds the "
        "data. Use one plate, or let the model subsample itself, pyro.plate('data', N, subsample_size=B)"
    )


def _check_rows(trace: Trace, plate: str, rows: int, lengths: str) -> None:
    for name, node in trace.nodes.items():
        for frame in node.get("cond_indep_stack", ()):
            if frame.name == plate and node["type"] == "sample":
                dim = frame.dim - node["fn"].event_dim
                shape = node["value"].shape
                got = shape[dim] if len(shape) >= -dim else 1
                if got != rows:
                    raise ValueError(
                        f"observed site {name!r} has {got} rows where plate {plate!r} has {rows} ({lengths}): the arguments "
                        "that hold data must be equally long"
                    )
