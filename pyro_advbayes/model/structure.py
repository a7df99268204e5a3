"""Looking at a model before it is sampled: its latent sites, its data plate, and what would go wrong silently."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_advbayes.given import is_array, kind
from pyro_advbayes.handlers import MinibatchMessenger, covered, is_masked, unvalidated
from pyro_advbayes.model.batches import in_words
from pyro_advbayes.model.notices import tell_of_new_statistics
from pyro_advbayes.model.refusals import Mismatch, Refused, in_a_line, label_of, not_given, original
from pyro_advbayes.model.supports import map_onto

Call = tuple[Sequence[Any], Mapping[str, Any]]

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


class Labels(NamedTuple):
    """An observed site whose values are an argument's as they are, and of which only some can be: a class of ten, a coin's side."""

    site: str
    argument: str
    support: Constraint

    @property
    def differs(self) -> bool:
        """Whether each row has a support of its own, as a Binomial's counts have."""
        return any(isinstance(bound, Tensor) and bound.dim() > 0 for bound in vars(self.support).values())

    def check(self, values: Tensor, where: str = "") -> None:
        """:raises ValueError: if some of ``values``, which are found ``where`` in the argument, cannot be."""
        # a share between 0 and 1 stands for a coin where it is the target of a cross-entropy
        coin = self.support is constraints.boolean
        wrong = (values < 0) | (values > 1) if coin else ~self.support.check(values)
        missing = ~values.isfinite()  # a mask may cover it, or the data is refused for it
        wrong &= ~(missing.flatten(wrong.dim()).any(-1) if missing.dim() > wrong.dim() else missing)
        if bool(wrong.any()):
            support = "which differs from row to row" if self.differs else self.support
            raise ValueError(
                f"observed site {self.site!r}: {int(wrong.sum())} of the values in argument {self.argument}{where} are outside its "
                f"support, {support} (the first is {values[wrong].flatten()[0].item():g}): check labels and number of classes"
            )


class Structure(NamedTuple):
    """
    What :func:`look` found: the latent sites in flat order, the data plate, what is observed of classes, factors of the prior, which
    are outside the plate and stay unscaled, whether some of what is observed is masked,
    the names of parameters, and the numbers other than 1 by which the model itself scales observed sites.

    ``scaling`` is ``"none"`` (full data, or a model that is given its indices and scales itself), ``"minibatch"``
    (:func:`~pyro_advbayes.handlers.minibatch` scales the plate) or ``"indices"`` (the plate draws its own subsample and scales
    itself: a sampler supplies the indices).
    """

    sites: tuple[Site, ...]
    scaling: str = "none"
    plate: str | None = None
    plate_size: int | None = None
    plate_batch: int | None = None
    labels: tuple[Labels, ...] = ()
    prior_factors: tuple[str, ...] = ()
    masked: bool = False
    parameters: tuple[str, ...] = ()
    scales: tuple[tuple[str, float], ...] = ()


def look(
    model: Callable,
    few: tuple[Sequence[Any], Mapping[str, Any]],
    fewer: tuple[Sequence[Any], Mapping[str, Any]] | None,
    rows: tuple[int, int] | None,
    num_data: int | None,
    lengths: Mapping[str, int] | None = None,
    loader: bool = False,
    whole: Sequence[tuple[str, Tensor, Tensor]] = (),
) -> Structure:
    """
    Looks at a model on two sets of arguments, which may hold a different number of rows, and on two draws of its latents.

    :param model: a Pyro model.
    :param few: ``(args, kwargs)`` of the first look.
    :param fewer: ``(args, kwargs)`` of the second; None looks twice at the first.
    :param rows: how many rows the two hold, if the model is to be scaled from minibatches of such rows; else None.
    :param num_data: number of rows that a minibatch stands for.
    :param lengths: lengths of the arguments by name, for the message when they don't fit.
    :param whole: ``(name, tensor in few, all its rows)`` of arguments, to look for labels outside the classes.
    :param loader: whether the rows come from a loader, which may supply a plate's indices too, ``plate(subsample=...)``.
    :raises ValueError: naming the site, plate or layer that a sampler cannot treat, and the remedy.
    """
    try:
        return _look(model, few, fewer, rows, num_data, lengths or {}, loader, whole)
    except _Drawn as error:
        absent = not_given(model, *few)
        hint = f". Argument {absent[0]} is not given: if the site is what it observes, give it" if absent else ""
        raise ValueError(f"{error}{hint}") from error.__cause__


