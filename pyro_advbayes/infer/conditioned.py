"""A Pyro model with draws of some of its sites: what every form of prediction does with a draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Categorical

from pyro_advbayes.kinds import Node, plate_of, without_independent
from pyro_advbayes.model.layers import refuse_random_layers
from pyro_advbayes.model.program import Call, run, values_of
from pyro_advbayes.model.refusals import Given, Refused, told


class ConditionedModel:
    """
    A model (or a guide) together with draws of its sites.

    :param model: a callable with Pyro's primitives.
    :param samples: site -> ``[draws, *site]``.
    :param int num_samples: number of draws.
    :param bool strict: whether to refuse sites that the model does not have.
    """

    def __init__(self, model: Callable, samples: Mapping[str, Tensor], num_samples: int, strict: bool = True) -> None:
        self.model, self.samples, self.num_samples, self.strict = model, dict(samples), num_samples, strict
        self.categories: dict[str, int] = {}

    def look(self, *args: Any, **kwargs: Any) -> Trace:
        """
        Runs the model on the first draw, and gives the draws the shapes of their sites: Pyro's ``Predictive`` inserts dimensions of size 1
        in front, which a weight matrix must not have.

        :raises ValueError: naming the site or the layer, if draws do not fit the model, or a layer is in training mode; or the argument
            that the model takes in another form.
        """
        given = Given(self.model, args, kwargs)
        return told(lambda values: self._look(given.call(values)), given.values)

    def _look(self, call: Call) -> Trace:
        fit, categorical = _Fit({name: sample[0] for name, sample in self.samples.items()}), _DrawCategorical()
        handlers = refuse_random_layers(self.model), categorical, fit, poutine.mask(mask=False)
        trace = run(self.model, call, None, *handlers, hidden=False)
        self.categories = categorical.categories
        if self.strict:
            _check_sites(self.samples, fit.shapes, trace)
        self.samples = {name: self.samples[name].reshape(-1, *shape) for name, shape in fit.shapes.items()}
        return trace

    def draw(self, index: int) -> list[Tensor]:
        """The sites' values at one draw, in the order of :attr:`samples`."""
        return [sample[index] for sample in self.samples.values()]

    def draws(self, start: int, size: int) -> list[Tensor]:
        """The sites' values at several draws, ``[size, *site]``."""
        return [sample[start : start + size] for sample in self.samples.values()]

    def trace(self, values: Sequence[Tensor], *args: Any, **kwargs: Any) -> Trace:
        """
        Runs the model on a draw.

        :param values: what :meth:`draw` gave.
        """
        data = dict(zip(self.samples, values, strict=True))
        # conditioned: a draw may hold what the model observes, too
        handlers = _DrawCategorical(), poutine.mask(mask=False), poutine.condition(data=data)
        return run(self.model, (args, kwargs), None, *handlers, hidden=False)

    def run(self, values: Sequence[Tensor], names: Sequence[str], *args: Any, **kwargs: Any) -> list[Tensor]:
        """
        :param values: what :meth:`draw` gave.
        :param names: sites, or ``"_RETURN"``.
        :return: the values of ``names``.
        """
        return values_of(self.trace(values, *args, **kwargs), names)

    def check_categories(self, results: Mapping[str, Tensor]) -> None:
        """:raises ValueError: if a categorical site had probabilities that are not finite."""
        for name, count in self.categories.items():
            if name in results and bool((results[name] >= count).any()):
                raise ValueError(f"site {name!r}: its Categorical has probabilities that are not finite; check the draws and the data")


def _check_sites(samples: Mapping[str, Tensor], used: Mapping[str, Any], trace: Trace) -> None:
    # predictions by a guide hold its auxiliary sites
    unknown = [
        name for name in samples if name not in used and not name.startswith("_") and name.removesuffix("_unconstrained") not in trace.nodes
    ]
    if unknown or (samples and not used):
        missing = [name for name in (*trace.stochastic_nodes, *trace.observation_nodes) if name not in used]
        raise ValueError(
            f"posterior_samples hold sites that the model does not have: {', '.join(map(repr, unknown or samples))}. The model's other "
            f"sites are {', '.join(map(repr, missing)) or 'none'}: rename the samples, or leave out what does not belong"
        )


class _Fit(Messenger):
    """Conditions on values in the shapes of their sites."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.shapes: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg: Node) -> None:
        name, plate = msg["name"], plate_of(msg)
        batch = None if plate is None else plate.subsample_size
        if plate is not None and batch is not None and batch > plate.size:
            raise ValueError(
                f"plate {name!r} takes subsample_size={batch} of {plate.size} rows: give it no more than there are, "
                f"subsample_size=min({batch}, len(x))"
            )
        if name in self.values:
            value = self.values[name]
            shape = msg["fn"].shape() if plate is None else value.shape
            if without_leading_ones(value.shape) != without_leading_ones(shape):
                raise Refused(
                    f"site {name!r}: a draw in posterior_samples has shape {tuple(value.shape)}, the model's site has {tuple(shape)}"
                )
            self.shapes[name] = torch.Size(shape)
            msg["value"] = value.reshape(shape)
            msg["is_observed"] = True


def without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the dimensions of size 1 that Pyro's ``Predictive`` inserts in front."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


class _DrawCategorical(Messenger):
    """
    Draws categorical sites by the inverse of their distribution function, with one uniform number a row.

    ``torch.multinomial`` draws an exponential number for every class, which on a CPU costs more than a small network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.categories: dict[str, int] = {}

    def _pyro_sample(self, msg: Node) -> None:
        fn = without_independent(msg["fn"])
        if msg["value"] is None and isinstance(fn, Categorical):
            msg["value"] = draw_categorical(fn)
            self.categories[msg["name"]] = fn.param_shape[-1]


@torch.no_grad()
def draw_categorical(fn: Categorical) -> Tensor:
    """
    One draw, ``[*batch]``; the number of classes, which is no class, if the probabilities are not finite.
    """
    probs = fn.probs if "probs" in vars(fn) else fn.logits.exp()
    total = probs.to(torch.promote_types(probs.dtype, torch.float32)).cumsum(-1)
    uniform = torch.rand(total.shape[:-1], dtype=total.dtype, device=total.device).unsqueeze(-1)
    return total.shape[-1] - (uniform * total[..., -1:] < total).sum(-1)
