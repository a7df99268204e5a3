"""U of one chain through Pyro's handlers, and its derivatives: what everything else evaluates, batches, records or checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Transform
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_advbayes.given import need_tensor
from pyro_advbayes.model.data import Data
from pyro_advbayes.model.program import log_likelihood


class Energy(Data):
    """
    The potential energy of one chain, a row ``[size]`` of unconstrained numbers, site after site; the formula is in
    :class:`~pyro_advbayes.model.potential.Potential`.

    :ivar sites: the latent sites, in the order of a row.
    :ivar size: how many numbers a row holds.
    :ivar dtype: of a row.
    :ivar perturbed: the place of the argument that :meth:`input_slope` differentiates by, None without one.
    """

    def __init__(self, *args: Any, perturb: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sites = self.structure.sites
        self.size = sum(site.numel for site in self.sites)
        self.dtype = self.sites[0].dtype
        for site in self.sites:
            self.dtype = torch.promote_types(self.dtype, site.dtype)
        self.perturbed = None if perturb is None else self._place_of(perturb)

    def _place_of(self, name: str) -> int:
        """Where an argument stands among the tensors."""
        labels = self.arguments.labels
        batched = [label for i, label in enumerate(labels) if i in self.places]
        if name not in batched:
            raise ValueError(
                f"perturb={name!r}: the model has no such argument that is cut into minibatches; there are {', '.join(batched) or 'none'}"
                + ("" if self.places else " (give batch_size=, or a loader)")
            )
        place = labels.index(name)
        if not self.arguments.tensors[place].is_floating_point():
            raise ValueError(
                f"perturb={name!r}: an argument of {self.arguments.tensors[place].dtype} cannot be moved, only one of floating point"
            )
        return place

    # ------------------------------------------------------------------------------------------------- rows and their sites

    def split(self, state: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site, views ``[chains, *unconstrained_shape]`` into a state ``[chains, size]``."""
        parts = state.split([site.numel for site in self.sites], dim=-1)
        return {s.name: part.view(state.shape[:-1] + s.unconstrained_shape) for s, part in zip(self.sites, parts, strict=True)}

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        """
        A state ``[chains, size]`` from unconstrained values ``[chains, *unconstrained_shape]``; the inverse of :meth:`split`.

        :raises ValueError: naming a site that is missing, unknown or of another shape.
        """
        names = {site.name for site in self.sites}
        if set(params) != names:
            wrong = sorted(set(params) ^ names)[0]
            raise ValueError(f"site {wrong!r} is {'unknown to the model' if wrong in params else 'missing'}: expected {sorted(names)}")
        parts: list[Tensor] = []
        for site in self.sites:
            value = need_tensor(params[site.name], f"initial_params[{site.name!r}]")
            if value.dim() == 0 or value.shape[1:] != site.unconstrained_shape:
                raise ValueError(
                    f"site {site.name!r} has shape {tuple(value.shape)}: expected [chains, *{tuple(site.unconstrained_shape)}] in "
                    "unconstrained space"
                )
            if parts and len(value) != len(parts[0]):
                raise ValueError(
                    f"site {site.name!r} has values for {len(value)} chains, but site {self.sites[0].name!r} for {len(parts[0])}: give "
                    "values [chains, ...] for equally many chains at every site"
                )
            parts.append(value.detach().to(self.device, self.dtype).reshape(len(value), -1))
        return torch.cat(parts, dim=-1)

    @torch.no_grad()
    def constrain(self, state: Tensor) -> dict[str, Tensor]:
        """
        Values by site ``[chains, *shape]``, in the model's own space and dtypes. Values of sites that need no map are views into the
        state: clone them to keep them.
        """
        parts = self.split(state.detach())
        return {site.name: site.transform(parts[site.name]).to(site.dtype) for site in self.sites}

    @torch.no_grad()
    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """A state from values ``[chains, *shape]``; the inverse of :meth:`constrain`."""
        missing = [site.name for site in self.sites if site.name not in values]
        if missing:
            raise ValueError(f"site {missing[0]!r} is missing: values are needed for {[s.name for s in self.sites]}")
        given = {site.name: need_tensor(values[site.name], f"values[{site.name!r}]").to(self.device) for site in self.sites}
        return self.join({site.name: site.transform.inv(given[site.name]) for site in self.sites})

    @property
    def transforms(self) -> dict[str, Transform]:
        """Maps from the model's space to unconstrained space, by site, as Pyro's kernels give them."""
        return {site.name: site.transform.inv for site in self.sites}

    def scalar(self, value: float) -> Tensor:
        """A number (a temperature) as a tensor."""
        return torch.tensor(float(value), dtype=self.dtype, device=self.device)

    # -------------------------------------------------------------------------------------------------------- energy of a row

    def log_density(self, row: Tensor, temperature: Tensor, *tensors: Tensor) -> Tensor:
        """U at one row ``[size]``, on :meth:`inputs`."""
        values, log_jacobian = self._values(row)
        trace = self.trace(values, tensors)
        return -(trace.log_prob_sum() + temperature * log_jacobian).to(row.dtype)

    def data_loss(self, row: Tensor, temperature: Tensor, *tensors: Tensor) -> Tensor:
        """The negative log-likelihood of the rows in ``tensors``, the sum over rows, not scaled to all data."""
        return -log_likelihood(self.trace(self._values(row)[0], tensors, scaled=False)).to(row.dtype)

    def _values(self, row: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The sites' values at one row, and the logarithm of the Jacobian's determinant."""
        values, log_jacobian = {}, row.new_zeros(())
        for site, part in zip(self.sites, row.split([site.numel for site in self.sites]), strict=True):
            part = part.view(site.unconstrained_shape).to(site.dtype)
            values[site.name] = site.transform(part)
            if not _is_identity(site.transform):
                log_jacobian = log_jacobian + site.transform.log_abs_det_jacobian(part, values[site.name]).sum()
        return values, log_jacobian

    def energy_at(self, row: Tensor, temperature: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """U at one row ``[size]``, detached."""
        with torch.enable_grad(), pyro.validation_enabled(False):  # without gradients, PyTorch computes attention in another way
            return self.log_density(row.detach(), temperature, *tensors).detach()

    def slope_at(self, row: Tensor, temperature: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """U at one row ``[size]``, and its gradient ``[size]``."""
        with torch.enable_grad(), pyro.validation_enabled(False):
            row = row.detach().requires_grad_()
            energy = self.log_density(row, temperature, *tensors)
            (gradient,) = torch.autograd.grad(energy, row)
        return energy.detach(), gradient

    def input_slope(self, row: Tensor, temperature: Tensor, tensors: Sequence[Tensor], place: int) -> Tensor:
        """The gradient of :meth:`data_loss` with respect to the tensor at ``place``."""
        with torch.enable_grad(), pyro.validation_enabled(False):
            tensors = [t.detach() for t in tensors]
            moved = tensors[place].requires_grad_()
            loss = self.data_loss(row.detach(), temperature, *tensors)
            if not loss.requires_grad:
                return torch.zeros_like(moved)
            (gradient,) = torch.autograd.grad(loss, moved, allow_unused=True)
        return torch.zeros_like(moved) if gradient is None else gradient

    def hessian_product(self, row: Tensor, direction: Tensor, tensors: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The Hessian of U at one row ``[size]`` times a direction ``[size]``."""
        # the other ways to compute attention have no second derivative
        with torch.enable_grad(), pyro.validation_enabled(False), sdpa_kernel(SDPBackend.MATH):
            row = row.detach().requires_grad_()
            energy = self.log_density(row, self.scalar(temperature), *tensors)
            (gradient,) = torch.autograd.grad(energy, row, create_graph=True)
            if not gradient.requires_grad:  # U is linear
                return torch.zeros_like(direction)
            try:
                (product,) = torch.autograd.grad(gradient @ direction, row, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error) and "double backward" not in str(error):
                    raise
                raise ValueError(_without_curvature(self.model, error)) from None
        return torch.zeros_like(direction) if product is None else product.detach()

    def densities_at(self, row: Tensor, tensors: Sequence[Tensor]) -> Trace:
        """The model's trace at one row ``[size]``, with log-densities."""
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = self.trace(self._values(row)[0], tensors)
            trace.compute_log_prob()
        return trace


def _without_curvature(model: Callable, error: Exception) -> str:
    layers = {type(module).__name__.removeprefix("Pyro") for module in model.modules()} if isinstance(model, nn.Module) else set()
    where = " (nn.EmbeddingBag; nn.Embedding and a mean have one)" if "EmbeddingBag" in layers else ""
    what = str(error).splitlines()[0].rstrip(".")
    return (
        f'step_size="auto" needs second derivatives, and an operation of the model has none{where}: {what}. Give a step size, a number or '
        "a function of the step"
    )


def _is_identity(transform: Any) -> bool:
    base = getattr(transform, "base_transform", transform)
    return base is torch.distributions.transforms.identity_transform