def _look(
    model: Callable,
    few: Call,
    fewer: Call | None,
    rows: tuple[int, int] | None,
    num_data: int | None,
    lengths: Mapping[str, int],
    loader: bool,
    whole: Sequence[tuple[str, Tensor, Tensor]],
) -> Structure:
    arguments = (few, few if fewer is None else fewer)
    with tell_of_new_statistics(model), refuse_random_layers(model):
        try:
            first, second = (_trace(model, each) for each in arguments)
        except Refused:
            raise
        except Exception as error:  # whatever a model's Python does with fewer rows than it expects
            if rows is not None:
                _explain(error, [_witness(model, each) for each in arguments], rows, lengths)
            _explain_plate(error)
            raise
    own = _own_plate(first)
    if own is not None:
        _check_plate(first, own.plate)
        if rows is not None and (own.scaling == "indices" or not loader):
            raise _scaled_twice(own.plate, own.plate_batch, own.plate_size)
    found = own or Structure(())
    if own is None and rows is not None:
        plate = _following_plate(first, second, rows)
        _check_plate(first, plate)
        found = Structure((), "minibatch", plate, num_data, rows[0])
    sites = _latent_sites(first, second)
    if found.scaling == "minibatch":
        found = found._replace(prior_factors=_prior_factors(model, first, arguments, rows))
        _check_scaling(model, few, num_data, found)
        for trace, size in zip((first, second), rows, strict=True):
            _check_rows(trace, found.plate, size, lengths)
    for trace in (first, second):
        _check_observations(trace, lengths)
    _refuse_single(first, model, few)
    labels = []
    for name, given, values in whole:
        for each in _labels(first, name, given):
            each.check(given if each.differs else values)
            labels += [] if each.differs else [each]
    check_densities(first)
    masked = any(is_masked(node["fn"], node["mask"]) for node in _observations(first).values())
    return found._replace(sites=sites, labels=tuple(labels), masked=masked, parameters=tuple(first.param_nodes), scales=_scales(first))


class _Drawn(ValueError):
    """A refusal of a site that is drawn, and might be meant to be observed."""


@contextlib.contextmanager
def kept_statistics() -> Iterator[None]:
    """
    Within it, layers in training mode write their statistics (BatchNorm's running mean, say) into copies, which are dropped at the end:
    what they compute is the same, and nothing of it is remembered.
    """
    originals: dict[nn.Module, dict[str, Tensor]] = {}

    def keep(module: nn.Module, _: Any) -> None:
        if module.training and module not in originals:
            buffers = dict(module.named_buffers(recurse=False))
            if buffers:
                originals[module] = buffers
                for name, value in buffers.items():  # not restored in place: what autograd has saved must stay as it was
                    setattr(module, name, value.clone())

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in originals.items():
            for name, value in buffers.items():
                setattr(module, name, value)


@contextlib.contextmanager
def refuse_random_layers(model: Callable) -> Iterator[None]:
    """Within it, a BatchNorm or Dropout layer that runs in training mode raises an error with the layer's name."""
    names = {m: name for name, m in model.named_modules()} if isinstance(model, nn.Module) else {}

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, _NORMS + _DROPOUTS) and module.training:
            why = "changes its statistics" if isinstance(module, _NORMS) else "draws a new mask"
            raise Refused(
                f"layer {names.get(module) or type(module).__name__!r} ({type(module).__name__}) is in training mode, where it "
                f"{why} at every evaluation, so that there is no fixed log-density: call .eval() on the network first"
            )

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    except Refused as error:
        raise ValueError(str(error)) from None
    finally:
        handle.remove()


