"""Diagnostics of draws in bounded time for any number of weights: of evenly spaced elements, or in function space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from scipy.stats import rankdata
from torch import Tensor

from pyro_advbayes.given import check_int


def spaced(values: Tensor, max_elements: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Up to ``max_elements`` evenly spaced elements ``[chains, draws, k]`` of draws ``[chains, draws, *shape]``, and their indices."""
    check_int(max_elements, "max_elements", 1)
    shape = values.shape[2:]
    if not shape:
        return values.unsqueeze(-1).double(), [()]
    total = shape.numel()
    places = torch.linspace(0, total - 1, max_elements).round().long() if total > max_elements else torch.arange(total)
    where = list(zip(*(i.tolist() for i in torch.unravel_index(places, shape)), strict=True))
    return values.flatten(2)[..., places].double(), where


def effective_size(values: Tensor) -> Tensor:
    """
    Effective sample sizes ``[k]`` of ``[chains, draws, k]``, at most N log10 N of N draws. An estimate below 0, from draws that alternate,
    becomes that bound. NaN for fewer than 4 draws.
    """
    if values.shape[1] < 4:
        return torch.full(values.shape[2:], math.nan)
    together = max(1, 2**18 // values.shape[1] ** 2)  # Pyro's estimate makes a matrix of draws by draws for each column
    found = torch.cat([effective_sample_size(columns, chain_dim=0, sample_dim=1) for columns in values.split(together, -1)])
    total = values.shape[0] * values.shape[1]
    most = total * math.log10(total)
    return torch.where(found <= 0.0, most, found).clamp_max(most)


def shrink_factor(values: Tensor) -> Tensor:
    r"""
    Rank-normalised split R-hat (Vehtari et al., 2021, section 4): the larger one of the draws and of their distances from the median,
    after the r-th of S draws is replaced by :math:`\Phi^{-1}((r - 3/8) / (S + 1/4))`. It detects chains of different spread, also for draws
    without a finite variance.

    :param values: ``[chains, draws, k]``.
    :return: ``[k]``; NaN for fewer than 4 draws, and for values that never change.
    """
    if values.shape[1] < 4:
        return torch.full(values.shape[2:], math.nan)
    folded = (values - values.flatten(0, 1).quantile(0.5, dim=0)).abs()
    both = torch.stack([split_gelman_rubin(normal_scores(each), chain_dim=0, sample_dim=1) for each in (values, folded)])
    return torch.where(both.isnan().any(0), both[0], both.amax(0))  # two values alone are equally far from their median


def normal_scores(values: Tensor) -> Tensor:
    """Draws ``[chains, draws, k]`` by their ranks among all, as quantiles of a standard normal law."""
    flat = values.flatten(0, 1)
    ranks = torch.from_numpy(rankdata(flat.double().numpy(), axis=0)).reshape(values.shape)
    return torch.special.ndtri((ranks - 0.375) / (len(flat) + 0.25))


def stands_still(values: Tensor) -> Tensor:
    """Whether some chain never moved, ``[k]``, in draws ``[chains, draws, k]``; False for a single draw."""
    if values.shape[1] < 2:
        return torch.zeros(values.shape[2:], dtype=torch.bool)
    return (values == values[:, :1]).all(1).any(0)


def by_site(samples: Mapping[str, Tensor], max_elements: int) -> dict[str, dict[str, Tensor]]:
    """``{site: {"n_eff", "r_hat"}}``, in the site's shape if it has at most ``max_elements``."""
    result = {}
    for name, values in samples.items():
        picked, where = spaced(values, max_elements)
        shape = values.shape[2:] if len(where) == values.shape[2:].numel() else (len(where),)
        result[name] = {"n_eff": effective_size(picked).reshape(shape), "r_hat": shrink_factor(picked).reshape(shape)}
    return result


def function_values(
    model: Callable, samples: Mapping[str, Tensor], num_chains: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """The model's return values at some inputs, ``[chains, draws, *shape]``."""
    from pyro_advbayes.infer.predictive import Predictive

    values = Predictive(model, dict(samples), return_sites=["_RETURN"])(*args, **kwargs)["_RETURN"].detach()
    return values.reshape(num_chains, -1, *values.shape[1:])


def table(samples: Mapping[str, Tensor], prob: float, max_elements: int) -> str:
    """A table in words, a row per element."""
    if not 0.0 < prob < 1.0:
        raise ValueError(f"prob={prob!r}: the probability of the interval, in (0, 1)")
    low, high = 0.5 - prob / 2, 0.5 + prob / 2
    names = ("", "mean", "std", "median", f"{low:.1%}", f"{high:.1%}", "n_eff", "r_hat")
    rows: list[tuple[str, ...]] = [names]
    for name, values in samples.items():
        picked, where = spaced(values, max_elements)
        flat = picked.reshape(-1, picked.shape[-1])
        quantiles = torch.quantile(flat, torch.tensor([0.5, low, high], dtype=flat.dtype), dim=0)
        columns = [flat.mean(0), flat.std(0), *quantiles, effective_size(picked), shrink_factor(picked)]
        still = stands_still(picked)
        for i, place in enumerate(where):
            label = name + (str(list(place)).replace(" ", "") if place else "")
            cells = [f"{float(column[i]):.2f}" for column in columns]
            if still[i]:  # R-hat of a constant is no sign of convergence
                cells[-1] = "still"
            rows.append((label, *cells))
        hidden = values.shape[2:].numel() - len(where)
        if hidden:
            rows.append((f"  ({hidden} more)", *[""] * (len(names) - 1)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    )
