"""Any ``torch.nn.Module`` as a Bayesian neural network: :func:`bayesianize`."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from pyro.distributions import HalfNormal, Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ExpTransform
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from pyro_advbayes.checked import checked
from pyro_advbayes.given import warn
from pyro_advbayes.kinds import BATCH_NORMS, DROPOUTS, NORMALIZATIONS
from pyro_advbayes.model.notices import never_seen_data, statistics_message

Prior = TorchDistributionMixin | Callable[[str, torch.Tensor], TorchDistributionMixin | None]

_INVERSE = type(ExpTransform().inv)  # the class of most inverses, which PyTorch does not export


@checked
@dataclass(frozen=True)
class FanIn:
    r"""
    A prior whose functions keep their size as layers grow wider: for every tensor of two or more dimensions

    .. math:: w \sim \mathcal{N}(0, \text{scale}^2 / \text{fan\_in}),

    with fan_in the number of elements of ``w`` over the size of its first dimension: the inputs that one output unit
    of a linear, convolutional or recurrent layer sees. (An embedding is looked up, not summed over, and a transposed
    convolution stores its inputs first: give those a separate prior.) A tensor of one dimension or none (a bias)
    has no fan-in and gets ``Normal(0, bias_scale)``. In :func:`bayesianize` the gains of PyTorch's normalisation layers
    get ``Normal(1, bias_scale)``, and their biases ``Normal(0, bias_scale)``, whatever their shape.

    Source: R. Neal, Bayesian Learning for Neural Networks, 1996, chapter 2.

    :param float scale: standard deviation of a pre-activation per unit of input, > 0; √2 keeps the variance through
        ReLU layers.
    :param float bias_scale: standard deviation of tensors without a fan-in, > 0.
    """

    scale: float = 1.0
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "bias_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"FanIn needs {name} > 0, got {getattr(self, name)}.")

    def __call__(self, name: str, value: torch.Tensor) -> Normal:
        if value.dim() < 2:
            return Normal(0.0, self.bias_scale)
        return Normal(0.0, self.scale / math.sqrt(value[0].numel()))

    def of_normalization(self, parameter: str) -> Normal:
        """The prior of a normalisation layer's ``"weight"``, its gain, or ``"bias"``."""
        return Normal(1.0 if parameter == "weight" else 0.0, self.bias_scale)


@checked
@dataclass(frozen=True)
class LearnedScale:
    r"""
    A prior whose widths are learnt with the weights: every tensor has a scale of its own, a latent site, in non-centred form:

    .. math:: w = m + s\, r, \qquad s \sim \mathrm{HalfNormal}(\text{scale}), \qquad r \sim \mathcal{N}(0, 1 / \text{fan\_in}),

    with fan_in as in :class:`FanIn`, of which this is the hierarchical form. Of a tensor without a fan-in (a bias)
    :math:`s \sim \mathrm{HalfNormal}(\text{bias\_scale})` and :math:`r \sim \mathcal{N}(0, 1)`. The mean m is 1 for the gains of PyTorch's
    normalisation layers, which have no fan-in either, and 0 for all else.

    The sites of a tensor ``"0.weight"`` are ``"0.weight_scale"``, a number, and ``"0.weight_raw"``; ``"0.weight"`` itself is deterministic:
    ``Predictive(..., return_sites=["0.weight"])`` has it.

    Source: R. Neal, Bayesian Learning for Neural Networks, 1996, chapter 3; the non-centred form: O. Papaspiliopoulos, G. Roberts and
    M. Sköld, A general framework for the parametrization of hierarchical models, 2007.

    :param float scale: of the standard deviation of a pre-activation per unit of input, > 0.
    :param float bias_scale: of the standard deviation of tensors without a fan-in, > 0.
    """

    scale: float = 3.0
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "bias_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"LearnedScale needs {name} > 0, got {getattr(self, name)}.")

    def install(self, module: PyroModule, attribute: str, name: str, value: torch.Tensor) -> None:
        """
        Gives a parameter its three sites.

        :param name: of its site.
        :raises ValueError: if the module has an attribute of the name of one of them.
        """
        normalization = isinstance(module, NORMALIZATIONS)
        without_fan_in = normalization or value.dim() < 2
        raw = Normal(0.0, 1.0) if without_fan_in else FanIn()(name, value)
        width = HalfNormal(self.bias_scale if without_fan_in else self.scale)
        for ending in ("_raw", "_scale"):
            if hasattr(module, attribute + ending):
                raise ValueError(f"{name!r}: the module has an attribute {attribute + ending!r}, which LearnedScale needs: rename it.")
        raw, width = _fit(raw, f"{name}_raw", value), _fit(width, f"{name}_scale", value.new_zeros(()))
        setattr(module, f"{attribute}_raw", PyroSample(raw))
        setattr(module, f"{attribute}_scale", PyroSample(width))
        setattr(module, attribute, PyroSample(_Scaled(attribute, 1.0 if normalization and attribute == "weight" else 0.0)))


