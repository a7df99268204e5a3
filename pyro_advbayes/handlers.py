"""Effect handlers: scale a data plate to the whole data set, give sites values, run a model without validation."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from pyro.distributions import MaskedDistribution, TorchDistribution, Unit
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_advbayes.given import check_int
from pyro_advbayes.kinds import Node, is_deterministic, is_subsample

D = TypeVar("D", bound=Distribution)


class Refused(ValueError):
    """
    An error raised inside a model that Pyro runs, without the table of shapes: Pyro makes a new error of the same class from the message
    and the table.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_table(message))


def without_table(message: str) -> str:
    """A message without the table of shapes that Pyro adds to errors from inside a model."""
    return re.split(r"\s*Trace Shapes:", message)[0]


def in_a_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (without_table(str(error)).splitlines() or [type(error).__name__])[0].rstrip(".")


class MinibatchMessenger(Messenger):
    """
    Scales the observed sites of the data plate from a minibatch to the whole data set; see :func:`~pyro_advbayes.minibatch`.

    :param prior_factors: names of ``pyro.factor`` terms outside the plate, which are not scaled.
    :param int copies: number of rows of the plate that stand for one row of the data.
    """

    def __init__(self, size: int | None, plate: str | None = None, prior_factors: Sequence[str] = (), copies: int = 1) -> None:
        super().__init__()
        self.size = check_int(size, "size", 1, "the number of rows in the whole data set")
        self.plate, self.prior_factors, self.copies = plate, tuple(prior_factors), copies

    def __enter__(self) -> Any:
        self._found = self.plate
        return super().__enter__()

    def _pyro_sample(self, msg: Node) -> None:
        if is_subsample(msg) or is_deterministic(msg):
            return
        name, frames = msg["name"], {frame.name: frame for frame in msg["cond_indep_stack"]}
        if name in self.prior_factors:
            return
        if msg["is_observed"] and isinstance(msg["fn"], Unit) and (self._found or next(iter(frames), None)) not in frames:
            raise Refused(
                f"factor {name!r} is outside the data plate. If it depends on the rows, move it into the plate, a term for each of them, "
                "so that it is scaled to the whole data set. If it belongs to the prior, "
                f"minibatch(..., prior_factors=[{name!r}]) leaves it unscaled, and samplers do so by themselves"
            )
        if self._found is None and msg["is_observed"]:
            self._found = _only_plate(name, frames)
        frame = None if self._found is None else frames.get(self._found)
        if frame is None:
            if msg["is_observed"]:
                raise Refused(
                    f"observed site {name!r} is outside the data plate {self._found!r}: its log-density would not be scaled to the whole "
                    "data set. Move it into the plate, or use the full data (batch_size=None); a term of the prior is a pyro.factor"
                )
            return
        if not frame.vectorized:
            raise Refused(
                f"plate {frame.name!r} is sequential (a for loop): minibatches need a vectorised one, "
                f"`with pyro.plate({frame.name!r}, ...):`"
            )
        if not msg["is_observed"]:
            raise Refused(f"{local_latent(name, frame.name)}; to predict, call the model without the minibatch handler")
        if frame.full_size is not None and frame.full_size != frame.size:
            raise Refused(
                f"plate {frame.name!r} subsamples itself ({frame.size} of {frame.full_size} rows), so it is scaled already: "
                "drop the minibatch handler (batch_size=), or the plate's subsample"
            )
        if frame.size > self.size * self.copies:
            raise Refused(
                f"plate {frame.name!r} has {frame.size} rows, more than the data set's size={self.size}: give the number "
                "of rows of the whole data set"
            )
        msg["scale"] = msg["scale"] * (self.size / frame.size)


def local_latent(site: str, plate: str) -> str:
    """The message about a latent site in the data plate."""
    return (
        f"site {site!r} is a local latent: it is drawn inside the data plate {plate!r}, so that it belongs to the rows of one minibatch "
        "(obs_mask= adds such a site, too; poutine.mask adds none). Draw it, weights included, outside the plate, or integrate it out"
    )


