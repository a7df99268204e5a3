"""Adversarial Sampling, variational inference against the worst draws near the posterior: :class:`TraceAdversarial_ELBO`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import Distribution

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int
from pyro_advbayes.infer.autoguide.adversarial import BaseNormal, MovedNoise, NoiseAscent, joint_norm
from pyro_advbayes.infer.elbo.objective import Graphs, NotTraceable, Objective, TermWeights, check_sites, tensors_of
from pyro_advbayes.kinds import Node, is_subsample, latent_sites, without_independent
from pyro_advbayes.model.layers import kept_statistics
from pyro_advbayes.model.program import log_likelihood, run
from pyro_advbayes.tracing.guard import RandomState

Particle = tuple[Tensor, list[Tensor], Sequence[Tensor]]  # its share of the loss, the parameters, and their gradients


class Moved(NamedTuple):
    """
    How far an adversary moved the draws of a loss, ``[particles]`` each.

    :ivar noise: the largest change of a component of the base noise, in standard deviations.
    :ivar distance: the Euclidean distance of all sites together, in unconstrained space.
    """

    noise: Tensor
    distance: Tensor


@checked
class TraceAdversarial_ELBO(TraceMeanField_ELBO):
    r"""
    Adversarial sampling: Pyro's mean-field ELBO at the worst draws of the weights near the guide's
    (:class:`~pyro_advbayes.TraceRobust_ELBO` perturbs inputs). With a guide :math:`q` and the data's negative log-likelihood :math:`\ell`,

    .. math:: \mathcal{L} = (1 - \text{mix})\,\mathbb{E}_{\varepsilon}\bigl[\ell(\theta(\varepsilon))\bigr]
        + \text{mix}\,\mathbb{E}_{\varepsilon}\bigl[\ell(\theta_\mathrm{adv}(\varepsilon))\bigr]
        + \text{kl\_scale}\,\mathrm{KL}(q \,\|\, p),

    where :math:`\theta_\mathrm{adv}` is a draw that :class:`~pyro_advbayes.infer.autoguide.adversarial.NoiseAscent` has moved against
    the same data. ::

        svi = SVI(ab.minibatch(model, size=50_000), guide, ClippedAdam({"lr": 1e-3}), loss=TraceAdversarial_ELBO(mix=0.8))

    ``TraceAdversarial_ELBO(mix=0.8)(model, guide)`` is a module that gives the loss of a batch, for ``torch.optim`` and Lightning (whose
    ``validate`` is without gradients unless told otherwise: ``Trainer(inference_mode=False)``).

    Where nothing is moved (``mix=0``, ``num_steps=0`` or ``radius=0``) the adversary's pass is left out, and loss and gradients are
    those of ``TraceMeanField_ELBO``: through Pyro's handlers to the last bit, from graphs to rounding. Otherwise the plain draw comes
    first, and the adversary starts from another one. Its steps leave running statistics (BatchNorm in training mode) as they are:
    only the plain draw updates them.

    The divergence is analytic where PyTorch or Pyro knows it for the pair of distributions, and estimated at the plain draw elsewhere;
    it counts every weight as often as the model has it, in nats over the whole data set, so scale minibatches:
    :func:`~pyro_advbayes.minibatch`.

    Source: Zhang et al., Improving Bayesian neural networks by adversarial sampling, AAAI 2022, Eq. 1 to 3. The authors' code divides
    all by N and weights the divergence by (1 - mix)/100, which is ``kl_in_mix=True, kl_scale=0.01`` here: a cold posterior.
    ``kl_in_mix`` lowers the divergence, which has an effect of its own: to isolate the adversary's effect, compare with ``mix=0`` and
    ``kl_scale`` times 1 - mix.

    :param int num_steps: N, the adversary's steps, >= 0.
    :param float step_size: length of a step, > 0, in standard deviations, 0.02 by default; with ``radius``, in the weights' units.
    :param float mix: the weight of the moved draws, in [0, 1]; near 1 the plain draws hardly count.
    :param float kl_scale: >= 0; 1 is Bayes' rule, less is a cold posterior.
    :param int num_particles: draws of each kind per loss, >= 1.
    :param float radius: d, >= 0, for steps along the gradient within a Wasserstein distance; None for sign steps.
    :param bool kl_in_mix: whether the divergence is weighted by 1 - mix, too.
    :param str backend: ``"graph"`` traces a model and a guide into a graph at the first call with arguments of these shapes, and checks it
        on its first calls. Numbers that the model holds must not change afterwards. ``"handlers"`` runs instead, with one warning that
        says why, for any guide but ``AutoAdversarialNormal``, for a model with layers in training mode or a ``pyro.param``, and for one
        that cannot be traced.
    :raises ValueError: naming an argument out of range; and at the first call, naming the site, if a site of the guide is not drawn from
        Normal base noise or is missing in the model (or the reverse), or the model observes nothing.
    :raises RuntimeError: under ``torch.inference_mode``, where no adversary can move.

    :ivar Moved moved: how far the draws of the last loss were moved; None if they were not.
    """

    def __init__(
        self,
        num_steps: int = 5,
        step_size: float | None = None,
        mix: float = 0.8,
        kl_scale: float = 1.0,
        num_particles: int = 1,
        *,
        radius: float | None = None,
        kl_in_mix: bool = False,
        backend: str = "graph",
    ) -> None:
        self.ascent = NoiseAscent(num_steps, step_size, radius)
        if backend not in ("handlers", "graph"):
            raise ValueError(f"backend={backend!r}: choose 'handlers' or 'graph'")
        if not 0 <= mix <= 1:
            raise ValueError(f"mix={mix!r}: the weight of the moved draws, from 0 to 1")
        if not 0 <= kl_scale < float("inf"):
            raise ValueError(f"kl_scale={kl_scale!r}: the weight of the divergence from the prior, >= 0")
        super().__init__(num_particles=check_int(num_particles, "num_particles", 1, "the number of draws per loss"))
        self.mix, self.kl_scale, self.kl_in_mix = mix, kl_scale, kl_in_mix
        self._graphs = Graphs() if backend == "graph" else None
        self._moves: list[tuple[Tensor, Tensor]] = []

    @property
    def _weights(self) -> tuple[float, float, float]:
        """The weights of the plain draw's likelihood, the moved draw's, and the divergence."""
        moved = self.mix if self.ascent.moves else 0.0
        return 1 - moved, moved, self.kl_scale * (1 - self.mix) if self.kl_in_mix else self.kl_scale

    @property
    def moved(self) -> Moved | None:
        """How far the last loss's draws were moved."""
        return Moved(*(torch.stack(part) for part in zip(*self._moves, strict=True))) if self._moves else None

    def _get_traces(
        self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[Trace, Trace]]:
        self._moves = []
        return super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
        """Pyro's two traces, with weighted terms. The observed sites at a moved draw are added to the model's trace."""
        plain, moved, kl = self._weights
        weigh = _Weights(plain, kl)
        model_trace, guide_trace = super()._get_trace(weigh(model), weigh(guide), args, kwargs)
        draw = Draw(model_trace, guide_trace)
        if moved > 0:
            likelihood = ObservedSites(model, args, kwargs, weigh.rows)
            adversary = draw.adversary(self.ascent, likelihood)
            self._moves.append(distances(adversary, draw.noises, draw.scales))
            trace = likelihood.trace(draw.values(adversary.values(draw.locs, draw.scales)), moved)
            for name in trace.observation_nodes:
                model_trace.add_node(f"{name} (adversarial)", **trace.nodes[name])
        return model_trace, guide_trace

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss, after a backward pass."""
        particles = self._by_graph(model, guide, args, kwargs)
        if particles is None:
            return super().loss_and_grads(model, guide, *args, **kwargs)
        for _, parameters, gradients in particles:
            learnt = [(parameter, g) for parameter, g in zip(parameters, gradients, strict=True) if parameter.requires_grad]
            if learnt:
                torch.autograd.backward([parameter for parameter, _ in learnt], [gradient for _, gradient in learnt])
        loss = sum(value.item() for value, _, _ in particles)
        warn_if_nan(torch.tensor(loss), "loss")
        return loss

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, attached to the parameters; what ``TraceAdversarial_ELBO(...)(model, guide)`` returns when it is called."""
        particles = self._by_graph(model, guide, args, kwargs) if torch.is_grad_enabled() else None
        if particles is None:
            return super().differentiable_loss(model, guide, *args, **kwargs)
        return sum(_Attached.apply(value, gradients, *parameters) for value, parameters, gradients in particles)

    def _by_graph(self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Particle] | None:
        """Each particle's share of the loss, the tensors it depends on, and its gradients; None if there is no graph."""
        graphs = self._graphs
        objective = None if graphs is None else graphs.get(model, guide, args, kwargs)
        if graphs is None or objective is None:
            return None
        self._moves, state = [], RandomState()
        try:
            return [self._particle(objective, args, kwargs) for _ in range(self.num_particles)]
        except NotTraceable as error:
            graphs.drop(objective, error)
            state.restore()
            return None

    def _particle(self, objective: Objective, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Particle:
        parameters = list(zip(*objective.parameters().values(), strict=True))
        tensors = tensors_of(args, kwargs)
        with torch.no_grad():
            locs, scales = ([value.detach() for value in values] for values in parameters)
            noises = [torch.randn_like(loc) for loc in locs]
            adversary = None
            if self._weights[1] > 0:
                start = [torch.randn_like(loc) for loc in locs]
                adversary = self.ascent.run(locs, scales, start, lambda values: objective.gradient(values, tensors))
                self._moves.append(distances(adversary, start, scales))
            weights = TermWeights(*(locs[0].new_tensor(weight / self.num_particles) for weight in self._weights))
            value, gradients = objective.loss_and_gradients(weights, locs, scales, noises, adversary, tensors)
        return value, [*parameters[0], *parameters[1], *objective.own], gradients

    def adversarial_draw(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        A draw from the guide that was moved against the model's data.

        :return: site -> value, detached.
        """
        with torch.no_grad():
            weigh = _Weights(1.0, 1.0)
            draw = Draw(*super()._get_trace(weigh(model), guide, args, kwargs))
            adversary = draw.adversary(self.ascent, ObservedSites(model, args, kwargs, weigh.rows))
            self._moves = [distances(adversary, draw.noises, draw.scales)]
            return draw.values(adversary.values(draw.locs, draw.scales))


class Draw:
    """
    A guide's draw as a function of base noise. Sites that are point masses stay fixed.

    :raises ValueError: naming a site without Normal base noise, or one that only the guide or only the model has.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace) -> None:
        check_sites(model_trace, guide_trace)
        self.bases: dict[str, BaseNormal] = {}
        self.fixed: dict[str, Tensor] = {}
        for name, node in latent_sites(guide_trace).items():
            if _is_point(node["fn"]):
                self.fixed[name] = node["value"]
            else:
                self.bases[name] = BaseNormal(name, node["fn"])
        if not self.bases:
            raise ValueError("the guide has no site with Normal base noise that could be moved: use AutoAdversarialNormal")
        self.locs = [base.loc for base in self.bases.values()]
        self.scales = [base.scale for base in self.bases.values()]

    def values(self, unconstrained: Sequence[Tensor]) -> dict[str, Tensor]:
        """All sites' values, from those of the Normals."""
        return {**self.fixed, **{name: self.bases[name].value(u) for name, u in zip(self.bases, unconstrained, strict=True)}}

    def adversary(self, ascent: NoiseAscent, likelihood: ObservedSites) -> MovedNoise:
        """Draws base noise, site by site, and moves it."""
        locs, scales = ([value.detach() for value in values] for values in (self.locs, self.scales))
        self.noises = [torch.randn_like(loc) for loc in locs]

        def gradient(values: list[Tensor]) -> Sequence[Tensor]:
            with torch.enable_grad(), pyro.validation_enabled(False):
                values = [value.requires_grad_() for value in values]
                loss = likelihood.loss(self.values(values))
                gradients = torch.autograd.grad(loss, values, allow_unused=True) if loss.requires_grad else [None] * len(values)
            return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)]

        with torch.no_grad():
            return ascent.run(locs, scales, self.noises, gradient)


