"""A mean-field Normal guide whose base noise can be set and perturbed adversarially: :class:`AutoAdversarialNormal`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal, TransformedDistribution, Unit
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from pyro.nn.module import pyro_method
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, need_tensor
from pyro_advbayes.kinds import is_subsample, latent_sites, sample_sites
from pyro_advbayes.model.layers import kept_statistics, refuse_inference_mode
from pyro_advbayes.model.program import run
from pyro_advbayes.model.refusals import Given, Refused, bound_arguments, naming, refusing
from pyro_advbayes.model.structure import try_model
from pyro_advbayes.model.supports import map_onto

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class NoiseAscent:
    r"""
    The adversary of a draw :math:`u = \mu + \sigma\varepsilon` of a mean-field Normal (in unconstrained space). It takes ``num_steps``
    steps up the data's negative log-likelihood :math:`\ell`, on all sites together. Without a radius these are sign steps on the noise,

    .. math:: \varepsilon \leftarrow \varepsilon
        + \text{step\_size}\,\mathrm{sign}\bigl(\nabla_\varepsilon \ell(\mu + \sigma\varepsilon)\bigr),

    so that no component moves by more than ``num_steps * step_size`` standard deviations (Zhang et al., 2022). With a radius, in the units
    of the weights, these are steps of length ``step_size`` along the gradient, projected onto a ball around the draw,

    .. math:: \delta \leftarrow \Pi_{\|\delta\|_2 \le \text{radius}}\Bigl(\delta
        + \text{step\_size}\,\frac{\nabla_u \ell}{\|\nabla_u \ell\|_2}\Bigr), \qquad u = \mu + \sigma\varepsilon + \delta.

    Each draw moves by at most the radius, so that the law of the moved draws is within this Wasserstein distance, of any order, of the
    guide's, as in the paper's Eq. 1. (Orders below infinity also allow unequal budgets of draws.)

    :param int num_steps: N, >= 0.
    :param float step_size: > 0; by default 0.02, or 2.5 radius / num_steps.
    :param float radius: d, >= 0, or None for sign steps.
    :raises ValueError: naming the argument that is out of range.
    """

    num_steps: int = 5
    step_size: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        check_int(self.num_steps, "num_steps", 0, "the number of steps against the data")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"step_size={self.step_size!r}: the length of a step, > 0")
        if self.radius is not None and not 0 <= self.radius < float("inf"):
            raise ValueError(f"radius={self.radius!r}: how far a draw may be moved, >= 0, or None for sign steps")

    @property
    def moves(self) -> bool:
        """Whether the adversary can move at all."""
        return self.num_steps > 0 and self.radius != 0

    def run(self, locs: Tensors, scales: Tensors, noises: Tensors, gradient: Callable[[list[Tensor]], Tensors]) -> MovedNoise:
        """
        :param locs: the means, a tensor per site, detached; likewise ``scales`` and ``noises``, which do not change.
        :param gradient: of the negative log-likelihood at unconstrained values.
        :raises RuntimeError: under ``torch.inference_mode``, unless the adversary cannot move.
        """
        if self.moves:
            refuse_inference_mode("the adversary")
        noises = [noise.clone() for noise in noises]
        radius, step_size = self.radius, self._step_size()
        shifts = None if radius is None else [torch.zeros_like(noise) for noise in noises]
        for _ in range(self.num_steps if self.moves else 0):
            gradients = gradient(_values(locs, scales, noises, shifts))
            if shifts is None or radius is None:
                for noise, g in zip(noises, gradients, strict=True):
                    noise.add_(g.sign(), alpha=step_size)
            else:
                _step_in_ball(shifts, gradients, step_size, radius)
        return MovedNoise(noises, shifts)

    def _step_size(self) -> float:
        if self.step_size is not None:
            return self.step_size
        return 0.02 if self.radius is None else 2.5 * self.radius / max(1, self.num_steps)


@dataclass(frozen=True)
class MovedNoise:
    """
    The result of :class:`NoiseAscent`: noise and shift in :math:`u = \\mu + \\sigma\\varepsilon + \\delta`, a tensor per site, constants
    for the gradients of the parameters. ``shifts`` is None if only the noise was moved.
    """

    noises: list[Tensor]
    shifts: list[Tensor] | None

    def values(self, locs: Tensors, scales: Tensors) -> list[Tensor]:
        """Unconstrained values, attached to means and scales."""
        return _values(locs, scales, self.noises, self.shifts)


def _values(locs: Tensors, scales: Tensors, noises: Tensors, shifts: Tensors | None) -> list[Tensor]:
    values = [loc + noise * scale for loc, scale, noise in zip(locs, scales, noises, strict=True)]
    return values if shifts is None else [value + shift for value, shift in zip(values, shifts, strict=True)]


def _step_in_ball(shifts: Tensors, gradients: Tensors, step_size: float, radius: float) -> None:
    norm = joint_norm(gradients)
    along = torch.where(norm > 0, step_size / norm, torch.zeros_like(norm))  # a gradient of 0 has no direction
    for shift, g in zip(shifts, gradients, strict=True):
        shift.add_(g * along)
    inside = (radius / joint_norm(shifts)).clamp(max=1.0)
    for shift in shifts:
        shift.mul_(inside)


def joint_norm(parts: Tensors) -> Tensor:
    """The Euclidean norm of several tensors as one vector."""
    return torch.stack([part.norm() for part in parts]).norm()


class BaseNormal:
    """
    The base Normal of a site's distribution, and the transforms from its values to the site's.

    :param str name: the site.
    :param fn: a Normal, possibly transformed, with any event dimensions.
    :raises ValueError: if it is another distribution.
    """

    def __init__(self, name: str, fn: Distribution) -> None:
        self.transforms: list[Transform] = []
        found = fn
        while not isinstance(found, torch.distributions.Normal):
            if isinstance(found, torch.distributions.TransformedDistribution):
                self.transforms = [*found.transforms, *self.transforms]
            elif not isinstance(found, Independent):
                raise ValueError(
                    f"site {name!r}: the guide draws it from {type(found).__name__}, which has no Normal base noise that could be "
                    "moved: use AutoAdversarialNormal, or draw the site from a Normal (or a TransformedDistribution of one)"
                )
            found = found.base_dist
        self.loc, self.scale = found.loc, found.scale

    def value(self, unconstrained: Tensor) -> Tensor:
        """The site's value at a value of the Normal."""
        for transform in self.transforms:
            unconstrained = transform(unconstrained)
        return unconstrained


