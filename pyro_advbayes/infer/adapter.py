"""Variational inference from a trained network: :func:`bayes_adapter`."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer import ELBO
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, warn
from pyro_advbayes.handlers import CoveredMessenger
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO
from pyro_advbayes.kinds import latent_sites
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.layers import kept_statistics, refuse_random_layers
from pyro_advbayes.model.loader import Loader
from pyro_advbayes.model.notices import never_seen_data, statistics_message
from pyro_advbayes.model.outcomes import Origins
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.model.program import run
from pyro_advbayes.model.readout import Readout
from pyro_advbayes.model.refusals import Given, check_number, told
from pyro_advbayes.model.scale import minibatch
from pyro_advbayes.model.structure import prior_factors, try_model
from pyro_advbayes.nn import Classifier, bayesianize
from pyro_advbayes.nn.bayesian import declared_sites, own_names, rename
from pyro_advbayes.tracing.guard import RandomState

Pretrained = nn.Module | Mapping[str, Tensor]
Groups = list[dict[str, Any]]

_COUNT = itertools.count()


@checked
def weight_decay_prior(weight_decay: float, num_data: int) -> Normal:
    r"""
    The prior under which a MAP estimate is what training with weight decay minimises, the mean loss of N data points and
    :math:`\tfrac12 \text{weight\_decay}\,\|w\|^2`:

    .. math:: w \sim \mathrm{Normal}\bigl(0, (N\,\text{weight\_decay})^{-1/2}\bigr).

    :param float weight_decay: > 0.
    :param int num_data: N, >= 1.
    """
    check_int(num_data, "num_data", 1)
    if not 0 < weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay!r}: the factor that the network was trained with, > 0")
    scale = (num_data * weight_decay) ** -0.5
    if not torch.finfo(torch.float32).tiny <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"weight_decay={weight_decay!r}: the prior's standard deviation would be {scale:.1e}, which float32 does not hold")
    return Normal(0.0, scale)


@checked
@dataclass(frozen=True)
class UncertaintyRegularizer:
    r"""
    Encourages disagreement on out-of-distribution inputs: with two draws' class probabilities :math:`p_1, p_2` at
    :math:`\tilde x = x + \mathrm{Uniform}(-\text{eps}, \text{eps})`,

    .. math:: \text{weight} \cdot \mathrm{mean}_{\tilde x} \max\Bigl(0,\; \text{threshold} - H\bigl(\tfrac{p_1 + p_2}{2}\bigr)
        + \tfrac12 \bigl(H(p_1) + H(p_2)\bigr)\Bigr),

    in nats. The disagreement of two draws is at most log 2 = 0.69, so that the authors' threshold of 0.75 always has a gradient. The
    probabilities are those of the model's likelihood, as in :class:`~pyro_advbayes.PosteriorClassifier`.

    Source: Deng et al., BayesAdapter, 2020.

    :param float eps: half the width of the noise, > 0, in the units of the inputs.
    :param float threshold: the sufficient disagreement, > 0.
    :param float weight: of the term beside the loss per data point, > 0.
    :param str return_site: as in :class:`~pyro_advbayes.PosteriorClassifier`.
    """

    eps: float
    threshold: float = 0.75
    weight: float = 1.0
    return_site: str = "_RETURN"

    def __post_init__(self) -> None:
        for name in ("eps", "threshold", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: a number > 0")

    def loss(self, model: Callable, guide: Callable, x: Tensor, *rest: Tensor) -> Tensor:
        """
        :param x: inputs ``[N, ...]``; with ``rest`` the model's arguments.
        :raises ValueError: if the model's likelihood is not that of a classifier.
        """
        moved = x + torch.empty_like(x).uniform_(-self.eps, self.eps)
        probs = torch.stack([self._logits(model, guide, moved, *rest).softmax(-1) for _ in range(2)])
        disagreement = _entropy(probs.mean(0)) - _entropy(probs).mean(0)
        return self.weight * (self.threshold - disagreement).relu().mean()

    def check(self, model: Callable, *batch: Tensor) -> None:
        """:raises ValueError: as :meth:`loss`, of a model and a batch of its arguments."""
        with torch.no_grad(), pyro.validation_enabled(False), RandomState().again():
            self._logits(model, lambda *_: {}, *batch)

    def _logits(self, model: Callable, guide: Callable, *batch: Tensor) -> Tensor:
        with poutine.block(), kept_statistics(), Origins() as origins:
            values = guide(*batch)
            trace = run(model, (batch, {}), values, hidden=False)
            instead = "leave uncertainty= out, which asks two draws for different classes"
            return Readout(model, trace, batch, {}, values, self.return_site, "uncertainty", instead).logits(trace, origins)


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs.clamp(min=torch.finfo(probs.dtype).tiny)).sum(-1)  # whose slope at 0 is infinite


class Adapted(NamedTuple):
    """
    A fitted variational network.

    :ivar model: the Pyro model of ``(x, y)``; its logits are its return value if it was made of a plain network.
    :ivar guide: its posterior, for ``PosteriorClassifier(model, guide=guide, num_samples=100)`` and ``Predictive``.
    :ivar losses: the mean loss of each epoch, in nats per data point.
    """

    model: Callable
    guide: AutoAdversarialNormal
    losses: list[float]


@checked
def bayes_adapter(
    model: Callable,
    pretrained: Pretrained,
    loader: Iterable[Any],
    *,
    weight_decay: float | None = None,
    num_epochs: int = 1,
    lr: float = 8e-4,
    scale_lr: float = 0.1,
    init_scale: float = math.exp(-5.5),
    num_data: int | None = None,
    loss: ELBO | None = None,
    uncertainty: UncertaintyRegularizer | None = None,
    optim: Callable[[Groups], torch.optim.Optimizer] | None = None,
) -> Adapted:
    r"""
    Makes a trained network Bayesian: a mean-field guide whose means start at the trained weights and whose standard deviations start
    small, fitted for a few epochs to

    .. math:: \frac1N \mathcal{L} = \frac1B \sum_{i \in \mathrm{batch}} -\log p(y_i \mid x_i, \mu + \sigma\varepsilon)
        + \frac1N \mathrm{KL}(q \,\|\, p).

    ::

        net = torchvision.models.resnet18(weights="DEFAULT")
        model, guide, losses = bayes_adapter(net, net, loader, weight_decay=1e-4, num_epochs=12)
        network = PosteriorClassifier(model, guide=guide, num_samples=100)

    A regression is a Pyro model with a Normal likelihood, whose sites are the parameters of the trained network::

        model = HeteroscedasticRegression(num_features, prior=weight_decay_prior(1e-4, len(y)))  # of models/
        law = PosteriorRegressor(model, guide=bayes_adapter(model, net, loader).guide, num_samples=100)

    Under the prior of :func:`weight_decay_prior` the gradient of the second term is :math:`\text{weight\_decay}\,\mu` for a mean, and
    :math:`\text{weight\_decay}\,\sigma^2 - 1/N` for the logarithm of a standard deviation: weight decay, and more uncertainty.
    (So do not use weight decay in the optimiser: the authors' example counts it twice.) Normalisation layers keep their statistics; their
    gains and biases are Bayesian, too. The rows of a minibatch share draws.

    Source: Deng et al., BayesAdapter, 2020; ScalableBDL. Theirs are ``lr`` for CIFAR, ``scale_lr`` and the optimiser, SGD with Nesterov
    momentum 0.9; they start the logarithms of the standard deviations uniformly in (-6, -5), here all start at -5.5.

    :param model: a Pyro model of the loader's items; or a plain network from inputs to logits, of which a Bayesian copy is made.
    :param pretrained: a trained network, or its ``state_dict``: values for every site of the model's network, by the names of the
        parameters, and for its buffers and parameters that are not sites, which are written into the model; of these, parameters that
        require a gradient are trained like the means.
    :param loader: a ``DataLoader``, or any iterable of ``(x, y)`` with a length. Batches are moved to the device of the model's parameters
        or priors. Observations may be NaN where the model masks them.
    :param float weight_decay: the weight decay of the training, > 0, which determines the prior of a plain network; a Pyro model has
        priors.
    :param int num_epochs: >= 0; 0 makes the guide and fits nothing.
    :param float lr: learning rate of the means, > 0, for losses per data point.
    :param float scale_lr: of the standard deviations, as PyTorch's softplus makes them: of their logarithms, while they are small.
    :param float init_scale: standard deviations at the start, > 0.
    :param int num_data: N, if it cannot be read from the loader.
    :param ELBO loss: ``TraceAdversarial_ELBO(mix=0)`` by default, Pyro's mean-field ELBO; with another ``mix`` fine-tuning is adversarial.
    :param UncertaintyRegularizer uncertainty: a term for disagreement on out-of-distribution inputs; none by default.
    :param optim: function of parameter groups, means first, to their optimiser.
    :raises ValueError: before any training, naming every name or shape in ``pretrained`` that does not fit, or the argument out of range.
    """
    _check_numbers(num_epochs=num_epochs, lr=lr, scale_lr=scale_lr)
    missing = _Missing()
    batches = Loader(loader, num_data, _device(model), covers=missing)
    model = _as_model(model, weight_decay, batches)
    check_number(model, batches.example)
    missing.check(model)
    given = Given(model, batches.example)
    told(lambda values: _try(model, given.call(values)[0]), given.values)
    if uncertainty is not None:
        uncertainty.check(model, *batches.example)
    values = _fitting_values(model, pretrained, batches.example)
    unseen: list[str] = []
    if weight_decay is not None and isinstance(model, Classifier):  # made of a plain network
        unseen = [name for name, layer in model.net.named_modules() if never_seen_data(layer)]
    if unseen:
        warn(statistics_message(unseen))
    guide = AutoAdversarialNormal(model, init_loc_fn=init_to_value(values=values), init_scale=float(init_scale))
    rename(guide, f"adapted{next(_COUNT)}")  # guides of one name would share their parameters
    guide(*batches.example)
    own = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    groups = [{"params": [*guide.locs.parameters(), *own], "lr": lr}, {"params": list(guide.scales.parameters()), "lr": scale_lr}]
    optimiser = torch.optim.SGD(groups, momentum=0.9, nesterov=True) if optim is None else optim(groups)
    with RandomState().again():
        factors = prior_factors(model, (batches.example, {}), len(batches.example[0]))
    scaled, losses = CoveredMessenger()(minibatch(model, size=batches.num_data, prior_factors=factors)), []
    elbo = TraceAdversarial_ELBO(mix=0) if loss is None else loss

    def objective(*batch: Tensor) -> Tensor:
        total = elbo.differentiable_loss(scaled, guide, *batch)  # type: ignore[attr-defined]  # Pyro declares it on ELBO's subclasses alone
        value = total / batches.num_data
        return value if uncertainty is None else value + uncertainty.loss(model, guide, *batch)

    num_batches = len(loader) if isinstance(loader, Sized) else 0  # Loader refuses one without a length
    with tqdm(total=num_epochs * num_batches, desc="bayes_adapter", disable=None) as bar:
        for _ in range(num_epochs):
            losses.append(_epoch(objective, batches, optimiser, bar))
    return Adapted(model, guide, losses)


class _Missing:
    """Whether a model masks the NaN of a batch; batches that come before the model is known are checked later."""

    def __init__(self) -> None:
        self._model: Callable | None = None
        self._first: list[tuple[Batch, str]] = []

    def __call__(self, batch: Batch, message: str) -> bool:
        if self._model is None:
            self._first.append((batch, message))
            return True
        try:
            with RandomState().again(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they concern samplers
                Potential(self._model, batch, backend="handlers")  # raises for NaN that no mask covers
        except ValueError:
            return False
        return True

    def check(self, model: Callable) -> None:
        """:raises ValueError: if the model does not mask what was NaN in earlier batches."""
        self._model = model
        for batch, message in self._first:
            if not self(batch, message):
                raise ValueError(message)


def _try(model: Callable, batch: Batch) -> None:
    with RandomState().again(), refuse_random_layers(model):
        try_model(model, batch, {})


def _epoch(objective: Callable[..., Tensor], batches: Loader, optimiser: torch.optim.Optimizer, bar: tqdm) -> float:
    total, rows = 0.0, 0
    for batch, size in batches.epoch():
        optimiser.zero_grad()
        loss = objective(*batch)
        loss.backward()
        optimiser.step()
        total, rows = total + loss.item() * size, rows + size
        bar.update()
    return total / rows


def _device(model: Callable) -> torch.device | None:
    """The device of a model's network, if it is a module."""
    if not isinstance(model, nn.Module):
        return None
    priors = declared_sites(model).values() if isinstance(model, PyroModule) else ()  # a Bayesian network may have nothing else
    means = (prior.mean for prior in priors if isinstance(prior, Distribution))
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers(), means)), None)


