"""Checksums of what a model and a user's functions compute on fixed inputs. A resumed run must compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_advbayes.storage.files import FileError, random_state, set_random_state

PRIOR, DENSITY = "prior", "density"
_DEEPEST = 10  # distributions within distributions


def numbers(value: Tensor, rtol: float | None = None) -> Tensor:
    """
    Checksum of a tensor, ``[3]``: the sum of its elements and that of their absolute values, weighted so that a permutation is noticed,
    and the relative tolerance, a share of the second sum.

    :param rtol: the tolerance; by default 8 units in the last place.
    """
    rtol = rtol if rtol is not None else 8.0 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    flat = value.detach().reshape(-1).to("cpu", torch.float64).nan_to_num(0.0, 1e30, -1e30)
    weighted = flat * (1.5 + 0.5 * torch.cos(torch.arange(len(flat), dtype=torch.float64)))
    return torch.stack([weighted.sum(), weighted.abs().sum(), torch.tensor(rtol, dtype=torch.float64)])


def of_sites(traces: list[Trace], latent: set[str]) -> dict[str, Tensor]:
    """
    Checksums of parameters and log-density of every site's distribution, ``[n, 3]`` by name.

    :param traces: with log-densities.
    :param latent: names of the latent sites.
    """
    found: dict[str, list[Tensor]] = {}
    for trace in traces:
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and not site_is_subsample(node):
                # what is observed depends on sums over many weights, which another machine rounds in another way; a prior term on few
                term = isinstance(node["fn"], Unit) and not any(frame.vectorized for frame in node["cond_indep_stack"])
                what, rtol = (PRIOR, None) if name in latent else (DENSITY, 2e-6 if term else 1e-5)
                rows = found.setdefault(f"{what} at site {name!r}", [])
                rows += [numbers(part, rtol) for part in parameters(node["fn"])]
                rows.append(numbers(node["log_prob"], 1e-5))
    return {name: torch.stack(rows) for name, rows in found.items()}


def parameters(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The numbers in the public attributes of a distribution and of its component distributions and transforms."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield torch.tensor(value, dtype=torch.float32)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from parameters(item, depth + 1)
    elif isinstance(value, (Distribution, Transform)) and depth < _DEEPEST:
        # MixtureSameFamily has these as properties alone
        names = [name for name in vars(value) if not name.startswith("_")] + ["mixture_distribution", "component_distribution"]
        for name in sorted(names):
            yield from parameters(getattr(value, name, None), depth + 1)


def computed(function: Callable[[], list[Tensor]], device: torch.device, rtol: float = 1e-5) -> Tensor:
    """
    Checksums of the results of a user's functions, ``[n, 3]``. The state of the random generators is restored afterwards.

    :param function: computes the results.
    """
    state = random_state(device)
    try:
        return torch.stack([numbers(value, rtol) for value in function()])
    finally:
        set_random_state(state, device)


def check(now: Mapping[str, Tensor], then: Mapping[str, Any], path: Path) -> None:
    """
    :param now: checksums by name.
    :param then: those in a file.
    :raises ValueError: naming the first that differs.
    """
    for name in (*now, *then):
        here, there = now.get(name), then.get(name)
        whole = isinstance(there, Tensor) and there.dtype == torch.float64 and there.shape[1:] == (3,) and bool(there.isfinite().all())
        if there is not None and not whole:
            raise FileError(f"{path}: its reference {name[:100]!r} is no checksum: it is corrupt")
        same = False
        if here is not None and there is not None and here.shape == there.shape:
            room = torch.maximum(here[:, 1], there[:, 1]) * here[:, 2]
            same = bool(((here[:, :2] - there[:, :2]).abs() <= room[:, None]).all())
        if not same:
            if name.startswith((PRIOR, DENSITY)):
                raise ValueError(f"{path} is of another model: the {name} is another (its parameters, or what it depends on)")
            raise ValueError(f"{path} is of another run: its {name} computes other numbers from the same inputs")
