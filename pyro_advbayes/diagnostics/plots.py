"""Pictures of the diagnostics. Each draws on the axes it is given, or on a new figure, and writes the numbers in its
legend; matplotlib is imported on the first call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_advbayes.diagnostics.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_reliability(bins: Reliability, label: str = "", *, ax: Axes | None = None) -> Axes:
    """A reliability diagram: accuracy against confidence, one marker per bin that is not empty, its area growing with the
    number of inputs. Perfectly calibrated predictions lie on the dashed diagonal. Call it again with the same axes to
    compare.

    :param bins: from :func:`~pyro_advbayes.diagnostics.reliability`.
    :param label: what the predictions are called in the legend, which adds their ECE.
    """
    ax = ax if ax is not None else _axes()
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    full = (bins.count > 0).cpu()
    confidence, accuracy, count = (values.cpu()[full] for values in (bins.confidence, bins.accuracy, bins.count))
    (line,) = ax.plot(confidence, accuracy, linewidth=1, label=f"{label} (ECE {bins.ece:.3f})".lstrip())
    ax.scatter(confidence, accuracy, s=10 + 90 * count / count.sum(), color=line.get_color(), zorder=3)
    ax.legend()
    return ax


def plot_scores(
    scores: dict[str, Tensor], *, num_bins: int = 40, xlabel: str = "predictive entropy [nats]", ax: Axes | None = None
) -> Axes:
    """Histograms of uncertainty, as densities over the same bins, one for each set of inputs.

    :param scores: from the name of a set to its scores, ``[N]``; the legend adds their mean.
    :param num_bins: number of bins between the smallest and the largest score of all sets.
    :param xlabel: what the scores are.
    :raises ValueError: if there are no scores, or one is not finite.
    """
    values = {name: score.detach().cpu().double() for name, score in scores.items()}
    for name, score in values.items():
        if score.dim() != 1 or len(score) == 0 or not score.isfinite().all():
            raise ValueError(f"scores[{name!r}] must be a vector of finite numbers, not {list(score.shape)}")
    if not values:
        raise ValueError("scores must name at least one set of inputs")
    ax = ax if ax is not None else _axes()
    every = torch.cat(list(values.values()))
    low, high = every.min().item(), every.max().item()
    high = max(high, low + 1e-6)  # all alike: a network that is sure everywhere
    edges = torch.linspace(low, high, num_bins + 1, dtype=torch.float64)
    for name, score in values.items():
        ax.hist(score, bins=edges, density=True, histtype="stepfilled", alpha=0.5, label=f"{name} (mean {score.mean():.3g})")
    ax.set(xlabel=xlabel, ylabel="density")
    ax.legend()
    return ax


def _axes() -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots()[1]