@dataclass(frozen=True)
class _Scaled:
    """A deterministic site of a module, ``mean`` + scale × raw."""

    attribute: str
    mean: float

    def __call__(self, module: PyroModule) -> torch.Tensor:
        return self.mean + getattr(module, f"{self.attribute}_scale") * getattr(module, f"{self.attribute}_raw")


@checked
def bayesianize(
    net: torch.nn.Module, prior: Prior | LearnedScale = Normal(0.0, 1.0), *, exclude: str | Sequence[str] = (), eval_only: bool = True
) -> PyroModule:
    """
    Copies a network and gives every parameter of the copy a prior, so that calling it draws its weights. ::

        net = bayesianize(nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 2)), prior=Normal(0., 1.))

    The copy has the structure of the original, which stays untouched. Each parameter is a latent site under its own
    name (``"0.weight"``; ``"net.0.weight"`` once it is the attribute ``net`` of a model), drawn as a whole. Make the
    copy part of its model before it is first called: Pyro fixes the names at that moment.

    - Priors have the device and dtype of their parameter; ``.to()``, ``.double()`` and the like move them.
    - The copy, excluded layers included, stays in eval mode, even when the module around it is put in train mode: a
      log-density must not be random (Dropout), and running the model must not change it (BatchNorm's statistics, which
      are those of the original). A warning names Dropout layers that this turns off, and BatchNorm layers that have
      never seen data. Variational inference from scratch has no statistics yet: ``eval_only=False`` keeps the mode of
      the original, which ``train()`` and ``eval()`` change.
    - One distribution is the prior of the gains of normalisation layers, too; :class:`FanIn` centres them at 1.
    - A module used in two places stays one module, with one site, under the last of its names.
    - Frozen parameters (``requires_grad=False``) get priors like all others.
    - Use ``torch.func.functional_call`` on the original only: on a Pyro module it deletes the priors permanently.

    :param torch.nn.Module net: any network that is not a Pyro module yet.
    :param prior: one Pyro distribution, expanded to the shape of each parameter; or a function of a parameter's name
        and value that returns its distribution (which is expanded likewise), or None for no prior;
        :class:`FanIn` is such a function. :class:`LearnedScale` is a hierarchical prior.
    :param exclude: one pattern or several (as in :mod:`fnmatch`: ``"0.*"``, ``"*.bias"``) for the names of
        parameters without a prior. They remain ``nn.Parameter`` s with the values of the original: samplers do not
        change them, variational inference optimises those that require a gradient.
    :param bool eval_only: whether the copy stays in eval mode. Samplers refuse one that is in train mode.
    :returns: the copy, a :class:`~pyro.nn.PyroModule`.
    :raises ValueError: if ``net`` has no parameters, or none is left to get a prior; if a pattern matches nothing; if
        a prior does not fit its parameter; if one tensor is a parameter under two names; and for networks whose
        parameters cannot become sites (lazy, parametrised, compiled, already Pyro's) or whose output for one row
        depends on the rest of the batch even in eval mode.
    """
    _check_modules(net)
    if eval_only:
        _tell_of_eval_mode(net)
    copied = copy.deepcopy(net)
    to_pyro_module_(copied)
    assert isinstance(copied, PyroModule)
    copied.__class__ = _bayesian_class(type(copied))
    assert isinstance(copied, _Bayesian)
    copied._eval_only = eval_only
    if eval_only:
        copied.eval()

    parameters = dict(_named_parameters(copied))
    excluded = _matches(exclude, list(parameters))
    priors = {}
    for name, (module, attribute, value) in parameters.items():
        if name not in excluded:
            distribution: TorchDistributionMixin | None
            if isinstance(prior, LearnedScale):
                distribution = Normal(0.0, 1.0)  # whose place the three sites take
            elif isinstance(prior, FanIn) and isinstance(module, NORMALIZATIONS):
                distribution = prior.of_normalization(attribute)
            else:
                distribution = prior if isinstance(prior, TorchDistributionMixin) else prior(name, value.detach())
            if distribution is not None:
                priors[name] = _fit(distribution, name, value.detach())
    if not priors:
        raise ValueError("No parameter is left to get a prior: exclude fewer, or let prior return a distribution.")
    _check_ties(parameters, priors)
    for name, distribution in priors.items():
        module, attribute, value = parameters[name]
        if isinstance(prior, LearnedScale):
            prior.install(module, attribute, name, value.detach())
        else:
            setattr(module, attribute, PyroSample(distribution))
    return copied