@checked
class BaseNoise(Messenger):
    r"""
    An effect handler that sets the base noise of a guide's sites, :math:`\theta = T(\mu + \sigma\varepsilon)`. ::

        with BaseNoise({"net.0.weight": torch.zeros(20, 2)}):  # the other sites draw theirs as usual
            guide(x, y)

    :param dict noise: site -> :math:`\varepsilon`, of the shape of the site in unconstrained space.
    :raises ValueError: for noise that is no tensor; at a site whose noise has another shape, or that is not drawn from a Normal; at the
        end, if sites were drawn and none has a name that was given.
    """

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not isinstance(noise, Mapping):
            raise ValueError(f"noise is a {type(noise).__name__}: a dict of noise by site is needed")
        for name, value in noise.items():
            need_tensor(value, f"noise[{name!r}]")
        self.noise = noise
        self._met: dict[str, None] = {}

    def __enter__(self) -> BaseNoise:
        self._met = {}
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        strange = [name for name in self.noise if name not in self._met]
        if kind is None and self._met and strange:
            met = ", ".join(map(repr, self._met))
            raise ValueError(f"noise: {strange[0]!r} is no site that was drawn, of {met}: give it the name of one, or leave it out")

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if not is_subsample(msg):
            self._met[name] = None
        if name not in self.noise or msg["is_observed"]:
            return
        with refusing():
            base, noise = BaseNormal(name, msg["fn"]), self.noise[name]
        if noise.shape != base.loc.shape:
            raise Refused(f"site {name!r}: the noise has shape {tuple(noise.shape)}, the site {tuple(base.loc.shape)} before transforms")
        msg["value"] = base.value(base.loc + noise * base.scale)
        msg["done"] = True


