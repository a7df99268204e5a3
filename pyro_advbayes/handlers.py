"""Effect handlers: scaling a data plate to the whole data set, giving sites values, running a model where none can be looked at."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import MaskedDistribution, Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_advbayes.model.refusals import Refused


class MinibatchMessenger(Messenger):
    """
    Scales the observed sites of the data plate from a minibatch to the whole data set; see :func:`~pyro_advbayes.minibatch`.

    :param prior_factors: names of factors outside the plate, which are not scaled.
    :param int copies: how many rows of the plate stand for one row of the data.
    """

    def __init__(self, size: int, plate: str | None = None, prior_factors: Sequence[str] = (), copies: int = 1) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"minibatch: size is the number of rows in the data set, an int >= 1; got {size!r}")
        super().__init__()
        self.size = size
        self.plate, self.prior_factors, self.copies = plate, tuple(prior_factors), copies

    def __enter__(self) -> Any:
        self._found = self.plate
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name, frames = msg["name"], {frame.name: frame for frame in msg["cond_indep_stack"]}
        if name in self.prior_factors:
            return
        if msg["is_observed"] and isinstance(msg["fn"], Unit) and (self._found or next(iter(frames), None)) not in frames:
            raise Refused(
                f"factor {name!r} is outside the data plate. If it depends on the rows, move it into the plate, a term for each of them, "
                "so that it is scaled to the whole data set; if it belongs to the prior, it is left as it is by "
                f"minibatch(..., prior_factors=[{name!r}]), and by the samplers where it is the same on any rows"
            )
        if self._found is None and msg["is_observed"]:
            self._found = _only_plate(name, frames)
        frame = frames.get(self._found)
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
            raise Refused(
                f"site {name!r} is a local latent: it is drawn inside the data plate {frame.name!r}, so that it belongs to "
                "the rows of one minibatch (obs_mask= adds such a site, where poutine.mask adds none, and so do weights drawn in the "
                "plate). Draw it outside the plate or integrate it out; to predict, call the model without the minibatch handler"
            )
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


def _only_plate(site: str, frames: dict[str, Any]) -> str:
    """The one plate around an observed site, or a sentence about why there is not one."""
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
    Gives latent sites their values, and plates that subsample themselves their indices: as ``poutine.replay`` does, from plain tensors.

    :param dict values: site or plate -> value; the others are drawn as usual.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class CoveredMessenger(Messenger):
    """
    Lets what a mask covers be anything, NaN included: puts a value of the support in its place. (A mask alone leaves the gradient of NaN
    times 0, which is NaN.)
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and isinstance(msg["value"], Tensor) and isinstance(msg["fn"], Distribution):
            msg["value"] = covered(msg["fn"], msg["mask"], msg["value"])


def covered(fn: Distribution, mask: Any, value: Tensor) -> Tensor:
    """
    An observed value with one of the support wherever it is masked, by ``poutine.mask`` or by ``fn.mask``.

    :param mask: of the site, that is of ``poutine.mask``; None for none.
    """
    if not is_masked(fn, mask):
        return value
    seen: Tensor | bool = True
    for each, event_dim in _masks(fn, mask):
        seen = (each.reshape(each.shape + (1,) * event_dim) if isinstance(each, Tensor) else each) & seen
    return torch.where(torch.as_tensor(seen, device=value.device), value, _inside(fn.support, value))


def is_masked(fn: Distribution, mask: Any) -> bool:
    """Whether an observed site leaves something out of its log-density."""
    return any(each is not True for each, _ in _masks(fn, mask))


def _masks(fn: Distribution | None, mask: Any) -> list[tuple[Any, int]]:
    """The masks of a site, each with the number of dimensions of an event under it."""
    masks = [] if mask is None else [(mask, fn.event_dim)]
    while fn is not None:
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))  # Pyro has no public name for it
        fn = getattr(fn, "base_dist", None)
    return masks


def _inside(support: Any, value: Tensor) -> Tensor:
    """A value of a support, in the shape and dtype of another."""
    if not support.is_discrete:
        transform = biject_to(support)
        return transform(value.new_zeros(transform.inverse_shape(value.shape))).to(value.dtype)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return torch.as_tensor(getattr(support, "lower_bound", 0), dtype=value.dtype, device=value.device)


class UnvalidatedMessenger(Messenger):
    """
    Gives every site a copy of its distribution that does not validate values.

    ``pyro.validation_enabled(False)`` reaches only distributions that are made under it; a prior that a ``PyroSample`` holds was
    made before, and its look at the values stops every ``torch.func`` transform and graph trace.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["fn"], Distribution):
            msg["fn"] = unvalidated(msg["fn"])


def unvalidated(fn: Distribution) -> Distribution:
    """A copy of a distribution, and of those that it holds, that does not validate values."""
    fn = copy.copy(fn)
    for name, value in vars(fn).items():
        if isinstance(value, Distribution):
            setattr(fn, name, unvalidated(value))
    fn._validate_args = False  # torch has no public way to switch validation off on a distribution that exists
    return fn


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Leaves PyTorch's random generators as they were, so that a look at a model changes nothing of a run under a seed."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