class _Bayesian(PyroModule):
    """The root of a bayesianized network."""

    _eval_only: bool

    def train(self, mode: bool = True) -> _Bayesian:
        """Stays in eval mode if ``eval_only``, whatever mode the module around it is put in; see :func:`bayesianize`."""
        return super().train(mode and not self._eval_only)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Bayesian:
        # PyTorch moves parameters and buffers only, and a PyroSample is neither.
        super()._apply(fn, recurse)
        for module in _pyro_modules(self):
            samples = module._pyro_samples
            samples.update({name: map_tensors(prior, fn) for name, prior in samples.items()})
        return self


@functools.cache
def _bayesian_class(cls: type[PyroModule]) -> type[PyroModule]:
    class Bayesian(_Bayesian, cls):  # type: ignore[valid-type, misc]  # a base that is known at run time
        def __reduce__(self) -> tuple:
            # pickle cannot find this local class by name, but that of the plain module
            return _empty, (_plain_class(cls),), self.__getstate__()

    Bayesian.__name__ = Bayesian.__qualname__ = "Bayesian" + _plain_class(cls).__name__
    return Bayesian


def _plain_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return next(base for base in cls.__mro__ if issubclass(base, torch.nn.Module) and not issubclass(base, PyroModule))


def _empty(plain: type[torch.nn.Module]) -> PyroModule:
    """An empty object for unpickling."""
    cls = _bayesian_class(PyroModule[plain])
    return cls.__new__(cls)


def _named_parameters(net: PyroModule) -> Iterator[tuple[str, tuple[PyroModule, str, torch.nn.Parameter]]]:
    """Every parameter, with its module and attribute, under the name of its site: of a shared module the last one, unlike PyTorch's."""
    for module in _pyro_modules(net):
        for attribute, value in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{module._pyro_name}.{attribute}".lstrip("."), (module, attribute, value)


def _pyro_modules(model: torch.nn.Module) -> list[PyroModule]:
    return [module for module in model.modules() if isinstance(module, PyroModule)]


def declared_sites(model: PyroModule) -> dict[str, Any]:
    """
    The sites that a model's modules declare as ``PyroSample``, drawn or not: name -> prior, a distribution or a function of the module.
    What :class:`LearnedScale` computes from others is not drawn.
    """
    return {
        f"{module._pyro_name}.{attribute}".lstrip("."): prior
        for module in _pyro_modules(model)
        for attribute, prior in module._pyro_samples.items()
        if not isinstance(prior, _Scaled)
    }


def own_names(module: torch.nn.Module) -> list[str]:
    """The names of a module's own parameters, buffers and sites, without those of its submodules."""
    tensors = [f(recurse=False, remove_duplicate=False) for f in (module.named_parameters, module.named_buffers)]
    return [*(name for each in tensors for name, _ in each), *(module._pyro_samples if isinstance(module, PyroModule) else ())]


def rename(module: PyroModule, name: str) -> None:
    """Sets the name under which Pyro's parameter store keeps a module's parameters; Pyro's guides take no name."""
    module._pyro_name = name


