"""The objective of :class:`~pyro_advbayes.TraceAdversarial_ELBO` as graphs of tensors, traced once from Pyro's handlers and replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.runtime import _PYRO_STACK  # Pyro has no public list of the active handlers
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from pyro_advbayes.handlers import UnvalidatedMessenger, in_a_line
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal, BaseNoise, BaseNormal, MovedNoise
from pyro_advbayes.kinds import Node, latent_sites, observed_sites, sites, subsampling_plates, without_independent
from pyro_advbayes.model.batches import Arguments
from pyro_advbayes.model.layers import refuse_random_layers
from pyro_advbayes.model.program import log_likelihood, run
from pyro_advbayes.nn.reparameterization import rows_differ
from pyro_advbayes.tracing.guard import DIFFERS, Guard, agree, autocast_state, noting_modules, roots_of, warn_of_handlers
from pyro_advbayes.tracing.record import Recorder
from pyro_advbayes.tracing.replay import trace_graph

Tensors = Sequence[Tensor]

# Number of models, guides and shapes of arguments whose graphs are kept.
KEPT = 8

# Number of calls on which a graph is compared with the handlers; on the first call, also at other parameters.
COMPARED = 2


class NotTraceable(Exception):
    """A graph would not compute the objective; the message says why."""


class Graphs:
    """Graphs by model, guide and shapes of their arguments."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def get(self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Objective | None:
        """The graphs for these arguments; None if Pyro's handlers run instead."""
        if rows_differ() or _handled():  # a graph has one draw for all rows, and ignores active handlers
            return None
        if getattr(guide, "prototype_trace", guide) is None:  # a guide finds its sites at its first call
            return None
        key = _key(args, kwargs)
        entry = next((e for e in self._entries if e.fits(model, guide, key)), None)
        if entry is None:
            roots, objective = roots_of(model), None
            try:
                # unwrapped: a wrapped network has no signature, and the error about it prints the network, which draws weights
                objective = Objective(model, guide, Arguments(poutine.unwrap(model), args, kwargs), roots)
            except NotTraceable as error:
                warn_of_handlers("backend='graph'", str(error))
            entry = _Entry(model, guide, key, roots, Guard(roots, versions=True), objective)
            self._entries = [entry, *self._entries[: KEPT - 1]]
        return entry.objective

    def drop(self, objective: Objective, why: NotTraceable) -> None:
        """Replaces this objective by Pyro's handlers, with a warning."""
        for entry in self._entries:
            if entry.objective is objective:
                entry.objective = None
        warn_of_handlers("backend='graph'", str(why))


def _handled() -> bool:
    """Whether active effect handlers may change the model; SVI's own handler only records."""
    return any(not isinstance(handler, TraceMessenger) for handler in _PYRO_STACK)


@dataclass
class _Entry:
    """A model and a guide with arguments of one kind, the modules that run, and the graphs; None if Pyro's handlers run."""

    model: Callable
    guide: Callable
    key: Any
    roots: list[nn.Module]
    guard: Guard
    objective: Objective | None

    def fits(self, model: Callable, guide: Callable, key: Any) -> bool:
        same = self.model is model and self.guide is guide and self.key == key
        return same and self.guard.state == Guard(self.roots, versions=True).state


def _key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a graph holds as constants: shapes, arguments that are not tensors, and the dtypes of autocast."""
    return [_kind(value) for value in (*args, *kwargs.values())], tuple(kwargs), autocast_state()


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return repr(value) if _plain(value) else type(value)


def _plain(value: Any) -> bool:
    """Whether ``repr`` determines a value."""
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among a model's arguments, in the order of :class:`~pyro_advbayes.model.batches.Arguments`."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


class NormalPrior(NamedTuple):
    """A constant Normal prior: each parameter is a number, or a tensor of the site's shape."""

    loc: float | Tensor
    scale: float | Tensor


class TermWeights(NamedTuple):
    """The weights of the plain draw's likelihood, the moved draw's, and the divergence, as tensors."""

    plain: Tensor
    moved: Tensor
    kl: Tensor


