"""Whether a run was right, and whether it said so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from tests.benchmarks.trust_references import Moments

MEAN_SLACK, SD_SLACK = 0.1, 0.1  # what a run may be off by, in posterior standard deviations and as a share, beside its own error
ERRORS = 4.0  # Monte-Carlo standard errors allowed: a run is the worst of up to 42 comparisons
POOR_ESS, POOR_R_HAT = 3.0, 1.2  # per chain; worse than this a run has to warn even where it happens to be right
GOOD_ESS, GOOD_R_HAT = 25.0, 1.05  # better than this a warning is a false alarm where the run is right

VERDICTS = ("right", "warned", "refused", "false alarm", "SILENT")


class Findings(NamedTuple):
    """
    Of all elements of all sites, the worst.

    :ivar mean: error of the mean in posterior standard deviations, signed.
    :ivar mean_error: its Monte-Carlo standard error.
    :ivar sd_low: smallest ratio of the sampled to the true standard deviation; ``sd_high``, the largest.
    :ivar sd_error: Monte-Carlo standard error of the worse of the two.
    :ivar sd_mean: geometric mean of the ratios over elements.
    :ivar excess: how far the worst number lies beyond what is allowed, over what is allowed: above 0 the run is wrong.
    :ivar ess: smallest effective sample size per chain; ``r_hat``, the largest split R-hat.
    :ivar lost: chains that are not finite, or missing.
    """

    mean: float
    mean_error: float
    sd_low: float
    sd_high: float
    sd_error: float
    sd_mean: float
    excess: float
    ess: float
    r_hat: float
    lost: int

    @property
    def wrong(self) -> bool:
        """Whether a warning is due."""
        return not (self.excess <= 0.0 and self.ess >= POOR_ESS and self.r_hat <= POOR_R_HAT and self.lost == 0)

    @property
    def excellent(self) -> bool:
        """Whether a warning would be a false alarm."""
        return not self.wrong and self.ess >= GOOD_ESS and self.r_hat <= GOOD_R_HAT


def find(samples: Mapping[str, Tensor], moments: Mapping[str, Moments], num_chains: int, lost: int) -> Findings:
    """
    Compares draws with the posterior.

    :param samples: ``[chains, draws, *shape]`` by site.
    :param num_chains: how many chains were asked for.
    :param lost: how many of them the run says were lost.
    """
    draws = torch.cat(
        [samples[name].double().flatten(2) if samples[name].dim() > 2 else samples[name].double().unsqueeze(-1) for name in moments], -1
    )
    mean, sd, kurtosis = (torch.cat([getattr(m, part).flatten() for m in moments.values()]) for part in ("mean", "sd", "kurtosis"))
    reference = min(m.ess for m in moments.values())
    finite = draws.isfinite().all(-1).all(-1)
    lost = max(lost, num_chains - int(finite.sum()))
    if not finite.all():  # what the user gets is all of it
        return Findings(math.inf, math.inf, math.nan, math.inf, math.inf, math.inf, math.inf, 0.0, math.inf, lost)
    own_mean = draws.mean((0, 1))
    off = (own_mean - mean) / sd
    ratio = (draws - own_mean).square().mean((0, 1)).sqrt() / sd
    size, square_size = _size(draws), _size((draws - own_mean).square())
    off_error = (1.0 / size + 1.0 / reference).sqrt()
    ratio_error = 0.5 * ((kurtosis - 1.0) * (1.0 / square_size + 1.0 / reference)).sqrt()
    off_excess = off.abs() / (MEAN_SLACK + ERRORS * off_error) - 1.0
    # a ratio of 1/10 is as bad as one of 10: both are distances of logarithms
    ratio_excess = ratio.log().abs() / (math.log1p(SD_SLACK) + ERRORS * ratio_error) - 1.0
    worst_off, worst_ratio = int(off_excess.argmax()), int(ratio_excess.nan_to_num(math.inf).argmax())
    r_hat = split_gelman_rubin(draws, chain_dim=0, sample_dim=1).nan_to_num(math.inf)
    return Findings(
        mean=float(off[worst_off]),
        mean_error=float(off_error[worst_off]),
        sd_low=float(ratio.min()),
        sd_high=float(ratio.max()),
        sd_error=float(ratio_error[worst_ratio]),
        sd_mean=float(ratio.log().mean().exp()),
        excess=float(torch.maximum(off_excess.max(), ratio_excess.nan_to_num(math.inf).max())),
        ess=float(size.min()) / len(draws),
        r_hat=float(r_hat.max()),
        lost=lost,
    )


def verdict(findings: Findings | None, warned: bool) -> str:
    """One of :data:`VERDICTS`; without findings, the run raised an error."""
    if findings is None:
        return "refused"
    if findings.wrong:
        return "warned" if warned else "SILENT"
    if warned:
        return "false alarm" if findings.excellent else "warned"
    return "right"


def _size(draws: Tensor) -> Tensor:
    """Effective sample size; 1 for a chain that stands still, and at most the number of draws, which it is for draws that alternate."""
    most = draws.shape[0] * draws.shape[1]
    size = effective_sample_size(draws, chain_dim=0, sample_dim=1).nan_to_num(1.0)
    return torch.where(size <= 0.0, most, size).clamp(1.0, most)
