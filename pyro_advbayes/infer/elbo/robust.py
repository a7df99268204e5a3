"""Adversarial training in Pyro's own SVI: :class:`TraceRobust_ELBO`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO, Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

from pyro_advbayes.attacks.base import Attack
from pyro_advbayes.checked import checked
from pyro_advbayes.given import is_array, need_tensor
from pyro_advbayes.kinds import Node, is_deterministic, sites
from pyro_advbayes.model.batches import Arguments
from pyro_advbayes.model.outcomes import without_wrappers
from pyro_advbayes.model.program import Call, Values, run
from pyro_advbayes.model.refusals import Given, refusing

_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class _Elbo(Protocol):
    """Methods that every ELBO of Pyro has, and that their base class does not declare."""

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float: ...
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor: ...
    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float: ...
    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Trace, Trace]: ...


@checked
class TraceRobust_ELBO(ELBO):
    r"""
    Adversarial training: Pyro's ELBO at inputs that an attack has perturbed (:class:`~pyro_advbayes.TraceAdversarial_ELBO` perturbs
    weights). With the guide :math:`q`,

    .. math:: \mathcal{L} = \mathbb{E}_{\theta \sim q}\Bigl[ \log p(\theta) - \log q(\theta)
        + \sum_i \log p(y_i \mid \tilde x_i(\theta), \theta) \Bigr], \qquad
        \tilde x_i(\theta) \approx \arg\max_{\tilde x \in B(x_i)} -\log p(y_i \mid \tilde x, \theta),

    where the attack defines the ball :math:`B` and the search for the maximum. ::

        svi = SVI(minibatch(model, size=len(x)), guide, optim, loss=TraceRobust_ELBO(PGD(eps=0.1)))

    The adversary sees the weights of the loss: each particle draws once from the guide, is attacked, and is scored on its own
    perturbed inputs, so that this is a lower bound of the ELBO against one adversary for all draws. With
    ``AutoDelta`` it is adversarial training of a point estimate (Madry et al., 2018; WRM with the attack of that name; Dong et al.,
    2020, with ``AdversarialDistribution``), with ``AutoNormal`` that of a mean-field posterior (Liu et al., Adv-BNN, 2019).

    The attack ascends the negative log-likelihood of the model's observed sites, summed over sites, per row, without the scale of
    :func:`~pyro_advbayes.minibatch` or ``poutine.scale``; masks hold. The attack takes no gradients of parameters, runs an ``nn.Module`` in
    eval mode, and leaves nothing in a trace or in the parameter store. With an attack that moves no inputs and draws no random numbers,
    loss and gradients are those of ``elbo`` to the last bit.

    :param attack: an attack of :mod:`pyro_advbayes.attacks` that needs only a loss: FGSM, PGD, WRM and others.
    :param str perturb: name of the model's argument that is perturbed, a tensor of floating type with a row per data point.
    :param ELBO elbo: the ELBO that is evaluated on perturbed inputs; ``Trace_ELBO()`` by default.
    :raises ValueError: if ``attack`` or ``elbo`` is not of this kind; and at the first call, naming the argument or the site, if the
        model was not given ``perturb`` as such a tensor, or it lies outside the attack's range; if an observed site is not Categorical,
        Bernoulli or Normal, or not in a plate of as many rows; if a latent site of the model is missing in the guide.
    :raises RuntimeError: under ``torch.inference_mode``, where attacks have no gradients.
    """

    def __init__(self, attack: Attack, perturb: str = "x", elbo: ELBO | None = None) -> None:
        elbo = Trace_ELBO() if elbo is None else elbo
        if not isinstance(attack, Attack):
            raise ValueError(f"attack must be an attack of pyro_advbayes.attacks that raises any loss, PGD(eps=0.1) say; got {attack!r}")
        attack.check_for_loss()
        if not isinstance(elbo, ELBO) or isinstance(elbo, (*_JIT, TraceRobust_ELBO)):
            raise ValueError(
                f"elbo must be an instance of one of Pyro's ELBOs, Trace_ELBO() say, not compiled (Jit...): a recording would keep the "
                f"first batch's perturbation; got {elbo!r}"
            )
        if elbo.vectorize_particles and elbo.num_particles > 1:
            raise ValueError("elbo: every particle is attacked by itself: leave vectorize_particles=False")
        super().__init__(num_particles=elbo.num_particles, max_plate_nesting=elbo.max_plate_nesting)
        self.attack, self.perturb, self.elbo = attack, perturb, cast(_Elbo, elbo)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO on perturbed inputs, in nats."""
        return self.elbo.loss(*self._attacked(model, guide, args, kwargs), *args, **kwargs)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The same, with the gradients of its surrogate; what ``TraceRobust_ELBO(...)(model, guide)`` returns when it is called."""
        return self.elbo.differentiable_loss(*self._attacked(model, guide, args, kwargs), *args, **kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The negative ELBO on perturbed inputs, in nats, after a backward pass."""
        return self.elbo.loss_and_grads(*self._attacked(model, guide, args, kwargs), *args, **kwargs)

    def _get_trace(self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
        return self.elbo._get_trace(*self._attacked(model, guide, args, kwargs), args, kwargs)

    def _attacked(self, model: Callable, guide: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Callable, Callable]:
        """Model and guide, such that the model perturbs its inputs against the guide's latest draw before it runs."""
        if isinstance(poutine.unwrap(guide), Messenger):
            raise ValueError("guide is an effect handler, which draws while the model runs: take an autoguide, or a function")
        _inputs(model, args, kwargs, self.perturb)  # before the guide fails at them
        draw: Values = {}

        def seen_guide(*args: Any, **kwargs: Any) -> Any:
            nonlocal draw
            with poutine.trace() as seen:
                result = guide(*args, **kwargs)
            nodes = {name: node["value"] for name, node in seen.trace.nodes.items() if node["type"] == "sample"}
            draw = {name: value.detach() for name, value in nodes.items() if value is not None}
            return result

        def attacked_model(*args: Any, **kwargs: Any) -> Any:
            with refusing():
                moved, others = self._perturbed(model, draw, args, kwargs)
            return model(*moved, **others)

        return attacked_model, seen_guide

    def _perturbed(self, model: Callable, draw: Values, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The arguments, with perturbed inputs."""
        arguments, place = _inputs(model, args, kwargs, self.perturb)
        validate = is_validation_enabled()

        def with_inputs(value: Tensor) -> Call:
            tensors = arguments.tensors
            tensors[place] = value
            return arguments.replace(tensors)

        def loss(value: Tensor) -> Tensor:
            nonlocal validate
            with poutine.block(), pyro.validation_enabled(validate):
                validate = False  # one check of the values is enough
                return _row_losses(run(model, with_inputs(value), draw), draw, len(value))

        with _eval_mode(poutine.unwrap(model)):
            return with_inputs(self.attack.on_loss(loss, arguments.tensors[place]))


def _inputs(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], perturb: str) -> tuple[Arguments, int]:
    """The model's arguments, and the place of the inputs among their tensors."""
    model = poutine.unwrap(model)
    arguments, given = Arguments(model, args, kwargs), Given(model, args, kwargs).values
    if is_array(given.get(perturb)):
        need_tensor(given[perturb], perturb, inputs=True)
    if perturb not in arguments.labels:
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(
            f"perturb={perturb!r} is not a tensor argument that the model was called with: those of {name} are "
            f"{', '.join(map(repr, arguments.labels)) or 'none'}"
        )
    place = arguments.labels.index(perturb)
    x = arguments.tensors[place]
    if not x.is_floating_point() or x.dim() == 0 or len(x) == 0:
        raise ValueError(
            f"perturb={perturb!r}: the argument must be a tensor of floating type with a row per data point, not {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    return arguments, place


def _row_losses(trace: Trace, draw: Values, rows: int) -> Tensor:
    """The negative log-likelihood of every row, ``[rows]``, unscaled."""
    losses = []
    for name, site in sites(trace).items():
        if is_deterministic(site):
            continue
        if site["is_observed"]:
            losses.append(-_row_log_probs(name, site, rows))
        elif name not in draw:
            raise ValueError(
                f"site {name!r} is neither observed nor in the guide, so that there is no fixed loss to ascend: pass its observations, "
                "or give the guide this site"
            )
    if not losses:
        raise ValueError("the model has no observed site whose likelihood an adversary could lower")
    return torch.stack(losses).sum(0)


def _row_log_probs(name: str, site: Node, rows: int) -> Tensor:
    fn = without_wrappers(site["fn"])
    if not isinstance(fn, (Bernoulli, Categorical, Normal)):
        raise ValueError(
            f"observed site {name!r} is {type(fn).__name__}: adversarial training is for Categorical, Bernoulli and Normal observations"
        )
    dims = [frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None and frame.size == rows]
    if len(dims) != 1:
        sizes = ", ".join(f"{frame.name!r} of {frame.size}" for frame in site["cond_indep_stack"]) or "none"
        raise ValueError(
            f"observed site {name!r} must be in one plate of {rows} rows, as many as the perturbed inputs have (its plates: {sizes}); "
            "instead of a plate that subsamples itself, pass minibatches and scale them with minibatch(model, size)"
        )
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    return log_prob.movedim(dims[0], 0).reshape(rows, -1).sum(-1)


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Within it, the layers of a network are in eval mode."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