def refuse_inference_mode(who: str) -> None:
    """
    :param who: needs gradients.
    :raises RuntimeError: under ``torch.inference_mode``, where ``torch.enable_grad`` does not bring them back.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{who} needs gradients, and torch.inference_mode() has none: use torch.no_grad() instead (in Lightning: "
            "Trainer(inference_mode=False))"
        )


def _trace(model: Callable, arguments: tuple[Sequence[Any], Mapping[str, Any]]) -> Trace:
    args, kwargs = arguments
    with torch.no_grad(), poutine.block():
        return poutine.trace(InitMessenger(init_to_sample)(model)).get_trace(*args, **kwargs)


class _Witness(Messenger):
    """Notes plates and latent sites as they come, also of a model that fails half way."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, int] = {}
        self.own: list[tuple[str, int, int]] = []
        self.latents: dict[str, dict[str, int]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        sizes = {frame.name: frame.size for frame in msg["cond_indep_stack"]}
        if site_is_subsample(msg):
            size, batch = msg["fn"].size, msg["fn"].subsample_size
            sizes[msg["name"]] = size if batch is None else batch
            if batch not in (None, size):
                self.own.append((msg["name"], batch, size))
        elif not msg["is_observed"]:
            self.latents[msg["name"]] = sizes
        self.plates.update(sizes)


def _witness(model: Callable, arguments: tuple[Sequence[Any], Mapping[str, Any]]) -> _Witness:
    with contextlib.suppress(Exception), torch.no_grad(), poutine.block(), _Witness() as witness:
        args, kwargs = arguments
        model(*args, **kwargs)
    return witness


def _explain(error: Exception, seen: list[_Witness], rows: tuple[int, int], lengths: Mapping[str, int]) -> None:
    """
    Says why a model fails on minibatches where that can be told from what it did before; else returns.

    :raises ValueError: naming the plate, site or arguments.
    """
    first, second = seen
    for plate, batch, size in first.own + second.own:
        raise _scaled_twice(plate, batch, size) from original(error)
    for name, sizes in first.latents.items():
        for plate, size in sizes.items():
            if (size, second.latents.get(name, {}).get(plate)) == rows:
                raise _local_latent(name, plate) from original(error)
    what = f"the model fails on minibatches of {rows[0]} and {rows[1]} rows: {in_a_line(error)}"
    for plate, size in first.plates.items():
        if size == second.plates.get(plate) and rows[0] != rows[1]:
            raise Mismatch(
                f"{what}. Plate {plate!r} has {size} rows in both",
                f"if it holds the data it must take its size from them, pyro.plate({plate!r}, len(x)), or subsample itself (and "
                "batch_size=None)",
            ) from original(error)
    if len(set(lengths.values())) > 1:
        raise Mismatch(
            f"{what}. {in_words(lengths)}", "the arguments that hold data must be equally long (batch_args= names them)"
        ) from original(error)


def _explain_plate(error: Exception) -> None:
    """:raises ValueError: if a distribution in a plate has another size where the plate's rows are."""
    if "inside plate" in str(error):
        raise Mismatch(
            in_a_line(error),
            "the last dimension of a distribution's batch is the rows of the plate; .to_event(1) makes the outputs of a row one event, "
            ".squeeze(-1) drops a dimension of 1",
        ) from original(error)


def _scaled_twice(plate: str, batch: int, size: int) -> ValueError:
    return ValueError(
        f"plate {plate!r} subsamples itself ({batch} of {size} rows): cut into minibatches as well it would be scaled twice. "
        "Drop batch_size, or the plate's subsample"
    )


def _local_latent(site: str, plate: str) -> _Drawn:
    return _Drawn(
        f"site {site!r} is a local latent: it is drawn inside the data plate {plate!r}, so that it belongs to the rows of one "
        "minibatch (obs_mask= adds such a site, where poutine.mask adds none, and so do weights drawn in the plate). Draw it outside the "
        "plate or integrate it out"
    )


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
        transform = _map(name, node)
        if node["value"].shape != again[name]["value"].shape:
            raise ValueError(
                f"site {name!r} has shape {tuple(node['value'].shape)} in one run and {tuple(again[name]['value'].shape)} in the "
                "next: its shape depends on other draws or on the number of rows. Draw it with a fixed shape, outside the "
                "data plate"
            )
        shape = torch.Size(transform.inverse_shape(node["value"].shape))
        _check_same_support(name, transform, _map(name, again[name]), shape, node["value"])
        sites.append(Site(name, node["value"].shape, node["value"].dtype, shape, transform, start))
        start += shape.numel()
    return tuple(sites)


def _map(name: str, node: dict[str, Any]) -> Transform:
    """From unconstrained space onto the support of a latent site."""
    try:
        support = node["fn"].support
    except NotImplementedError:
        support = None
    if support is None or support.is_discrete:
        raise _Drawn(
            f"latent site {name!r} ({type(node['fn']).__name__}) is discrete or has no support: gradients cannot move it. Sum it "
            "out (a mixture distribution), or give its value as obs="
        )
    return map_onto(name, node["fn"])


def same_map(one: Transform, other: Transform, shape: torch.Size, like: Tensor) -> bool:
    """
    Whether two transforms take unconstrained numbers of a shape, in the dtype and on the device of ``like``, to the same values: those of
    most kinds are equal for PyTorch only where they are one object.
    """
    probe = torch.linspace(-1.0, 1.0, shape.numel(), dtype=like.dtype, device=like.device).reshape(shape)
    return bool((one(probe) == other(probe)).all())


def _check_same_support(name: str, one: Transform, other: Transform, shape: torch.Size, like: Tensor) -> None:
    if not same_map(one, other, shape, like):
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
    for name, node in trace.nodes.items():
        for frame in node.get("cond_indep_stack", ()):
            if frame.name == plate and not frame.vectorized:
                raise ValueError(f"plate {plate!r} is sequential (a for loop): minibatches need a vectorised one, `with pyro.plate(...):`")
            if frame.name == plate and name in _latents(trace):
                raise _local_latent(name, plate)


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
            raise ValueError(f"plate {plate!r} is sequential (a for loop): minibatches need a vectorised one, `with pyro.plate(...):`")
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{name!r} of {size}" for name, size in sizes[0].items()) or "none"
    if not found:
        events = [name for name, node in _observations(first).items() if rows[0] in node["fn"].event_shape[:1]]
        remedy = f" and drop .to_event({first.nodes[events[0]]['fn'].event_dim}), which makes the rows one event" if events else ""
        raise Mismatch(
            f"no plate follows the number of rows of a minibatch (plates seen on {rows[0]} rows: {seen})",
            f"put the observed site into `with pyro.plate('data', len(x)):`{remedy}, or use the full data (batch_size=None)",
        )
    raise ValueError(
        f"plates {', '.join(map(repr, found))} all follow the number of rows of a minibatch: it is not clear which holds the "
        "data. Use one plate, or let the model subsample itself, pyro.plate('data', N, subsample_size=B)"
    )


def prior_factors(model: Callable, arguments: Call, rows: int) -> tuple[str, ...]:
    """
    The ``pyro.factor`` terms of a model that are the same on other rows: terms of its prior, which a minibatch does not scale.

    :param arguments: ``(args, kwargs)``, of which tensors as long as ``rows`` hold a row per data point.
    """
    args, kwargs = arguments
    few = max(1, rows - 1)

    def cut(value: Any) -> Any:
        return value[:few] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    fewer = tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
    with kept_statistics(), pyro.get_param_store().scope(), pyro.validation_enabled(False):  # draws may overflow a deep network
        return _prior_factors(model, _trace(model, arguments), (arguments, fewer), (rows, few))


def _prior_factors(model: Callable, first: Trace, arguments: tuple[Call, Call], rows: tuple[int, int]) -> tuple[str, ...]:
    """Factors outside a plate of the rows, with one value on other rows, and on fewer: at latents held where the first trace has them."""
    factors = {
        name: node["fn"].log_factor
        for name, node in first.nodes.items()
        if isinstance(node.get("fn"), Unit) and all(frame.size != rows[0] for frame in node["cond_indep_stack"])
    }
    latents = {name: node["value"] for name, node in _latents(first).items()}
    held = poutine.condition(model, latents)
    for args, kwargs in (arguments[1], *_repeating_a_row(arguments, rows)) if factors else ():
        nodes = _trace(held, (args, kwargs)).nodes
        factors = {
            name: value
            for name, value in factors.items()
            if name in nodes and value.shape == nodes[name]["fn"].log_factor.shape and torch.equal(value, nodes[name]["fn"].log_factor)
        }
    return tuple(factors)


def _repeating_a_row(arguments: tuple[Call, Call], rows: tuple[int, int]) -> Iterator[Call]:
    """The arguments of more rows with their first one everywhere, and with their last: a sum, a mean or a maximum is another there."""
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


def _check_scaling(model: Callable, arguments: Call, num_data: int, found: Structure) -> None:
    """Lets the handler refuse, by name, what it would scale wrongly."""
    try:
        _trace(MinibatchMessenger(num_data, found.plate, found.prior_factors)(model), arguments)
    except ValueError as error:
        raise ValueError(str(error)) from None


def _check_rows(trace: Trace, plate: str, rows: int, lengths: Mapping[str, int]) -> None:
    for name, node in _observations(trace).items():
        for frame in node["cond_indep_stack"]:
            if frame.name == plate:
                dim = frame.dim - node["fn"].event_dim
                shape = node["value"].shape
                got = shape[dim] if len(shape) >= -dim else 1
                if got != rows and rows in shape[:1]:
                    raise _misfit(name, node, lengths)
                if got != rows:
                    why = "the arguments that hold data must be equally long"
                    if len(set(lengths.values())) == 1:
                        why = "every argument with a row per data point must be cut (batch_args= names them)"
                    raise Mismatch(f"observed site {name!r} has {got} rows where plate {plate!r} has {rows} ({in_words(lengths)})", why)


def _misfit(name: str, node: dict[str, Any], lengths: Mapping[str, int]) -> Mismatch:
    """An observed site whose values do not have the shape of its distribution, and why."""
    fn, value = node["fn"], tuple(node["value"].shape)
    shape, rows = tuple(fn.shape()), value[0] if value else 1
    plates = [repr(frame.name) for frame in node["cond_indep_stack"] if frame.vectorized]
    why = "give one observation for each, of the same shape"
    if plates and fn.event_dim and fn.event_shape[0] == rows and shape[:1] == (rows,):
        why = f".to_event({fn.event_dim}) makes all rows one event, which plate {plates[0]} then repeats. Drop it"
    elif plates and not fn.event_dim and len(shape) > 1 and shape[-2:] == (rows, rows):
        why = (
            f"its parameters have shape ({rows}, 1), which plate {plates[0]} repeats for every row: .squeeze(-1) them, or keep the "
            "dimension of 1 in the values too and end it with .to_event(1)"
        )
    known = f" ({in_words(lengths)})" if len(set(lengths.values())) > 1 else ""
    return Mismatch(f"observed site {name!r} has values of shape {value} where its distribution has {shape} for its rows{known}", why)


def _observations(trace: Trace) -> dict[str, dict[str, Any]]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and node["is_observed"]
        and isinstance(node["value"], Tensor)
        and not node["infer"].get("_deterministic")
    }


