"""Checks of what a model observes: values fit their distributions and plates, labels are inside their supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_advbayes.given import kind
from pyro_advbayes.handlers import covered, unvalidated
from pyro_advbayes.kinds import Node, observed_sites
from pyro_advbayes.model.batches import in_words
from pyro_advbayes.model.program import Call
from pyro_advbayes.model.refusals import Mismatch, label_of


class Labels(NamedTuple):
    """An observed site with discrete support whose values are a model argument unchanged, e.g. class labels."""

    site: str
    argument: str
    support: Constraint

    @property
    def differs(self) -> bool:
        """Whether each row has a support of its own, as a Binomial's counts have."""
        return any(isinstance(bound, Tensor) and bound.dim() > 0 for bound in vars(self.support).values())

    def check(self, values: Tensor, where: str = "") -> None:
        """
        :param where: the values are, for the message.
        :raises ValueError: if some values are outside the support.
        """
        # a number between 0 and 1 may be the target of a cross-entropy
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


def check_rows(trace: Trace, plate: str, rows: int, lengths: Mapping[str, int]) -> None:
    """:raises Mismatch: if values in the data plate do not have its number of rows."""
    for name, node in observations(trace).items():
        for frame in node["cond_indep_stack"]:
            if frame.name == plate and frame.dim is not None:
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


def _misfit(name: str, node: Node, lengths: Mapping[str, int]) -> Mismatch:
    """The error for values without the shape of their distribution, and the usual reason."""
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


def observations(trace: Trace) -> dict[str, Node]:
    """The observed sites whose values are tensors."""
    return {name: node for name, node in observed_sites(trace).items() if isinstance(node["value"], Tensor)}


def labels_of(trace: Trace, argument: str, given: Tensor) -> list[Labels]:
    """The observed sites of discrete support whose values are an argument's."""
    found = []
    for name, node in observations(trace).items():
        support: Any = node["fn"].support if node["value"] is given else None
        while hasattr(support, "base_constraint"):  # of to_event
            support = support.base_constraint
        if support is not None and support.is_discrete:
            found.append(Labels(name, argument, support))
    return found


def check_observations(trace: Trace, lengths: Mapping[str, int]) -> None:
    """Refuses values that would be repeated to fit: one label for all rows, one row for all labels, ``[N, 1]`` against ``[N]``."""
    for name, node in observations(trace).items():
        value, shape = node["value"].shape, node["fn"].shape()
        try:
            fits = len(value) == 0 or torch.broadcast_shapes(value, shape) == value
        except RuntimeError:
            fits = False
        for frame in node["cond_indep_stack"]:
            dim = 0 if frame.dim is None else frame.dim - node["fn"].event_dim
            fits = fits and (not -len(value) <= dim < 0 or value[dim] == frame.size)
        if not fits:
            raise _misfit(name, node, lengths)


def refuse_single(trace: Trace, model: Callable, call: Call) -> None:
    """Refuses one number, given as an argument, that a plate would repeat for every row; a constant in the model is accepted."""
    args, kwargs = call
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for name, node in observations(trace).items():
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized and frame.size > 1]
        for key, value in given:
            if value is node["value"] and value.dim() == 0 and frames:
                what = f"one number, {label_of(model, key)}, where plate {frames[0].name!r} has {frames[0].size} rows"
                raise Mismatch(f"observed site {name!r} is given {what}", "give one observation for each row")


def check_densities(trace: Trace) -> None:
    """
    Computes the log-densities of the observations, which fails for a value of a dtype that its distribution cannot take.

    :raises ValueError: naming a site that is given an array in place of a tensor.
    """
    with torch.no_grad():
        for name, node in observed_sites(trace).items():
            if not isinstance(node["value"], (Tensor, Real)):
                raise Mismatch(f"observed site {name!r} is given {kind(node['value'])}", "give a tensor")
        for node in observations(trace).values():
            unvalidated(node["fn"]).log_prob(covered(node["fn"], node["mask"], node["value"]))