def _only_plate(site: str, frames: Mapping[str, CondIndepStackFrame]) -> str:
    """
    The one plate around an observed site.

    :raises Refused: if there is none, or there are several.
    """
    if not frames:
        raise Refused(
            f"observed site {site!r} is in no plate: put it in `with pyro.plate('data', len(x)):`, so that a minibatch "
            "can be scaled to the whole data set"
        )
    if len(frames) > 1:
        raise Refused(
            f"observed site {site!r} is in {len(frames)} plates ({', '.join(map(repr, frames))}): say which one holds the "
            "rows of the data, plate=..."
        )
    return next(iter(frames))


class GivenMessenger(Messenger):
    """
    Gives latent sites their values, and plates that subsample themselves their indices, from plain tensors. As under ``poutine.replay``,
    the sites stay latent.

    :param dict values: site or plate -> value; the model draws the others.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Node) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class CoveredMessenger(Messenger):
    """
    Replaces masked observations by a value of the support, so that they may be NaN: under the mask alone, the gradient is NaN times 0.
    """

    def _pyro_sample(self, msg: Node) -> None:
        if msg["is_observed"] and isinstance(msg["value"], Tensor) and isinstance(msg["fn"], Distribution):
            msg["value"] = covered(msg["fn"], msg["mask"], msg["value"])


def covered(fn: TorchDistribution, mask: Tensor | bool | None, value: Tensor) -> Tensor:
    """
    An observed value, with a value of the support wherever ``poutine.mask`` or ``fn.mask`` masks it.

    :param mask: the site's, from ``poutine.mask``; None for none.
    """
    if not is_masked(fn, mask):
        return value
    seen: Tensor | bool = True
    for each, event_dim in masks_of(fn, mask):
        seen = (each.reshape(each.shape + (1,) * event_dim) if isinstance(each, Tensor) else each) & seen
    return torch.where(torch.as_tensor(seen, device=value.device), value, _inside(fn.support, value))


def is_masked(fn: TorchDistribution, mask: Tensor | bool | None) -> bool:
    """Whether a mask leaves something out of the log-density of an observed site."""
    return any(each is not True for each, _ in masks_of(fn, mask))


def masks_of(fn: TorchDistribution, mask: Tensor | bool | None = None) -> list[tuple[Tensor | bool, int]]:
    """The masks of a site, each with its distribution's number of event dimensions."""
    masks = [] if mask is None else [(mask, fn.event_dim)]
    inner: TorchDistribution | None = fn
    while inner is not None:
        if isinstance(inner, MaskedDistribution):
            masks.append((own_mask(inner), inner.event_dim))
        inner = getattr(inner, "base_dist", None)
    return masks


def own_mask(fn: MaskedDistribution) -> Tensor | bool:
    """The mask of ``fn.mask(...)``; Pyro has no public name for it."""
    return fn._mask


def _inside(support: Any, value: Tensor) -> Tensor:
    """A value of a support, in the shape and dtype of ``value``."""
    if not support.is_discrete:
        transform = biject_to(support)
        return transform(value.new_zeros(transform.inverse_shape(value.shape))).to(value.dtype)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return torch.as_tensor(getattr(support, "lower_bound", 0), dtype=value.dtype, device=value.device)


class UnvalidatedMessenger(Messenger):
    """
    Gives every site a copy of its distribution that does not validate values.

    ``pyro.validation_enabled(False)`` affects only distributions that are made under it. A ``PyroSample`` holds its prior since before, and
    the prior's check of values fails in ``torch.func`` transforms and recordings.
    """

    def _pyro_sample(self, msg: Node) -> None:
        if isinstance(msg["fn"], Distribution):
            msg["fn"] = unvalidated(msg["fn"])


def unvalidated(fn: D) -> D:
    """A copy of a distribution and of the distributions that it holds, without validation of values."""
    fn = copy.copy(fn)
    for name, value in vars(fn).items():
        if isinstance(value, Distribution):
            setattr(fn, name, unvalidated(value))
    fn._validate_args = False  # torch has no public way to switch validation off on a distribution that exists
    return fn