class Objective:
    """
    The objective and its gradients at given base noise, for one model, guide and shape of arguments.

    :param roots: the modules that the model is known to use; others that run are added.
    :raises NotTraceable: if a graph would not compute this objective.
    """

    def __init__(self, model: Callable, guide: Callable, arguments: Arguments, roots: list[nn.Module]) -> None:
        if not isinstance(guide, AutoAdversarialNormal):
            raise NotTraceable(f"the guide is {type(guide).__name__}, and only AutoAdversarialNormal is traced")
        self.model, self.guide, self.arguments, self.roots = model, guide, arguments, roots
        if any(t.requires_grad for t in arguments.tensors):
            raise NotTraceable("an argument of the model requires a gradient")
        for value in (*arguments.args, *arguments.kwargs.values()):
            if not isinstance(value, Tensor) and not _plain(value):
                raise NotTraceable(f"a graph takes tensors, numbers and strings, and an argument of the model is a {type(value).__name__}")
        self._graphs: dict[str, Callable[..., Any]] = {}
        self._compared: dict[str, int] = {}
        self._own_names: list[str] = []
        self.own: list[Tensor] = []
        self._look()

    def _look(self) -> None:
        """Finds the sites, and those with a closed form of the divergence, :func:`normal_divergence`."""
        parameters = self.parameters()
        self.names, self.bases = list(parameters), {}
        self.others = self.names
        locs, scales = ([value.detach().requires_grad_() for value in values] for values in zip(*parameters.values(), strict=True))
        noises = [torch.zeros_like(loc) for loc in locs]
        try:
            with torch.enable_grad(), pyro.validation_enabled(False):  # validation reads values
                tensors = [t.clone() for t in self.arguments.tensors]  # the model may write to them
                with refuse_random_layers(poutine.unwrap(self.model)), noting_modules(self.roots):
                    self._traces(locs, scales, noises, tensors)
                self.held = Guard(self.roots).held
                with Recorder([*locs, *scales, *noises, *tensors, *self.held]) as recorder:
                    model_trace, guide_trace = self._traces(locs, scales, noises, tensors)
        except (ValueError, RuntimeError) as error:
            raise NotTraceable(in_a_line(error)) from error
        check_sites(model_trace, guide_trace)
        for trace in (model_trace, guide_trace):
            if subsampling_plates(trace):
                raise NotTraceable("a plate subsamples itself")
        ours, theirs = sites(guide_trace), sites(model_trace)
        self.bases = {name: BaseNormal(name, ours[name]["fn"]) for name in self.names}
        self.priors = {name: _constant_prior(theirs[name], ours[name], recorder) for name in self.names}
        self.others = [name for name in self.names if self.priors[name] is None]
        self._find_own(
            [leaf for leaf in _leaves(torch.as_tensor(model_trace.log_prob_sum())) if all(leaf is not value for value in (*locs, *scales))]
        )
        self._own_names = [name for name in model_trace.param_nodes if name in pyro.get_param_store()]

    def _find_own(self, leaves: list[Tensor]) -> None:
        """Finds the model's own trainable tensors."""
        if any(all(leaf is not parameter for parameter in self.held) for leaf in leaves):
            raise NotTraceable("the model trains tensors that are not parameters of a torch.nn.Module")
        self.own = leaves

    def parameters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The guide's parameters, attached: site -> mean and standard deviation."""
        for name in self._own_names:  # SVI optimises the parameters that it sees being read
            pyro.param(name)
        return self.guide.parameters_by_site()

    # ------------------------------------------------------------------------------------------------- what is evaluated

    def gradient(self, values: Tensors, tensors: Tensors) -> Tensors:
        """The gradient of the negative log-likelihood with respect to unconstrained values, a tensor per site."""
        return self._run("gradient", [*values, *tensors])

    def loss_and_gradients(
        self, weights: TermWeights, locs: Tensors, scales: Tensors, noises: Tensors, adversary: MovedNoise | None, tensors: Tensors
    ) -> tuple[Tensor, Tensors]:
        """
        :param adversary: the moved draw, if there is one.
        :return: the weighted sum, and its gradients with respect to the means, the standard deviations, and :attr:`own`.
        """
        moved = [] if adversary is None else [*adversary.noises, *(adversary.shifts or ())]
        kind = "plain" if adversary is None else "noise" if adversary.shifts is None else "shift"
        loss, *gradients = self._run(kind, [*weights, *locs, *scales, *noises, *moved, *tensors])
        return loss, gradients

    def _run(self, kind: str, inputs: Tensors) -> Any:
        """Evaluates a graph, and compares it with the handlers on its first calls."""
        if self._compared.get(kind, 0) >= COMPARED:
            return self._graphs[kind](*inputs)
        with pyro.validation_enabled(False):  # validation reads values
            self._check(kind, inputs)
        self._compared[kind] = self._compared.get(kind, 0) + 1
        return self._graphs[kind](*inputs)

    def _check(self, kind: str, inputs: Tensors) -> None:
        function = self._gradient if kind == "gradient" else self._loss_and_gradients
        if kind not in self._graphs:
            try:
                self._graphs[kind] = trace_graph(function, inputs, self.held)
            except Exception as error:  # whatever a model's Python does under a tracer: the handlers still run it
                raise NotTraceable(f"it cannot be traced: {in_a_line(error)}") from error
            rest = len(inputs) - len(self.arguments.tensors)
            self._compare(kind, function, [*(t * 1.01 + 0.01 for t in inputs[:rest]), *inputs[rest:]])
        self._compare(kind, function, inputs)

    def _compare(self, kind: str, function: Callable[..., Any], inputs: Tensors) -> None:
        if not agree(self._graphs[kind](*inputs), function(*inputs)):
            raise NotTraceable(DIFFERS)

    # --------------------------------------------------------------------------------------------------- what is traced

    def _gradient(self, *inputs: Tensor) -> Tensors:
        count = len(self.names)

        with torch.enable_grad():
            values = [value.detach().requires_grad_() for value in inputs[:count]]
            nll = self._nll(self._pushed(values), inputs[count:])
            return torch.autograd.grad(nll, values, materialize_grads=True)

    def _loss_and_gradients(self, plain: Tensor, moved: Tensor, kl: Tensor, *inputs: Tensor) -> Tensors:
        count, rest = len(self.names), len(self.arguments.tensors)
        groups = [inputs[i : i + count] for i in range(0, len(inputs) - rest, count)]
        noises, tensors = groups[2], inputs[len(inputs) - rest :]
        with torch.enable_grad():
            locs, scales = ([value.detach().requires_grad_() for value in group] for group in groups[:2])
            nll, divergence = self._terms(locs, scales, noises, tensors)
            loss = plain * nll if divergence is None else plain * nll + kl * divergence
            if len(groups) > 3:
                values = MovedNoise(list(groups[3]), list(groups[4]) if len(groups) > 4 else None).values(locs, scales)
                loss = loss + moved * self._nll(self._pushed(values), tensors)
            gradients = list(torch.autograd.grad(loss, [*locs, *scales, *self.own], materialize_grads=True))
        divergences, loss = [], loss.detach()
        for i, name in enumerate(self.names):
            prior = self.priors[name]
            if prior is not None:
                loc, scale, of_loc, of_scale = groups[0][i], groups[1][i], gradients[i], gradients[count + i]
                value, gradients[i], gradients[count + i] = normal_divergence(loc, scale, prior, kl, of_loc, of_scale)
                divergences.append(value)
        return (loss + kl * sum(divergences) if divergences else loss, *gradients)

    def _pushed(self, values: Tensors) -> dict[str, Tensor]:
        """The sites' values, from unconstrained ones."""
        return {name: self.bases[name].value(value) for name, value in zip(self.names, values, strict=True)}

    def _nll(self, values: Mapping[str, Tensor], tensors: Tensors) -> Tensor:
        return -log_likelihood(self._model_trace(values, tensors))

    def _terms(self, locs: Tensors, scales: Tensors, noises: Tensors, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        """The plain draw's negative log-likelihood, and the divergence of the sites that are not in :attr:`priors`."""
        model_trace, guide_trace = self._traces(locs, scales, noises, tensors)
        ours, theirs = sites(guide_trace), sites(model_trace)
        divergences = [_divergence(ours[name], theirs[name]) for name in self.others]
        return -log_likelihood(model_trace), cast(Tensor, sum(divergences)) if divergences else None

    def _traces(self, locs: Tensors, scales: Tensors, noises: Tensors, tensors: Tensors) -> tuple[Trace, Trace]:
        """The trace of the model at these base noises, and the guide's of :attr:`others`, with log-densities."""
        args, kwargs = self.arguments.replace(tensors)
        values = {}
        with poutine.block(), pyro.validation_enabled(False), UnvalidatedMessenger():
            plates = self.guide.plates_of(*args, **kwargs)
            with poutine.trace() as guide_trace, BaseNoise({n: v for n, v in zip(self.names, noises, strict=True) if n in self.others}):
                for name, loc, scale, noise in zip(self.names, locs, scales, noises, strict=True):
                    alone = name not in self.others
                    values[name] = loc + noise * scale if alone else self.guide.sample(name, plates, (loc, scale))
        model_trace = self._model_trace(values, tensors)
        model_trace.compute_log_prob(lambda name, site: site["is_observed"] or name in self.others)
        guide_trace.trace.compute_log_prob()
        return model_trace, guide_trace.trace

    def _model_trace(self, values: Mapping[str, Tensor], tensors: Tensors) -> Trace:
        return run(self.model, self.arguments.replace(tensors), values, validated=False)


def normal_divergence(
    loc: Tensor, scale: Tensor, prior: NormalPrior, weight: Tensor, loc_gradient: Tensor, scale_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    The divergence of a Normal from a Normal prior,

    .. math:: \sum \tfrac12 \frac{(\mu - \mu_0)^2 + \sigma^2}{\sigma_0^2} - \log\frac{\sigma}{\sigma_0} - \tfrac12,

    and ``weight`` times its gradients, added to ``loc_gradient`` and ``scale_gradient``. Automatic differentiation takes twice as many
    passes over the weights.
    """
    away = loc if isinstance(prior.loc, float) and prior.loc == 0.0 else loc - prior.loc
    precision = prior.scale**-2
    constant: float | Tensor
    if isinstance(prior.scale, float):
        squares = (0.5 * precision) * (away.flatten().dot(away.flatten()) + scale.flatten().dot(scale.flatten()))
        constant = scale.numel() * (math.log(prior.scale) - 0.5)
    else:
        squares = 0.5 * (precision * (away.square() + scale.square())).sum()
        constant = prior.scale.log().sum() - 0.5 * scale.numel()
    value = squares - scale.log().sum() + constant
    pull = weight * precision
    return value, torch.addcmul(loc_gradient, away, pull), torch.addcmul(scale_gradient, scale, pull).addcdiv_(weight, scale, value=-1)


def _constant_prior(model_site: Node, guide_site: Node, recorder: Recorder) -> NormalPrior | None:
    """The prior, if both distributions are plain Normals and the prior depends on no other site, argument or buffer."""
    prior, posterior = (without_independent(site["fn"]) for site in (model_site, guide_site))
    weighted = any(
        site["mask"] is not None or not isinstance(site["scale"], float) or site["scale"] != 1 for site in (model_site, guide_site)
    )
    if weighted or not (isinstance(prior, Normal) and isinstance(posterior, Normal)):
        return None
    parameters = (prior.loc, prior.scale)
    if any(p.requires_grad or recorder.changes(p) or p.shape != posterior.loc.shape or p.dtype != posterior.loc.dtype for p in parameters):
        return None
    return NormalPrior(*(p.flatten()[0].item() if bool((p == p.flatten()[0]).all()) else p.detach() for p in parameters))


def _divergence(guide_site: Node, model_site: Node) -> Tensor:
    """The divergence of a site, as in Pyro's ``TraceMeanField_ELBO``: analytic where it is known, else estimated at the draw."""
    try:
        divergence = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return guide_site["log_prob_sum"] - model_site["log_prob_sum"]
    return scale_and_mask(divergence, scale=guide_site["scale"], mask=guide_site["mask"]).sum()


def _leaves(value: Tensor) -> list[Tensor]:
    """The leaf tensors on which a value depends."""
    seen, leaves, wanting = set(), [], [value.grad_fn]
    while wanting:
        node = wanting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        wanting.extend(following for following, _ in node.next_functions)
    return leaves


def check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    """:raises ValueError: unless the guide draws the model's latent sites, and the model observes something."""
    latents, drawn = latent_sites(model_trace), latent_sites(guide_trace)
    for name in drawn:
        if name not in model_trace.nodes:
            raise ValueError(
                f"site {name!r} is drawn by the guide and unknown to the model: the noise of an auxiliary site (AutoNormal has them) "
                "belongs to no site of the model; use AutoAdversarialNormal"
            )
        if name not in latents:
            raise ValueError(
                f"site {name!r} is observed, but the guide draws it: its first call came without observations; make a new guide"
            )
    for name in latents:
        if name not in drawn:
            raise ValueError(f"site {name!r} is neither observed nor in the guide: pass its observations, or give the guide this site")
    if not observed_sites(model_trace):
        raise ValueError("the model observes nothing, so that there is no likelihood to learn from: pass the observations, model(x, y)")