def _scales(trace: Trace) -> tuple[tuple[str, float], ...]:
    """Numbers other than 1 that scale observed sites, aside from what a plate that subsamples itself does; weights of rows are none."""
    found = []
    for name, node in _observations(trace).items():
        if isinstance(node["fn"], Unit) and not node["cond_indep_stack"]:  # of the prior, maybe
            continue
        scale = torch.as_tensor(node["scale"], dtype=torch.float64, device="cpu").detach()
        for frame in node["cond_indep_stack"]:
            if frame.full_size is not None:
                scale = scale * frame.size / frame.full_size
        number = float(scale.flatten()[0]) if scale.dim() == 0 or scale.numel() > 1 else 1.0  # one row's weight tells nothing
        if bool((scale == number).all()) and abs(number - 1.0) > 1e-6:
            found.append((name, number))
    return tuple(found)


def _labels(trace: Trace, argument: str, given: Tensor) -> list[Labels]:
    """The observed sites of discrete support whose values are an argument's."""
    found = []
    for name, node in _observations(trace).items():
        support = node["fn"].support if node["value"] is given else None
        while hasattr(support, "base_constraint"):  # of to_event
            support = support.base_constraint
        if support is not None and support.is_discrete:
            found.append(Labels(name, argument, support))
    return found


