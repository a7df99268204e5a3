"""A guide without a density, which draws through a generator: :class:`AutoImplicit`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.kl import register_kl

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, warn
from pyro_advbayes.infer.autoguide.factored import FactoredGenerator
from pyro_advbayes.infer.autoguide.generators import MLPGenerator, NetworkGenerator, RowGenerator
from pyro_advbayes.infer.autoguide.hyper import HyperGenerator
from pyro_advbayes.infer.autoguide.model_sites import check_support, declared_priors, missing_sites, moved, refuse_grouped
from pyro_advbayes.infer.autoguide.rows import constrained, row_dtype, sites_of
from pyro_advbayes.infer.autoguide.stored import pack_sites, unpack_sites
from pyro_advbayes.infer.conditioned import without_leading_ones
from pyro_advbayes.infer.mcmc.fingerprint import model_name
from pyro_advbayes.kinds import sample_sites
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.model.program import run
from pyro_advbayes.model.refusals import Refused, refusing
from pyro_advbayes.model.structure import Site
from pyro_advbayes.model.supports import map_onto
from pyro_advbayes.storage import files, reference
from pyro_advbayes.tracing.guard import RandomState

# The number of draws by which rounding is judged.
ROUNDED = 32

GENERATORS = {kind.__name__: kind for kind in (MLPGenerator, FactoredGenerator, HyperGenerator)}


class Implicit(dist.Delta):
    """A value from a generator. Its ``log_prob`` raises, so that no objective uses a density that does not exist."""

    def log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError(
            "AutoImplicit has no density, so that it has no ELBO: train it with pyro_advbayes.distill.APD(guide).fit(...)"
        )


@register_kl(Implicit, Distribution)
@register_kl(Implicit, dist.Independent)  # otherwise Pyro's own function for these two kinds would match equally well
def _no_kl(p: Implicit, q: Distribution) -> Tensor:
    return p.log_prob(p.v)


class Storage(NamedTuple):
    """
    The storage of a guide, compared with that of the draws it was fitted to.

    ``bytes``: of the generator; ``draw_bytes``: of one stored draw; ``pays_from``: the smallest number of draws that take more.
    """

    bytes: int
    draw_bytes: int
    pays_from: int


def model_sites_of(model: Callable, values: Mapping[str, Tensor], source: str = "samples") -> tuple[Site, ...]:
    """
    Sites of draws ``[chains, draws, *shape]``, on the supports that the model declares.

    :param source: name of the draws in messages.
    :raises ValueError: naming a site that differs from the model's declaration.
    """
    declared = declared_priors(model, {name: value.shape[2:] for name, value in values.items()})
    refuse_grouped(values, declared, source)
    maps = {name: map_onto(name, prior) for name, prior in declared.items()}
    return sites_of(values, {name: moved(transform, values[name].device) for name, transform in maps.items()})


@checked
class AutoImplicit(AutoGuide):
    """
    A guide that maps noise through a network onto every latent site: it can be drawn from and has no density.
    :mod:`pyro_advbayes.distill` trains it on draws of a sampler, which it replaces. ::

        guide = AutoImplicit(model, generator=FactoredGenerator(rank=8))
        distill.APD(guide).fit(mcmc.get_samples())
        Predictive(model, guide=guide, num_samples=500)(x)

    Sites, shapes and supports come from the draws, from a file or from a :class:`~pyro_advbayes.Potential`, never from a call: without
    observations ``obs`` would be a latent site. Draws do not tell a support: it is that of the prior which a PyroModule declares, a
    ``PyroSample`` of a distribution, and all reals otherwise. The guide can be called without arguments. At the first call with arguments
    it compares its sites with the model's. It refuses sites that the model draws and the guide does not if the distribution of another such
    site depends on them. It accepts unobserved outcome sites (nothing depends on them) and sites in an outcome's plate, which are drawn for
    every row.

    The generator's parameters are those of a module, and not in Pyro's parameter store. Sites are emitted outside plates.

    :param model: a Pyro model.
    :param generator: one of :mod:`pyro_advbayes.distill`, or a custom module with an attribute ``noise``, from noise ``[n, noise]`` to one
        number for each element of the sites ``[n, P]``.
    :param Potential potential: of the model, if a site is constrained and the model does not declare its prior.
    :raises ValueError: if the generator is not a module, or does not fit the sites.
    """

    def __init__(self, model: Callable, generator: nn.Module, potential: Potential | None = None) -> None:
        if not isinstance(generator, nn.Module):
            raise ValueError(f"generator={generator!r}: a generator of pyro_advbayes.distill, or a torch.nn.Module, is needed")
        super().__init__(model)
        self.generator = generator if isinstance(generator, RowGenerator) else NetworkGenerator(generator)
        self.sites: tuple[Site, ...] = ()
        self.num_draws: int | None = None  # to which it was fitted
        self._compared = False
        if potential is not None:
            self.set_sites(potential.sites, potential.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AutoImplicit:
        # PyTorch moves parameters and buffers only, and the bounds of a support are neither. They keep the model's dtype.
        super()._apply(fn, recurse)
        self.sites = tuple(site._replace(transform=moved(site.transform, self.device)) for site in self.sites)
        return self

    # -------------------------------------------------------------------------------------------------------- what it draws

    def set_sites(self, sites: Sequence[Site], device: torch.device | str = "cpu") -> None:
        """
        Sets the sites, and builds the generator for them.

        :param sites: in the order of a row; see :attr:`Potential.sites <pyro_advbayes.Potential>`.
        :param device: the generator's device.
        :raises ValueError: naming a site that is not the model's, where the model declares its sites, or if the generator does not fit.
        """
        declared = declared_priors(self.model, {site.name: site.shape for site in sites})
        for site in sites:
            if site.name in declared:
                check_support(site, declared[site.name])
        self.network.build([site.unconstrained_shape for site in sites], row_dtype(sites), torch.device(device))
        self.sites = tuple(sites)

    def sites_of(self, values: Mapping[str, Tensor], source: str = "samples") -> tuple[Site, ...]:
        """:func:`model_sites_of` of the guide's model."""
        return model_sites_of(self.model, values, source)

    @property
    def network(self) -> RowGenerator:
        """The generator; unlike the attribute of that name it never reaches Pyro's parameter store."""
        network = dict(self.named_children())["generator"]
        assert isinstance(network, RowGenerator)
        return network

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the generator's rows."""
        return self.network.like.dtype

    @property
    def device(self) -> torch.device:
        """The generator's device."""
        return self.network.like.device

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Draws every latent site.

        :param args: the model's arguments, with or without observations; the draws do not depend on them.
        :return: site -> ``[*shape]``.
        :raises RuntimeError: if the guide has not been fitted.
        :raises ValueError: naming a site that the model lacks, or has in another shape or on another support; one that is drawn in a plate;
            or one that the model has and the guide lacks.
        """
        with refusing():
            self.check(*args, **kwargs)
        with torch.no_grad():
            network = self.network
            values = self.constrain(network(network.latent(1)))
        drawn = {}
        for name, value in values.items():
            drawn[name] = pyro.sample(name, Implicit(value[0], event_dim=value.dim() - 1))
            if drawn[name].shape != value[0].shape:
                raise Refused(
                    f"site {name!r}: AutoImplicit draws once in a call, and the plate around it would repeat the draw: draw one by one "
                    "(parallel=False, vectorize_particles=False), or take guide.sample(num_samples) for posterior_samples"
                )
        return drawn

    @torch.no_grad()
    @checked
    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """
        Draws as ``posterior_samples`` of ``Predictive`` or ``PosteriorClassifier``.

        :param num_samples: number of draws, >= 1.
        :return: site -> ``[num_samples, *shape]``, in the model's own space.
        """
        self._check_fitted()
        return self.constrain(self.network.sample(check_int(num_samples, "num_samples", 1)))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """
        Compares the guide's sites with the model's, at the first call with arguments.

        :param args: the model's arguments.
        :raises RuntimeError: if the guide has not been fitted.
        :raises ValueError: as :meth:`forward`.
        """
        self._check_fitted()
        if (args or kwargs) and not self._compared:
            self._compare(args, kwargs)

    def constrain(self, rows: Tensor) -> dict[str, Tensor]:
        """Site -> ``[n, *shape]``, in the model's own space, of rows ``[n, P]``."""
        return constrained(self.sites, rows)

    def _check_fitted(self) -> None:
        if self.num_draws is None:
            raise RuntimeError("AutoImplicit has not been fitted yet: distill.APD(guide).fit(samples), or AutoImplicit.load(path, model)")

    def _compare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compares the sites in a run of the model, which leaves the random generators unchanged."""
        with torch.no_grad(), RandomState().again():
            trace = run(self.model, (args, kwargs))
            nodes = sample_sites(trace)
            missing = missing_sites(self.model, trace, {site.name for site in self.sites}, args, kwargs)
        sites = []
        for site in self.sites:
            node = nodes.get(site.name)
            if node is None:
                raise ValueError(f"site {site.name!r} is the guide's, but not the model's, which has {trace.stochastic_nodes}")
            shape = node["value"].shape
            if without_leading_ones(shape) != without_leading_ones(site.shape):
                raise ValueError(f"site {site.name!r} has shape {tuple(site.shape)} in the guide and {tuple(shape)} in the model")
            site = site._replace(shape=shape, unconstrained_shape=torch.Size(site.transform.inverse_shape(shape)))
            if not node["is_observed"]:
                check_support(site, node["fn"])
            sites.append(site)
        for name, follower in missing.items():
            raise ValueError(
                f"site {name!r} of the model, on which its site {follower!r} depends, is not among the guide's, "
                f"{[site.name for site in self.sites]}, and would be drawn from its prior: fit the guide to draws of it, too; or, if this "
                f"is intended, take AutoImplicit(poutine.block(model, hide=[{name!r}]), ...)"
            )
        self.sites, self._compared = tuple(sites), True

    # --------------------------------------------------------------------------------------------------- storage and files

    @checked
    def storage(self, dtype: torch.dtype | None = None) -> Storage:
        """
        The storage of the guide and of the draws that it was fitted to. Warns if the draws take less.

        :param dtype: of its numbers in a file, as for :meth:`save`.
        :return: see :class:`Storage`.
        """
        self._check_fitted()
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.network.stored(dtype).values())
        draw = sum(site.shape.numel() * site.dtype.itemsize for site in self.sites)
        found = Storage(size, draw, math.floor(size / draw) + 1)
        if (self.num_draws or 0) < found.pays_from:
            warn(
                f"{type(self.network).__name__} takes {size} bytes, more than the {self.num_draws} draws of {draw} bytes that it "
                f"replaces; it pays from {found.pays_from} draws on: keep the draws, or take a smaller generator, FactoredGenerator",
            )
        return found

    @checked
    def save(self, path: str | Path, overwrite: bool = False, dtype: torch.dtype | None = None) -> None:
        """
        Writes the guide in the safetensors format, all or nothing.

        :param path: the file.
        :param overwrite: whether it may replace an existing one.
        :param dtype: ``torch.float16`` or ``torch.bfloat16`` takes half the bytes of float32; the loaded guide draws in the sites' dtypes.
            Warns if rounding moves the draws of a site by more than a tenth of their standard deviation.
        :raises FileExistsError: if the file exists.
        :raises ValueError: naming a site whose support no file can hold; or if float16 cannot hold a number.
        """
        self._check_fitted()
        files.refuse_existing(Path(path), overwrite)
        state, network = self.network.stored(dtype), self.network
        if dtype is not None:
            network = copy.deepcopy(network)
            network.restore(state)
            self._judge_rounding(network, dtype)
        content = {
            "model": model_name(self.model),
            "sites": pack_sites(self.sites),
            "generator": type(self.network).__name__,
            "settings": self.network.settings(),
            "num_draws": self.num_draws,
            "reference": {name: value.tolist() for name, value in network.reference().items()},
            "state": state,
        }
        files.save(Path(path), content, f"file of {type(self).__name__}")

    @torch.no_grad()
    def _judge_rounding(self, rounded: RowGenerator, dtype: torch.dtype) -> None:
        """Warns if draws of the rounded generator are others."""
        random, rows = RandomState(), []
        for network in (self.network, rounded):
            with random.again():
                rows.append(network(network.latent(ROUNDED)))
        shift = (rows[1] - rows[0]) / rows[0].std(0).clamp_min(torch.finfo(self.dtype).tiny)
        for site in self.sites:
            moved = float(shift[:, site.start : site.start + site.numel].square().mean().sqrt())
            if moved > 0.1:
                warn(
                    f"{dtype} moves the draws of site {site.name!r} by {moved:.2g} of their standard deviation: save without dtype",
                )

    @classmethod
    @checked
    def load(cls, path: str | Path, model: Callable, generator: nn.Module | None = None) -> AutoImplicit:
        """
        Reads what :meth:`save` wrote. Nothing in the file is unpickled.

        :param path: the file.
        :param model: the model that it was written for, recognised by the name of its class or function, and by its sites.
        :param generator: a module like the saved one, if that was a custom one.
        :raises FileNotFoundError: if there is no such file.
        :raises ValueError: if it is truncated, corrupt, no guide, of another version, of another model or of another generator.
        """
        content = files.load(Path(path), f"file of {cls.__name__}")
        kinds = {"model": str, "generator": str, "settings": dict, "sites": list, "state": dict, "num_draws": int, "reference": dict}
        files.check_fields(Path(path), content, kinds)
        if not content["sites"] or content["num_draws"] == 0:
            raise files.FileError(f"{path}: its {'num_draws is 0' if content['sites'] else 'sites are []'}: it is corrupt")
        if content["model"] != model_name(model):
            raise ValueError(f"{path} is of another model: it was saved for {content['model']!r}, here is {model_name(model)!r}")
        kind = content["generator"]
        if generator is None and kind not in GENERATORS:
            raise ValueError(f"{path} holds a custom generator ({content['settings']}): pass generator=, a module like it")
        with files.reading(Path(path)):
            sites = unpack_sites(content["sites"])
            for name, value in content["state"].items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"its state[{name!r}] is {str(value)[:100]}, no tensor")
            if generator is None:
                generator = GENERATORS[kind](**content["settings"])
                held = sum(value.numel() for value in content["state"].values())
                if generator.numbers([site.unconstrained_shape for site in sites]) > held:  # before memory is allocated for it
                    raise ValueError(f"its settings {content['settings']} are of a generator of more than its {held} numbers")
        guide = cls(model, generator)
        if type(guide.network).__name__ != kind or guide.network.settings() != content["settings"]:
            raise ValueError(f"{path} holds a {kind} with {content['settings']}, not the generator given")
        try:
            guide.set_sites(sites)
        except ValueError as error:
            raise ValueError(f"{path} is of another model: {error}") from error
        try:
            guide.network.restore(content["state"])
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the generator given: {error}") from error
        except ValueError as error:
            raise files.FileError(f"{path}: its state is corrupt: {error}") from error
        with files.reading(Path(path)):
            then = {name: torch.tensor(value, dtype=torch.float64) for name, value in content["reference"].items()}
        reference.check(guide.network.reference(), then, Path(path))
        guide.num_draws = content["num_draws"]
        return guide
