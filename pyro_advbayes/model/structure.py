"""Examines a model before it is sampled: finds its latent sites and its data plate, and refuses silent errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Unit
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform

from pyro_advbayes.handlers import MinibatchMessenger, Refused, is_masked, local_latent
from pyro_advbayes.kinds import Node, latent_sites, sites, subsampling_plates
from pyro_advbayes.model.failures import Drawn, explain, explain_plate, naming_what_is_absent, scaled_twice, witnessed
from pyro_advbayes.model.layers import kept_statistics, refuse_random_layers
from pyro_advbayes.model.notices import tell_of_new_statistics
from pyro_advbayes.model.observations import Labels, check_densities, check_observations, check_rows, labels_of, observations, refuse_single
from pyro_advbayes.model.program import Call, Values, run
from pyro_advbayes.model.refusals import Mismatch
from pyro_advbayes.model.supports import map_onto


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


class Structure(NamedTuple):
    """
    What :func:`look` found.

    :ivar sites: the latent sites, in flat order.
    :ivar scaling: ``"none"`` (full data, or a model that is given its indices and scales itself), ``"minibatch"``
        (:func:`~pyro_advbayes.minibatch` scales the plate) or ``"indices"`` (the plate draws its own subsample and scales itself: a
        sampler supplies the indices).
    :ivar plate: name of the data plate; None without one.
    :ivar plate_size: N, 0 without a plate.
    :ivar plate_batch: B, 0 without a plate.
    :ivar labels: observed sites whose values are labels.
    :ivar prior_factors: ``pyro.factor`` terms of the prior, which are outside the plate and stay unscaled.
    :ivar masked: whether a mask covers a part of the observations.
    :ivar parameters: names of the model's parameters.
    :ivar scales: numbers other than 1 by which the model itself scales observed sites.
    """

    sites: tuple[Site, ...]
    scaling: str = "none"
    plate: str | None = None
    plate_size: int = 0
    plate_batch: int = 0
    labels: tuple[Labels, ...] = ()
    prior_factors: tuple[str, ...] = ()
    masked: bool = False
    parameters: tuple[str, ...] = ()
    scales: tuple[tuple[str, float], ...] = ()


def look(
    model: Callable,
    few: Call,
    fewer: Call | None,
    rows: tuple[int, int] | None,
    num_data: int | None,
    lengths: Mapping[str, int] | None = None,
    loader: bool = False,
    whole: Sequence[tuple[str, Tensor, Tensor]] = (),
) -> Structure:
    """
    Runs a model on two sets of arguments, which may hold a different number of rows, and at two draws of its latents.

    :param model: a Pyro model.
    :param few: ``(args, kwargs)`` of the first look.
    :param fewer: ``(args, kwargs)`` of the second; None looks twice at the first.
    :param rows: how many rows the two hold, if the model is to be scaled from minibatches of such rows; else None.
    :param num_data: number of rows that a minibatch stands for.
    :param lengths: lengths of the arguments by name, for the message about arguments that do not fit.
    :param loader: whether the rows come from a loader, which may also supply a plate's indices, ``plate(subsample=...)``.
    :param whole: ``(name, tensor in few, all its rows)`` of arguments, to find labels outside the classes.
    :raises ValueError: naming the site, plate or layer that a sampler cannot treat, and the remedy.
    """
    lengths = lengths or {}
    with naming_what_is_absent(model, few):
        arguments = (few, few if fewer is None else fewer)
        with tell_of_new_statistics(model), refuse_random_layers(model):
            try:
                first, second = (_trace(model, each) for each in arguments)
            except Refused:
                raise
            except Exception as error:  # whatever a model's Python does with fewer rows than it expects
                if rows is not None:
                    explain(error, [witnessed(model, each) for each in arguments], rows, lengths)
                explain_plate(error)
                raise
        found = _own_plate(first)
        if found.plate is not None:
            _check_plate(first, found.plate)
            if rows is not None and (found.scaling == "indices" or not loader):
                raise scaled_twice(found.plate, found.plate_batch, found.plate_size)
        if found.plate is None and rows is not None and num_data is not None:
            plate = _following_plate(first, second, rows)
            _check_plate(first, plate)
            found = Structure((), "minibatch", plate, num_data, rows[0])
        latents = _latent_sites(first, second)
        if found.scaling == "minibatch" and rows is not None:
            found = found._replace(prior_factors=_prior_factors(model, first, arguments, rows))
            _check_scaling(model, few, found)
            for trace, size in zip((first, second), rows, strict=True):
                check_rows(trace, str(found.plate), size, lengths)
        for trace in (first, second):
            check_observations(trace, lengths)
        refuse_single(first, model, few)
        labels: list[Labels] = []
        for name, given, values in whole:
            for each in labels_of(first, name, given):
                each.check(given if each.differs else values)
                labels += [] if each.differs else [each]
        check_densities(first)
    masked = any(is_masked(node["fn"], node["mask"]) for node in observations(first).values())
    return found._replace(sites=latents, labels=tuple(labels), masked=masked, parameters=tuple(first.param_nodes), scales=_scales(first))


def _trace(model: Callable, call: Call, values: Values | None = None) -> Trace:
    with torch.no_grad():
        return run(model, call, values, InitMessenger(init_to_sample))


def _latent_sites(first: Trace, second: Trace) -> tuple[Site, ...]:
    latents, again = latent_sites(first), latent_sites(second)
    if not latents:
        raise ValueError("the model has no latent site: give it priors (pyro.sample, PyroSample, nn.bayesianize)")
    changed = set(latents) ^ set(again)
    if changed:
        raise ValueError(
            f"site {sorted(changed)[0]!r} is there in one run of the model and not in the next: a sampler needs the same sites in every run"
        )
    found: list[Site] = []
    start = 0
    for name, node in latents.items():
        transform = _map(name, node)
        if node["value"].shape != again[name]["value"].shape:
            raise ValueError(
                f"site {name!r} has shape {tuple(node['value'].shape)} in one run and {tuple(again[name]['value'].shape)} in the "
                "next: its shape depends on other draws or on the number of rows. Draw it with a fixed shape, outside the "
                "data plate"
            )
        shape = torch.Size(transform.inverse_shape(node["value"].shape))
        _check_same_support(name, transform, _map(name, again[name]), shape, node["value"])
        found.append(Site(name, node["value"].shape, node["value"].dtype, shape, transform, start))
        start += shape.numel()
    return tuple(found)


def _map(name: str, node: Node) -> Transform:
    """The map from unconstrained space onto the support of a latent site."""
    try:
        support = node["fn"].support
    except NotImplementedError:
        support = None
    if support is None or support.is_discrete:
        raise Drawn(
            f"latent site {name!r} ({type(node['fn']).__name__}) is discrete or has no support: gradients cannot move it. Sum it "
            "out (a mixture distribution), or give its value as obs="
        )
    return map_onto(name, node["fn"])


def same_map(one: Transform, other: Transform, shape: torch.Size, like: Tensor) -> bool:
    """
    Whether two transforms map unconstrained numbers of a shape, in the dtype and on the device of ``like``, to the same values: for
    PyTorch most transforms are equal only if they are one object.
    """
    probe = torch.linspace(-1.0, 1.0, shape.numel(), dtype=like.dtype, device=like.device).reshape(shape)
    return bool((one(probe) == other(probe)).all())


def _check_same_support(name: str, one: Transform, other: Transform, shape: torch.Size, like: Tensor) -> None:
    if not same_map(one, other, shape, like):
        raise ValueError(
            f"site {name!r}: its support changes with other draws (Uniform(0, s) with a random s, say), so that no fixed map to "
            "unconstrained space exists. Draw it on a fixed support and scale it: s * Uniform(0, 1)"
        )


def _own_plate(trace: Trace) -> Structure:
    """The plate that subsamples itself, if there is one."""
    own = [
        Structure((), "none" if plate.subsample_size is None else "indices", name, plate.size, len(rows))
        for name, (plate, rows) in subsampling_plates(trace).items()
    ]
    if len(own) > 1:
        raise ValueError(f"plates {', '.join(repr(row.plate) for row in own)} all subsample themselves: only one plate can")
    return own[0] if own else Structure(())


def _check_plate(trace: Trace, plate: str) -> None:
    latents = latent_sites(trace)
    for name, node in trace.nodes.items():
        for frame in node.get("cond_indep_stack", ()):
            if frame.name == plate and not frame.vectorized:
                raise _sequential(plate)
            if frame.name == plate and name in latents:
                raise Drawn(local_latent(name, plate))


def _sequential(plate: str) -> ValueError:
    return ValueError(f"plate {plate!r} is sequential (a for loop): minibatches need a vectorised one, `with pyro.plate(...):`")


def _following_plate(first: Trace, second: Trace, rows: tuple[int, int]) -> str:
    sizes: list[dict[str, int]] = []
    sequential: set[str] = set()
    for trace in (first, second):
        frames = [frame for node in trace.nodes.values() for frame in node.get("cond_indep_stack", ())]
        sequential |= {frame.name for frame in frames if not frame.vectorized}
        sizes.append({frame.name: frame.size for frame in frames})
    found = [name for name, size in sizes[0].items() if (size, sizes[1].get(name)) == rows]
    for plate in found:
        if plate in sequential:
            raise _sequential(plate)
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{name!r} of {size}" for name, size in sizes[0].items()) or "none"
    if not found:
        events = [node["fn"].event_dim for node in observations(first).values() if rows[0] in node["fn"].event_shape[:1]]
        remedy = f" and drop .to_event({events[0]}), which makes the rows one event" if events else ""
        raise Mismatch(
            f"no plate follows the number of rows of a minibatch (plates seen on {rows[0]} rows: {seen})",
            f"put the observed site into `with pyro.plate('data', len(x)):`{remedy}, or use the full data (batch_size=None)",
        )
    raise ValueError(
        f"plates {', '.join(map(repr, found))} all have as many rows as a minibatch: it is not clear which holds the "
        "data. Use one plate, or let the model subsample itself, pyro.plate('data', N, subsample_size=B)"
    )


def prior_factors(model: Callable, arguments: Call, rows: int) -> tuple[str, ...]:
    """
    The ``pyro.factor`` terms of a model that are the same on other rows: terms of its prior, which a minibatch does not scale.

    :param arguments: ``(args, kwargs)``; tensors of length ``rows`` hold a row per data point.
    """
    args, kwargs = arguments
    few = max(1, rows - 1)

    def cut(value: Any) -> Any:
        return value[:few] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    fewer = tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
    with kept_statistics(), pyro.get_param_store().scope(), pyro.validation_enabled(False):  # draws may overflow a deep network
        return _prior_factors(model, _trace(model, arguments), (arguments, fewer), (rows, few))


def _prior_factors(model: Callable, first: Trace, arguments: tuple[Call, Call], rows: tuple[int, int]) -> tuple[str, ...]:
    """Factors outside a plate of the rows that keep their value on other rows, and on fewer, at the latents of the first trace."""
    factors = {name: value for name, (value, plates) in _factors(first).items() if rows[0] not in plates}
    latents = {name: node["value"] for name, node in latent_sites(first).items()}
    for call in (arguments[1], *_repeating_a_row(arguments, rows)) if factors else ():
        others = _factors(_trace(model, call, latents))
        factors = {name: value for name, value in factors.items() if name in others and torch.equal(value, others[name][0])}
    return tuple(factors)


def _factors(trace: Trace) -> dict[str, tuple[Tensor, list[int]]]:
    """The ``pyro.factor`` terms of a trace, with the sizes of their plates."""
    nodes = {name: (node["fn"], node["cond_indep_stack"]) for name, node in sites(trace).items()}
    return {name: (fn.log_factor, [frame.size for frame in stack]) for name, (fn, stack) in nodes.items() if isinstance(fn, Unit)}


def _repeating_a_row(arguments: tuple[Call, Call], rows: tuple[int, int]) -> Iterator[Call]:
    """The arguments of more rows with the first row everywhere, and with the last: sums, means and maxima change there."""
    order = slice(None) if rows[0] > rows[1] else slice(None, None, -1)
    (args, kwargs), (other, others) = arguments[order]

    def repeated(value: Any, fewer: Any, row: int) -> Any:
        holds_rows = isinstance(value, Tensor) and value.dim() > 0 and (len(value), len(fewer)) == rows[order]
        return value[row].expand_as(value).clone() if holds_rows else value

    for row in (0, -1):
        yield (
            tuple(repeated(value, fewer, row) for value, fewer in zip(args, other, strict=True)),
            {name: repeated(value, others[name], row) for name, value in kwargs.items()},
        )


def _check_scaling(model: Callable, call: Call, found: Structure) -> None:
    """Lets the handler refuse, by name, what it would scale wrongly."""
    try:
        _trace(MinibatchMessenger(found.plate_size, found.plate, found.prior_factors)(model), call)
    except ValueError as error:
        raise ValueError(str(error)) from None


def _scales(trace: Trace) -> tuple[tuple[str, float], ...]:
    """Numbers other than 1 that scale observed sites, without the scale of a plate that subsamples itself; weights of rows do not count."""
    found = []
    for name, node in observations(trace).items():
        if isinstance(node["fn"], Unit) and not node["cond_indep_stack"]:  # it may belong to the prior
            continue
        scale = torch.as_tensor(node["scale"], dtype=torch.float64, device="cpu").detach()
        for frame in node["cond_indep_stack"]:
            if frame.full_size is not None:
                scale = scale * frame.size / frame.full_size
        number = float(scale.flatten()[0]) if scale.dim() == 0 or scale.numel() > 1 else 1.0  # one row's weight tells nothing
        if bool((scale == number).all()) and abs(number - 1.0) > 1e-6:
            found.append((name, number))
    return tuple(found)


def try_model(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Runs a model once on draws from its prior, log-densities included, and leaves nothing behind."""
    with kept_statistics(), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        trace = _trace(model, (args, kwargs))
        refuse_single(trace, model, (args, kwargs))
        check_densities(trace)
