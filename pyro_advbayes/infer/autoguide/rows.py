"""Draws of a posterior as flat rows in unconstrained space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from pyro_advbayes.given import need_tensor
from pyro_advbayes.infer.conditioned import without_leading_ones
from pyro_advbayes.model.structure import Site
from pyro_advbayes.storage.draws import read_draws

# The size, in numbers, of a chunk, and up to which all rows are kept in memory: 2^26 float32 numbers are 256 MiB.
CHUNK, READY = 2**22, 2**26


def read_samples(samples: Mapping[str, Tensor] | str | Path) -> tuple[dict[str, Tensor], str]:
    """
    Draws by site ``[chains, draws, *shape]`` and their name in messages, from a dict ``[draws, *shape]`` (``mcmc.get_samples()``), a file
    of draws, or the result of ``read_draws``; a file's tensors stay mapped.

    :raises ValueError: naming a site whose draws are missing, not of floating type, or differ in number from those of the others.
    """
    source, grouped = "samples", False
    if isinstance(samples, (str, Path)):
        source, grouped, samples = str(samples), True, read_draws(samples)
    if not isinstance(samples, Mapping) or not samples:
        raise ValueError("samples: a dict of draws, site -> [draws, *shape], or the path of a file of draws; got none")
    grouped = grouped or any(name.startswith("sample_stats/") for name in samples)
    values = {name: value for name, value in samples.items() if not name.startswith(("sample_stats/", "extras/"))}
    for name, value in values.items():
        if not need_tensor(value, f"{source}[{name!r}]").is_floating_point() or value.dim() < 1 + grouped:
            raise ValueError(f"{source}: site {name!r} must be a tensor [draws, *shape] of floating type")
    values = {name: (value if grouped else value.unsqueeze(0)).detach() for name, value in values.items()}
    lengths = {name: value.shape[0] * value.shape[1] for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: there must be equally many draws of every site, got {lengths}")
    return values, source


def sites_of(values: Mapping[str, Tensor], transforms: Mapping[str, Transform] | None = None) -> tuple[Site, ...]:
    """
    Sites of draws ``[chains, draws, *shape]``.

    :param transforms: their maps from unconstrained space; a site without one is taken for real, since draws do not tell a support.
    """
    sites, start = [], 0
    for name, value in values.items():
        shape = value.shape[2:]
        dtype = torch.promote_types(value.dtype, torch.float32)  # draws may be kept in half precision
        transform = (transforms or {}).get(name, biject_to(constraints.real))
        sites.append(Site(name, shape, dtype, torch.Size(transform.inverse_shape(shape)), transform, start))
        start += sites[-1].numel
    return tuple(sites)


def constrained(sites: Sequence[Site], rows: Tensor) -> dict[str, Tensor]:
    """Site -> ``[n, *shape]``, in the model's own space, of rows ``[n, P]``."""
    parts = rows.split([site.numel for site in sites], dim=-1)
    return {
        site.name: site.transform(part.reshape(-1, *site.unconstrained_shape)).to(site.dtype)
        for site, part in zip(sites, parts, strict=True)
    }


def row_dtype(sites: Sequence[Site]) -> torch.dtype:
    """One dtype for all sites."""
    dtype = sites[0].dtype
    for site in sites:
        dtype = torch.promote_types(dtype, site.dtype)
    return dtype


class Rows:
    """
    Base: draws as rows ``[n, P]`` in unconstrained space.

    :param sites: the sites in the order of a row.
    :param dtype: of the rows.
    :param device: where they are.
    :param source: name of the draws in messages.
    """

    changing = False  # whether rows are replaced later

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, device: torch.device, source: str) -> None:
        self.sites, self.dtype, self.device, self.source = tuple(sites), dtype, device, source
        self.size = sum(site.numel for site in sites)

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, index: Tensor) -> Tensor:
        """Rows ``[len(index), P]``."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Tensor]:
        """All rows in order, some at a time."""
        for index in torch.arange(len(self)).split(max(1, CHUNK // self.size)):
            yield self.take(index)

    def moments(self) -> tuple[Tensor, Tensor]:
        """
        Mean and standard deviation ``[P]``, in one pass.

        :raises ValueError: naming site and draw, if a number is not finite.
        """
        count, mean = 0, torch.zeros((), dtype=torch.float64)
        square = mean
        for rows in self.chunks():
            wide = rows.double()
            if not bool(wide.sum().isfinite()):
                self._name_culprit(rows, count)
            here = wide.mean(0)
            total = count + len(rows)
            square = square + (wide - here).square_().sum(0) + (here - mean) ** 2 * (count * len(rows) / total)
            mean, count = mean + (here - mean) * (len(rows) / total), total
        return mean.to(self.dtype), (square / max(1, count - 1)).sqrt().to(self.dtype)

    def _name_culprit(self, rows: Tensor, before: int) -> None:
        for row, place in (~rows.isfinite()).nonzero()[:1].tolist():
            site = site_at(self.sites, place)
            raise ValueError(
                f"{self.source}: draw {before + row} of site {site.name!r} is not finite in unconstrained space (NaN, infinite, or on the "
                "boundary of its support): leave out chains that were lost"
            )


class SampleRows(Rows):
    """
    Draws as rows ``[n, P]`` in unconstrained space, computed on request, so that a file of draws may be larger than memory.

    :param values: site -> ``[chains, draws, *shape]``.
    :param sites: the sites in the order of a row.
    :param dtype: of the rows.
    :param device: where the rows are made.
    :param source: name of the draws in messages.
    :raises ValueError: naming the site that is missing, unknown or of another shape, or whose draws are not finite.
    """

    def __init__(
        self, values: Mapping[str, Tensor], sites: Sequence[Site], dtype: torch.dtype, device: torch.device, source: str = "samples"
    ) -> None:
        names = [site.name for site in sites]
        for name in names:
            if name not in values:
                raise ValueError(f"{source}: site {name!r} is missing; draws are needed of {names}")
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"{source}: site {unknown[0]!r} is not among the guide's, {names}: leave it out")
        for site in sites:
            if without_leading_ones(values[site.name].shape[2:]) != without_leading_ones(site.shape):
                shape = tuple(values[site.name].shape[2:])
                raise ValueError(f"{source}: a draw of site {site.name!r} has shape {shape}, the site has {tuple(site.shape)}")
        super().__init__(sites, dtype, device, source)
        self._values = [values[name] for name in names]
        self._draws = self._values[0].shape[1]
        self._ready: Tensor | None = None
        if len(self) * self.size <= READY:
            self._ready = self._made(torch.arange(len(self)))

    def __len__(self) -> int:
        return self._values[0].shape[0] * self._draws

    def take(self, index: Tensor) -> Tensor:
        return self._made(index) if self._ready is None else self._ready[index.to(self.device)]

    def _made(self, index: Tensor) -> Tensor:
        chain, draw = index.cpu() // self._draws, index.cpu() % self._draws
        rows = torch.empty(len(index), self.size, dtype=self.dtype, device=self.device)
        for site, value in zip(self.sites, self._values, strict=True):
            part = value[chain.to(value.device), draw.to(value.device)].to(self.device, site.dtype).reshape(-1, *site.shape)
            rows[:, site.start : site.start + site.numel] = site.transform.inv(part).reshape(len(index), -1)
        return rows


def site_at(sites: Sequence[Site], place: int) -> Site:
    """The site of an element of a row."""
    return next(site for site in sites if site.start <= place < site.start + site.numel)