def _matches(patterns: str | Sequence[str], names: list[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"exclude={pattern!r} matches no parameter; there are {', '.join(names)}.")
        matched |= found
    return matched


def _fit(prior: Any, name: str, value: torch.Tensor) -> TorchDistributionMixin:
    """The prior of a parameter, on its device."""
    if not isinstance(prior, TorchDistributionMixin):
        raise ValueError(f"The prior of {name!r} must be a distribution of pyro.distributions, got {prior!r}.")
    if not value.is_floating_point():
        raise ValueError(f"Parameter {name!r} is {value.dtype} and cannot have a prior: exclude it.")
    prior = map_tensors(prior, lambda t: t.to(value) if t.is_floating_point() else t.to(value.device))
    batch = value.shape[: max(value.dim() - prior.event_dim, 0)]
    try:
        fitted = prior.expand(batch).to_event(len(batch))
    except RuntimeError:
        fitted = prior
    if fitted.event_shape != value.shape or fitted.batch_shape:
        raise ValueError(
            f"The prior of {name!r} has shape {tuple(prior.shape())}, which does not expand to the parameter's {tuple(value.shape)}."
        )
    return fitted


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a distribution with ``fn`` applied to every tensor that it holds, at any depth."""
    if isinstance(value, torch.Tensor):
        # An expanded tensor stays expanded: a prior on a million weights holds two numbers.
        core = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
        return fn(core).expand(value.shape)
    if isinstance(value, _INVERSE):
        return map_tensors(value.inv, fn).inv
    if isinstance(value, Distribution | Transform | Constraint):
        mapped = object.__new__(type(value))
        for name, item in vars(value).items():
            # A transform caches its inverse, which holds the old tensors; it makes a new one on request.
            vars(mapped)[name] = None if name == "_inv" else map_tensors(item, fn)
        return mapped
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, fn) for item in value)
    return value


def _check_ties(parameters: dict[str, tuple[PyroModule, str, torch.nn.Parameter]], priors: dict[str, Any]) -> None:
    first: dict[int, str] = {}
    for name, (_, _, value) in parameters.items():
        other = first.setdefault(id(value), name)
        if other != name and (other in priors or name in priors):
            raise ValueError(
                f"Parameters {other!r} and {name!r} are one tensor, but would become two independent sites: keep one of them and "
                f"compute with it in both places (F.linear(h, self.{other}) in place of a tied Linear layer), use one module in both, "
                "or exclude both."
            )


def _check_modules(net: torch.nn.Module) -> None:
    if not isinstance(net, torch.nn.Module):
        raise ValueError(f"net must be a torch.nn.Module, got {type(net).__name__}.")
    for name, module in net.named_modules():
        what = f"Module {name!r}" if name else f"The {type(module).__name__}"
        if isinstance(module, PyroModule):
            raise ValueError(f"{what} is a PyroModule already: bayesianize the plain network inside it.")
        if _is_compiled(module):
            raise ValueError(f"{what} is compiled: bayesianize the network that was compiled.")
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{what} has parametrised tensors ({', '.join(module.parametrizations)}): remove the parametrisation "
                "(torch.nn.utils.parametrize.remove_parametrizations) and bayesianize then."
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise ValueError(f"{what} is lazy and has no shape yet: call the network once on a batch, then bayesianize.")
        if isinstance(module, BATCH_NORMS) and not module.track_running_stats:
            raise ValueError(
                f"{what} normalises by its batch (track_running_stats=False), so that the likelihood of a row depends on "
                "the others: track the statistics, or use GroupNorm."
            )
    if next(net.parameters(), None) is None:
        raise ValueError(f"The {type(net).__name__} has no parameters that could get a prior.")


def _tell_of_eval_mode(net: torch.nn.Module) -> None:
    """Warns of layers that differ in eval mode, in which the copy stays."""
    layers = {name or type(module).__name__: module for name, module in net.named_modules()}
    dropping = [repr(name) for name, module in layers.items() if module.training and _drops(module)]
    if dropping:
        warn(
            f"Dropout is off in the copy (layers {', '.join(dropping)}): it stays in eval mode, since a log-density must not be "
            "random. mc_dropout(net) makes the masks latent sites; call net.eval() before bayesianize to silence this warning",
        )
    unseen = [name for name, module in layers.items() if never_seen_data(module)]
    if unseen:
        warn(statistics_message(unseen))


def _drops(module: torch.nn.Module) -> bool:
    if isinstance(module, DROPOUTS):
        return module.p > 0
    return isinstance(module, torch.nn.RNNBase | torch.nn.MultiheadAttention) and module.dropout > 0


def _is_compiled(module: torch.nn.Module) -> bool:
    # torch.compile(module) wraps it, module.compile() replaces its call; both would keep on calling the original.
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