@torch.no_grad()
def distances(adversary: MovedNoise, start: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How far an adversary moved from its first noise, in noise and in distance, as in :class:`Moved`."""
    if adversary.shifts is None:
        noises = [moved - noise for moved, noise in zip(adversary.noises, start, strict=True)]
        shifts = [noise * scale for noise, scale in zip(noises, scales, strict=True)]
    else:
        shifts = adversary.shifts
        noises = [shift / scale for shift, scale in zip(shifts, scales, strict=True)]
    return torch.stack([noise.abs().max() for noise in noises]).max(), joint_norm(shifts)


class _Attached(torch.autograd.Function):
    """A number whose gradients with respect to ``parameters`` are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * outer for gradient in ctx.gradients)


class ObservedSites:
    """
    A model's observed sites as a function of its latent ones.

    :param rows: plate -> its indices, for plates that subsample themselves.
    """

    def __init__(self, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        self.model, self.args, self.kwargs, self.rows = model, args, kwargs, rows

    def trace(self, values: Mapping[str, Tensor], weight: float = 1.0) -> Trace:
        """The model's trace at other values of its latent sites; running statistics stay as they are."""
        handlers = kept_statistics(), _Weights(weight, 1.0)
        trace = run(self.model, (self.args, self.kwargs), {**self.rows, **values}, *handlers, hidden=False)
        trace.compute_log_prob(lambda name, site: site["is_observed"])
        return trace

    def loss(self, values: Mapping[str, Tensor]) -> Tensor:
        """The negative log-likelihood."""
        return -log_likelihood(self.trace(values))


class _Weights(Messenger):
    """Weights observed and latent sites by a number each, and notes the row indices of plates."""

    def __init__(self, observed: float, latent: float) -> None:
        super().__init__()
        self.observed, self.latent = observed, latent
        self.rows: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Node) -> None:
        if not is_subsample(msg):
            msg["scale"] = msg["scale"] * (self.observed if msg["is_observed"] else self.latent)

    def _pyro_post_sample(self, msg: Node) -> None:
        if is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]


def _is_point(fn: Distribution) -> bool:
    return isinstance(without_independent(fn), pyro.distributions.Delta)