@checked
class AutoAdversarialNormal(AutoNormal):
    r"""
    A mean-field Normal guide in unconstrained space,

    .. math:: \theta_s = T_s(\mu_s + \sigma_s\varepsilon_s), \qquad \varepsilon_s \sim \mathrm{Normal}(0, 1),

    whose base noise :math:`\varepsilon` is accessible: :meth:`noise` draws it, :class:`BaseNoise` sets it, and
    :class:`~pyro_advbayes.TraceAdversarial_ELBO` perturbs it adversarially. ::

        guide = AutoAdversarialNormal(model, init_loc_fn=init_to_value(values=pretrained), init_scale=1e-2)
        svi = SVI(ab.minibatch(model, size=len(x)), guide, ClippedAdam({"lr": 1e-3}), TraceAdversarial_ELBO())

    Arguments, parameters (``locs``, ``scales``), ``median`` and ``quantiles`` are those of Pyro's ``AutoNormal``. Unlike there, each site
    is drawn under its own name from a Normal or a TransformedDistribution of one, without an auxiliary site and a Delta. So the
    Kullback-Leibler divergence from the prior is right under both ``Trace_ELBO`` and ``TraceMeanField_ELBO``, and analytic where the pair
    of distributions allows.

    Sites and shapes are found at the first call, which must include the observations: without them a model's observed site would be latent.
    Such a call is refused, as is a first call from ``Predictive``.

    :param model: a Pyro model.
    :param init_loc_fn: a per-site function as in ``pyro.infer.autoguide.initialization``.
    :param float init_scale: the standard deviations at the start, in unconstrained space, > 0.
    :param create_plates: as in ``AutoNormal``.
    :raises ValueError: at the first call, naming the site, if an observed site would become latent.
    """

    def __init__(
        self,
        model: Callable,
        *,
        init_loc_fn: Callable = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, init_scale=init_scale, create_plates=create_plates)
        self._given_model = (model,)  # in a tuple, since the model is no part of the guide

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given_model": None}  # as Pyro's guides do: what a guide knows of its model is the prototype

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._given_model is not None:
            with refusing():
                _check_observations(self._given_model[0], args, kwargs)
        given = Given(self.model, args, kwargs)
        with naming(lambda values: try_model(self.model, *given.call(values)), given.values):
            super()._setup_prototype(*args, **kwargs)
        for loc in self.locs.parameters():  # training must not write into the tensors of init_loc_fn, e.g. those of a trained network
            loc.data = loc.data.clone()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Draws every site.

        :return: site -> value.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self.plates_of(*args, **kwargs)
        return {name: self.sample(name, plates) for name in self._prototype.stochastic_nodes}

    def plates_of(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """The plates of a call with these arguments of the model, by name."""
        return self._create_plates(*args, **kwargs)

    @property
    def _prototype(self) -> Trace:
        """The model's run at the first call."""
        if self.prototype_trace is None:
            raise RuntimeError("the guide has not been called yet, and does not know its sites: call it with the model's arguments")
        return self.prototype_trace

    @pyro_method
    def parameters_by_site(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Site -> mean and standard deviation, in unconstrained space, attached to the guide's parameters."""
        return {name: self._get_loc_and_scale(name) for name in self._prototype.stochastic_nodes}

    def sample(self, name: str, plates: Mapping[str, Any], parameters: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Draws a site in its plates, from its own parameters or from a given mean and standard deviation."""
        site = sample_sites(self._prototype)[name]
        with ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            loc, scale = self._get_loc_and_scale(name) if parameters is None else parameters  # a plate takes its rows of them
            return pyro.sample(name, _transformed(Normal(loc, scale), map_onto(name, site["fn"]), self._event_dims[name]))

    @torch.no_grad()
    def noise(self) -> dict[str, Tensor]:
        """New base noise for all sites, in the order in which the guide draws them."""
        return {name: torch.randn_like(loc) for name, (loc, _) in self.parameters_by_site().items()}


def _transformed(base: Normal, transform: Transform, event_dim: int) -> TorchDistributionMixin:
    """``base`` pushed through ``transform``, in the form of the usual priors, so that more divergences are analytic."""
    parts = _parts(transform)
    if not parts:
        return base.to_event(event_dim)
    inner = ComposeTransform(parts).domain.event_dim
    # cached, so that the density at a draw does not use the inverse
    return TransformedDistribution(base.to_event(inner), [part.with_cache() for part in parts]).to_event(event_dim - inner)


def _parts(transform: Transform) -> list[Transform]:
    """The elementary transforms of a transform, without identities, such as the affine part of PyTorch's map to positive numbers."""
    if isinstance(transform, IndependentTransform):
        return _parts(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return [part for each in transform.parts for part in _parts(each)]
    if isinstance(transform, AffineTransform) and all(isinstance(v, (int, float)) for v in (transform.loc, transform.scale)):
        return [] if (transform.loc, transform.scale) == (0, 1) else [transform]
    return [transform]


def _check_observations(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """:raises ValueError: if a call lacks observations, so that observed sites would become latent."""
    if poutine.get_mask() is False:
        raise ValueError(
            "the guide has not been called yet, and a prediction cannot tell it which sites are latent: call it with observations first, "
            "guide(x, y), or train it"
        )
    call = bound_arguments(model, args, kwargs)
    if call is None:
        return
    missing = [name for name, p in call.signature.parameters.items() if call.arguments.get(name, p.default) is None]
    trace = _traced(model, args, kwargs) if missing else Trace()
    if any(not isinstance(trace.nodes[site]["fn"], Unit) for site in trace.observation_nodes):
        return  # the other observations are left out on purpose
    latents = latent_sites(trace)
    for name in missing:
        call.arguments[name] = torch.zeros(())
        # a site that any value of the argument makes observed is no latent site
        try:
            found = latents.keys() - latent_sites(_traced(model, call.args, call.kwargs)).keys()
        except Exception:  # whatever a model's Python does with such a value
            found = {site for site, node in latents.items() if any(frame.vectorized for frame in node["cond_indep_stack"])}
        call.arguments[name] = None
        if found:
            raise ValueError(
                f"site {min(found)!r} would become a latent site, since the guide's first call came without argument {name!r}: call it "
                "with observations first, as in training"
            )


def _traced(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    return run(model, (args, kwargs), None, torch.no_grad(), kept_statistics())