def _check_observations(trace: Trace, lengths: Mapping[str, int]) -> None:
    """Refuses values that would be repeated to fit: one label for all rows, one row for all labels, ``[N, 1]`` against ``[N]``."""
    for name, node in _observations(trace).items():
        value, shape = node["value"].shape, node["fn"].shape()
        try:
            fits = len(value) == 0 or torch.broadcast_shapes(value, shape) == value
        except RuntimeError:
            fits = False
        for frame in node["cond_indep_stack"]:
            dim = frame.dim - node["fn"].event_dim if frame.vectorized else 0
            fits = fits and (not -len(value) <= dim < 0 or value[dim] == frame.size)
        if not fits:
            raise _misfit(name, node, lengths)


def _refuse_single(trace: Trace, model: Callable, arguments: Call) -> None:
    """Refuses one number, given as an argument, that a plate would repeat for every row; a constant of the model's own may be."""
    args, kwargs = arguments
    for name, node in _observations(trace).items():
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized and frame.size > 1]
        for key, value in (*enumerate(args), *kwargs.items()):
            if value is node["value"] and value.dim() == 0 and frames:
                what = f"one number, {label_of(model, key)}, where plate {frames[0].name!r} has {frames[0].size} rows"
                raise Mismatch(f"observed site {name!r} is given {what}", "give one observation for each row")


def check_densities(trace: Trace) -> None:
    """
    Computes the log-density of what is observed, which fails where a value is of a dtype that its distribution cannot take.

    :raises ValueError: naming a site that is given an array in place of a tensor.
    """
    with torch.no_grad():
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and node["is_observed"] and is_array(node["value"]):
                raise Mismatch(f"observed site {name!r} is given {kind(node['value'])}", "give a tensor")
        for node in _observations(trace).values():
            unvalidated(node["fn"]).log_prob(covered(node["fn"], node["mask"], node["value"]))


def try_model(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Runs a model once on draws from its prior, log-densities included, and leaves nothing behind."""
    with kept_statistics(), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        trace = _trace(model, (args, kwargs))
        _refuse_single(trace, model, (args, kwargs))
        check_densities(trace)
