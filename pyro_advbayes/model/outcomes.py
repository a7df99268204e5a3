"""The outcomes of a Pyro model: the sites that it observes, what kind of outcome each is, and the logits of classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Bernoulli, Binomial, Categorical, Distribution, Independent, Multinomial, OneHotCategorical
from torch.overrides import TorchFunctionMode

from pyro_advbayes.kinds import is_deterministic, is_subsample, sites
from pyro_advbayes.model.program import run
from pyro_advbayes.tracing.guard import version_of

CLASSES, LABELS, COUNTS, NUMBERS = "classes", "labels", "counts", "numbers"

_BINARY = Bernoulli, Binomial
_SEVERAL = Categorical, OneHotCategorical, Multinomial
_OWN = {each.log_prob for each in (*_BINARY, *_SEVERAL, dist.Bernoulli, dist.Binomial, dist.Categorical)}


class Likelihood(NamedTuple):
    """
    The distribution of a model's outcomes.

    :ivar site: name of the observed site.
    :ivar fn: its distribution, without ``to_event``, masks and expansions.
    :ivar shape: the number of outcomes along each dimension, the rows of the data among them.
    :ivar rows: N, the number of inputs.
    """

    site: str
    fn: Distribution
    shape: torch.Size
    rows: int

    @property
    def kind(self) -> str:
        """
        ``"classes"`` (one of K classes for each row: Categorical and OneHotCategorical, Bernoulli and Binomial of one trial, whose classes
        are 0 and 1), ``"labels"`` (several such choices for each row), ``"counts"`` (another discrete outcome) or ``"numbers"``
        (a continuous one).
        """
        one_trial = not isinstance(self.fn, (Binomial, Multinomial)) or bool((torch.as_tensor(self.fn.total_count) == 1).all())
        if isinstance(self.fn, _BINARY + _SEVERAL) and one_trial:
            return CLASSES if self.shape.numel() == self.rows else LABELS
        try:
            support = self.fn.support
            return COUNTS if support is not None and support.is_discrete else NUMBERS
        except NotImplementedError:
            return NUMBERS

    @property
    def _probs(self) -> Tensor:
        if not isinstance(self.fn, _BINARY + _SEVERAL):
            raise TypeError(f"{type(self.fn).__name__} has no probabilities of classes")
        return self.fn.probs

    def check_classes(self, who: str, instead: str = "take Predictive for its predictions") -> None:
        """
        :param who: beginning of the message, which takes classifiers only.
        :param instead: end of the message, a remedy for counts and numbers.
        :raises ValueError: unless :attr:`kind` is ``"classes"``, of two classes or more.
        """
        name, kind = type(self.fn).__name__, self.kind
        if kind == CLASSES:
            if isinstance(self.fn, _SEVERAL) and self.fn.probs.shape[-1] < 2:
                raise ValueError(f"{who}: the {name} at observed site {self.site!r} has one class: give a logit for each of K >= 2 classes")
            return
        what = {
            LABELS: f"has {self.shape.numel()} outcomes of {self.rows} inputs, several labels each: take a sigmoid (or softmax) of each "
            "label's logits from Predictive, or one observed site for each label and return_site= with its name",
            COUNTS: f"is a distribution of counts, and not of classes: {instead}",
            NUMBERS: f"is a regression, and not a classifier: {instead}",
        }
        raise ValueError(f"{who}: the likelihood at observed site {self.site!r}, {name}, {what[kind]}")

    def logits(self, origins: Origins | None = None) -> Tensor:
        """
        Logits ``[N, K]`` of the classes: those that the distribution was made of, if ``origins`` saw that. The logarithm of a probability
        of 0 is that of the smallest number > 0, so that its gradient is finite.
        """
        if type(self.fn).log_prob not in _OWN:
            logits = self._enumerated()
        elif isinstance(self.fn, _BINARY):
            probs = self.fn.probs
            one = None if origins is None else origins.of(probs, "sigmoid")
            if one is None:
                logits = _log(torch.stack([1 - probs, probs], -1))
            else:
                logits = torch.stack([torch.zeros_like(one), one], -1)
        else:
            given = None if origins is None else origins.of(self._probs, "softmax")
            logits = _log(self._probs) if given is None else given
        if logits.shape[:-1].numel() != self.rows:
            logits = logits.expand(*self.shape, logits.shape[-1])
        return logits if logits.dim() == 2 else logits.reshape(self.rows, logits.shape[-1])

    def _enumerated(self) -> Tensor:
        """Log-probabilities by a custom ``log_prob``, of label noise, say."""
        probs, binary = self._probs, isinstance(self.fn, _BINARY)
        count = 2 if binary else probs.shape[-1]
        if isinstance(self.fn, (OneHotCategorical, Multinomial)):
            values = torch.eye(count, dtype=probs.dtype, device=probs.device).reshape(count, *(1,) * len(self.fn.batch_shape), count)
        else:
            values = torch.arange(count, dtype=probs.dtype if binary else None, device=probs.device)
            values = values.reshape(count, *(1,) * len(self.fn.batch_shape))
        return self.fn.log_prob(values.expand(count, *self.fn.batch_shape, *self.fn.event_shape)).movedim(0, -1)


def _log(probs: Tensor) -> Tensor:
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def find_outcomes(model: Callable, trace: Trace, args: Sequence[Any], kwargs: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """
    The sites of a run that hold an outcome for each row: observed ones, or without any the sites that ``y`` would observe. These are in a
    plate of as many rows (or have as many rows without a plate), and no other site depends on them.

    :param given: sites that have draws.
    """
    rows = rows_of(args, kwargs)
    every = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    nodes = {name: node for name, node in sites(trace).items() if name not in given and is_outcome(node)}
    inside = {name for name, node in nodes.items() if any(f.vectorized and f.size == rows for f in node["cond_indep_stack"])}
    bare = {name for name, node in nodes.items() if not node["cond_indep_stack"] and node["value"].shape[:1] == (rows,)}
    for found in (inside, bare):
        observed = [name for name in nodes if name in found and nodes[name]["is_observed"]]
        if observed:
            return observed
        drawn = [name for name in nodes if name in found]
        if len(drawn) > 1:  # local latents may be among them
            drawn = [name for i, name in enumerate(drawn) if follower(model, every, name, drawn[i + 1 :], args, kwargs) is None]
        if drawn:
            return drawn
    return []


def follower(
    model: Callable, nodes: Mapping[str, Any], name: str, after: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """The first of the sites ``after`` this one whose log-density changes when this one alone is drawn again."""
    if not after:
        return None
    given = {other: node["value"] for other, node in nodes.items() if other != name}
    with pyro.validation_enabled(False):  # the values of others may be outside their supports now
        runs = [sites(run(model, (args, kwargs), given)) for _ in range(2)]
        for other in after:
            one, two = (run[other]["fn"].log_prob(run[other]["value"]) if other in run else None for run in runs)
            if one is None or two is None or not torch.equal(one.nan_to_num(), two.nan_to_num()):
                return other
    return None


def one_outcome(trace: Trace, outcomes: Sequence[str], site: str | None, argument: str = "site") -> str:
    """
    :param site: the user's choice, or None.
    :param argument: name of the argument that holds the choice.
    :raises ValueError: if there are several outcomes and no choice, or the model has no such site.
    """
    if site is not None and site not in trace.nodes:
        raise ValueError(f"{argument}={site!r}: the model has no such site; it observes {', '.join(map(repr, outcomes))}")
    if site is None and len(outcomes) > 1:
        raise ValueError(f"the model observes {', '.join(map(repr, outcomes))}: name the one that is meant, {argument}={outcomes[0]!r}")
    return outcomes[0] if site is None else site


def likelihood_at(trace: Trace, site: str, rows: int) -> Likelihood:
    """The likelihood at a site of a run on ``rows`` inputs."""
    fn = sites(trace)[site]["fn"]
    base, shape = without_wrappers(fn), fn.shape()
    return Likelihood(site, base, shape[: len(shape) - len(base.event_shape)], rows)


def without_wrappers(fn: Distribution) -> Distribution:
    """A distribution without ``to_event``, masks and expansions."""
    while isinstance(fn, (Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def is_outcome(node: Mapping[str, Any]) -> bool:
    """Whether a node is a random site: no plate's indices, no deterministic value and no factor."""
    return node["type"] == "sample" and not (is_subsample(node) or is_deterministic(node) or isinstance(node["fn"], dist.Unit))


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """N: the length of the first tensor among a call's arguments."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise ValueError("the model's arguments hold no tensor, whose rows the outcomes could belong to")
    return len(tensors[0])


_SHAPES = frozenset({"squeeze", "unsqueeze", "flatten", "reshape", "view", "__getitem__"})
_NOTED = _SHAPES | {"broadcast_tensors", "expand", "sigmoid", "softmax", "logsumexp", "sum", "sub", "div"}


class Origins(TorchFunctionMode):
    """
    Within it, remembers the logits of probabilities: a softmax of confident logits has zeros, whose logarithm has lost value and gradient,
    and distributions do not keep the logits that they are made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[Tensor, str, Tensor, int | None]] = {}  # the tensors, so that no other gets their ids

    def of(self, probs: Tensor, function: str) -> Tensor | None:
        """The logits whose ``"softmax"`` or ``"sigmoid"`` the probabilities are; None if unknown."""
        found = self._logits(probs, function)
        inner = None if found is None else self._logits(found, "log_softmax")
        return found if inner is None else inner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        if name not in _NOTED:  # first, since each access to a tensor is a call for the modes outside
            pass
        elif name == "broadcast_tensors":
            for value, old in zip(result, args, strict=True) if len(args) == 1 else ():
                if old.shape == value.shape:
                    self._pass_on(old, value)
        elif not isinstance(x, Tensor) or not isinstance(result, Tensor) or result is x or result.dtype != x.dtype:
            pass
        elif name == "expand" and result.shape == x.shape:  # Pyro's plates, whether there is something to expand or not
            self._pass_on(x, result)
        elif name == "sigmoid" or (name == "softmax" and _last(x, args, kwargs)):
            self._note(result, name, x)
        elif name in ("logsumexp", "sum") and _last(x, args, kwargs) and result.shape == (*x.shape[:-1], 1):
            self._note(result, name, x)
        elif name in ("sub", "div") and len(args) == 2 and not kwargs:
            whole = self._logits(args[1], "logsumexp" if name == "sub" else "sum") if isinstance(args[1], Tensor) else None
            if whole is x and name == "sub":
                self._note(result, "log_softmax", x)
            elif whole is x and self._logits(x, "softmax") is not None:
                self._pass_on(x, result)
        elif name in _SHAPES:
            logits = self._logits(x, "sigmoid")
            if logits is not None:
                self._note(result, "sigmoid", func(logits, *args[1:], **kwargs))
        return result

    def _note(self, value: Tensor, made_by: str, of: Tensor) -> None:
        self._found[id(value)] = value, made_by, of, version_of(of)

    def _pass_on(self, old: Tensor, new: Tensor) -> None:
        if id(old) in self._found:
            self._found[id(new)] = new, *self._found[id(old)][1:]

    def _logits(self, value: Tensor, function: str) -> Tensor | None:
        found = self._found.get(id(value))
        return found[2] if found is not None and found[1] == function and version_of(found[2]) == found[3] else None


def _last(x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a reduction is over the last dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim in (-1, x.dim() - 1, (-1,), [-1])