def _as_model(model: Callable, weight_decay: float | None, batches: Loader) -> Callable:
    if not isinstance(model, nn.Module) or isinstance(model, PyroModule):
        if weight_decay is not None:
            raise ValueError(
                f"weight_decay={weight_decay}: the model has priors already; make them with bayesianize(net, prior=weight_decay_prior(...))"
            )
        return model
    if weight_decay is None:
        raise ValueError("weight_decay: a plain network has no priors; give the factor that it was trained with, which determines them")
    targets = batches.example[1] if len(batches.example) > 1 else None
    if targets is not None and targets.is_floating_point():
        raise ValueError(
            f"a plain network is made a classifier, and the loader's second tensor is {targets.dtype}, not classes: for a regression give "
            "a Pyro model whose observed site is Normal, with the network as pretrained (models/heteroscedastic_regression.py is one); "
            "for classes give y.long()"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BatchNorm layer")  # the statistics will come from the trained network
        return Classifier(bayesianize(model, prior=weight_decay_prior(weight_decay, batches.num_data)))


def _fitting_values(model: Callable, pretrained: Pretrained, batch: Batch) -> dict[str, Tensor]:
    """
    The sites' values among trained weights. The others are written into the model's buffers and parameters, or belong to layers that
    the model has and does not use, such as an auxiliary classifier for training.

    The names in the model are those of the weights with one prefix, the network's name in the model.
    """
    given = dict(pretrained.state_dict() if isinstance(pretrained, nn.Module) else pretrained)
    # draws from the prior may overflow a deep network, but only names and shapes are needed
    trace = run(model, (batch, {}), None, torch.no_grad(), refuse_random_layers(model), pyro.validation_enabled(False))
    sites = {name: node["value"] for name, node in latent_sites(trace).items()}
    module = poutine.unwrap(model)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())} if isinstance(module, nn.Module) else {}
    known = {**tensors, **sites}
    prefix = _prefix(given, known)
    problems = [f"{name!r} is missing" for name in known if name.startswith(prefix) and name[len(prefix) :] not in given]
    unmet = set(declared_sites(module)) - set(sites) if isinstance(module, PyroModule) else set()  # by the forward pass
    same = _other_names(module)
    for name, value in given.items():
        own = known.get(prefix + name)
        if prefix + name in unmet:
            continue
        twins = [other[len(prefix) :] for other in same.get(prefix + name, ()) if other in known]
        if own is None and twins:
            if not torch.equal(value, given.get(twins[0], value)):
                problems.append(f"{name!r} differs from {twins[0]!r}, which is the same weight of the model")
        elif own is None:
            problems.append(f"{name!r} is unknown to the model")
        elif own.shape != value.shape:
            problems.append(f"{name!r} has shape {list(value.shape)}, the model {list(own.shape)}")
    if problems:
        raise ValueError(f"pretrained does not fit the model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                tensor.copy_(given[name[len(prefix) :]])
    return {name: given[name[len(prefix) :]].detach().to(value) for name, value in sites.items() if name.startswith(prefix)}


def _other_names(module: Any) -> dict[str, set[str]]:
    """For the tensors of a module that is used in several places: name -> the other names; a site has one of them."""
    places: dict[nn.Module, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False) if isinstance(module, nn.Module) else ():
        places.setdefault(part, []).append(name)
    found: dict[str, set[str]] = {}
    for part, names in places.items():
        for attribute in own_names(part) if len(names) > 1 else ():
            every = {f"{name}.{attribute}".lstrip(".") for name in names}
            found.update({name: every - {name} for name in every})
    return found


def _prefix(given: Collection[str], known: Collection[str]) -> str:
    """The prefix under which most of the given names are known."""
    found: dict[str, int] = {"": 0}
    for name in known:
        for end in given:
            if name == end or name.endswith("." + end):
                prefix = name[: len(name) - len(end)]
                found[prefix] = found.get(prefix, 0) + 1
    return max(found, key=found.__getitem__)


def _check_numbers(num_epochs: int, **rates: float) -> None:
    check_int(num_epochs, "num_epochs", 0)
    for name, rate in rates.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name}={rate!r}: a learning rate, > 0")
