"""Plots of the diagnostics. Each draws on the given axes, or on a new figure, and writes the numbers in its
legend; matplotlib, the extra ``plots``, is imported on the first call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.acquisition import LearningCurve, RegressionCurve, over_repetitions
from pyro_advbayes.diagnostics.calibration import Reliability
from pyro_advbayes.diagnostics.draws import DrawQuality, RetainedAccuracy
from pyro_advbayes.diagnostics.regression import IntervalCalibration
from pyro_advbayes.diagnostics.robustness import AccuracyCurve, GradientNorms
from pyro_advbayes.given import check_int, kind, need_extra, need_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked
def plot_reliability(bins: Reliability, label: str = "", *, ax: Axes | None = None) -> Axes:
    """A reliability diagram: accuracy against confidence, one marker per bin that is not empty, its area growing with the
    number of inputs. Perfectly calibrated predictions lie on the dashed diagonal. Call it again with the same axes to compare
    predictions.

    :param bins: from :func:`~pyro_advbayes.diagnostics.reliability`.
    :param label: name of the predictions in the legend, which adds their ECE.
    """
    ax = _axes(ax)
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    full = (bins.count > 0).cpu()
    confidence, accuracy, count = (values.cpu()[full] for values in (bins.confidence, bins.accuracy, bins.count))
    (line,) = ax.plot(confidence, accuracy, linewidth=1, label=f"{label} (ECE {bins.ece:.3f})".lstrip())
    ax.scatter(confidence, accuracy, s=10 + 90 * count / count.sum(), color=line.get_color(), zorder=3)
    ax.legend()
    return ax


@checked
def plot_interval_calibration(calibrations: dict[str, IntervalCalibration], *, ax: Axes | None = None) -> Axes:
    """Coverage of central intervals against their nominal level, with one standard error over rows as a band. A calibrated law lies on
    the dashed diagonal, an overconfident one below it.

    :param calibrations: from the name of a predictive law to what :func:`~pyro_advbayes.diagnostics.interval_calibration` gave; the
        legend adds its expected coverage error (ECPE), its CWCE and the mean width of its intervals (EPIW).
    :raises ValueError: if there are none.
    """
    ax = _axes_for(calibrations, "calibrations", "one predictive law", ax, layout="constrained")
    ax.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    for name, found in calibrations.items():
        levels, covered = found.levels.cpu(), found.coverage.cpu()
        error = (covered * (1 - covered) / found.count).sqrt()
        label = f"{name} (ECPE {found.ecpe:.3f}, CWCE {found.cwce:.2f} %, EPIW {found.epiw:.3g})"
        _band(ax, levels, covered, covered - error, covered + error, label, linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level of the interval", ylabel="share of targets inside", aspect="equal")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1))  # curves may be anywhere in the axes
    return ax


@checked
def plot_scores(
    scores: dict[str, Tensor], *, num_bins: int = 40, xlabel: str = "predictive entropy [nats]", ax: Axes | None = None
) -> Axes:
    """Histograms of uncertainty, as densities over the same bins, one for each set of inputs.

    :param scores: from the name of a set to its scores, ``[N]``; the legend adds their mean.
    :param num_bins: number of bins between the smallest and the largest score of all sets.
    :param xlabel: what the scores are.
    :raises ValueError: if there are no scores, or one is not finite.
    """
    values = {name: need_tensor(score, f"scores[{name!r}]").detach().cpu().double() for name, score in scores.items()}
    for name, score in values.items():
        if score.dim() != 1 or len(score) == 0 or not score.isfinite().all():
            raise ValueError(f"scores[{name!r}] must be a vector of finite numbers, not {list(score.shape)}")
    ax = _axes_for(values, "scores", "one set of inputs", ax)
    every = torch.cat(list(values.values()))
    low, high = every.min().item(), every.max().item()
    high = max(high, low + 1e-6)  # equal scores, of a network that is certain everywhere
    check_int(num_bins, "num_bins", 1, most=10**6)
    edges = torch.linspace(low, high, num_bins + 1, dtype=torch.float64)
    for name, score in values.items():
        ax.hist(score, bins=edges.tolist(), density=True, histtype="stepfilled", alpha=0.5, label=f"{name} (mean {score.mean():.3g})")
    return _labelled(ax, xlabel=xlabel, ylabel="density")


@checked
def plot_accuracy_curves(curves: dict[str, AccuracyCurve], *, xlabel: str = "eps", ax: Axes | None = None) -> Axes:
    """Accuracy against the size of the perturbation, with one standard error as a band.

    :param curves: from the name of a classifier to what :func:`~pyro_advbayes.diagnostics.accuracy_curve` gave; the legend adds the
        accuracy at the smallest and at the largest size.
    :param xlabel: what the sizes are.
    :raises ValueError: if there are no curves.
    """
    ax = _axes_for(curves, "curves", "one classifier", ax)
    for name, (eps, accuracy, error) in curves.items():
        _band(ax, eps, accuracy, accuracy - error, accuracy + error, f"{name} ({accuracy[0]:.3f} to {accuracy[-1]:.3f})")
    return _labelled(ax, xlabel=xlabel, ylabel="accuracy under attack")


@checked
def plot_learning_curves(
    curves: dict[str, LearningCurve] | dict[str, RegressionCurve], *, score: str = "accuracy", ax: Axes | None = None
) -> Axes:
    """A score on test data against the number of labels, mean over repetitions, with one standard error as a band.

    :param curves: from the name of an acquisition to its curve; the legend adds the score at the end.
    :param score: ``"accuracy"``; of regressions ``"rmse"`` or ``"log_density"``.
    :raises ValueError: if there are no curves, or one has no such score.
    """
    for name, curve in curves.items():
        if score not in curve._fields[1:]:
            raise ValueError(f"score={score!r}: curves[{name!r}] has {' and '.join(curve._fields[1:])}")
    ax = _axes_for(curves, "curves", "one acquisition", ax)
    for name, curve in curves.items():
        mean, error = (values.cpu() for values in over_repetitions(getattr(curve, score)))
        _band(ax, curve.num_labels.cpu(), mean, mean - error, mean + error, f"{name} (to {mean[-1]:.3f})")
    names = {"rmse": "RMSE", "log_density": "log predictive density [nats]"}
    return _labelled(ax, xlabel="labels", ylabel=names.get(score, score))


@checked
def plot_gradient_norms(norms: dict[str, GradientNorms], *, ax: Axes | None = None) -> Axes:
    """The l2 norm of the expected loss gradient against the number of draws, on logarithmic axes, as a mean over inputs. The dashed line is
    the norm of as many independent gradients of expectation zero.

    :param norms: from the name of a posterior to what :func:`~pyro_advbayes.diagnostics.gradient_norms` gave; the legend adds the
        mean norm at the first and at the last number of draws.
    :raises ValueError: if there are none.
    """
    ax = _axes_for(norms, "norms", "one posterior", ax)
    for name, found in norms.items():
        mean = found.l2.mean(-1).cpu()
        (line,) = ax.loglog(found.draws, mean, marker="o", markersize=3, label=f"{name} ({mean[0]:.2g} to {mean[-1]:.2g})")
        ax.loglog(found.draws, found.l2_by_chance.mean(-1).cpu(), color=line.get_color(), linestyle="--", linewidth=1)
    return _labelled(ax, xlabel="draws", ylabel="l2 norm of the mean gradient (dashed: by chance)")


@checked
def plot_accuracy_robustness(points: dict[str, tuple[Tensor, Tensor]], *, ax: Axes | None = None) -> Axes:
    """A point for every trained classifier: its robustness against its clean accuracy.

    :param points: from the name of a family of classifiers (of a kind of inference, say) to their accuracies and robustnesses, ``[M]``
        each; the legend adds the correlation of the two, where it is defined.
    :raises ValueError: if there are no points, or a family's two vectors differ in length.
    """
    for name, (accuracy, robustness) in points.items():
        for i, values in enumerate((accuracy, robustness)):
            need_tensor(values, f"points[{name!r}][{i}]")
        if accuracy.dim() != 1 or accuracy.shape != robustness.shape:
            raise ValueError(f"points[{name!r}] must be two vectors of one length, not {list(accuracy.shape)} and {list(robustness.shape)}")
    ax = _axes_for(points, "points", "one family of classifiers", ax)
    for name, pair in points.items():
        both = torch.stack([values.detach().cpu().double() for values in pair])
        varied = both.shape[1] > 2 and bool((both.std(1) > 0).all())
        label = f"{name} (r = {torch.corrcoef(both)[0, 1]:.2f}, {both.shape[1]} points)" if varied else name
        ax.scatter(both[0], both[1], s=20, alpha=0.7, label=label)
    return _labelled(ax, xlabel="accuracy", ylabel="softmax robustness")


@checked
def plot_draw_quality(qualities: dict[str, DrawQuality], *, ax: Axes | None = None) -> Axes:
    """Accuracies of single draws, a column of dots for each posterior, with the mean prediction's as a line across.

    :param qualities: from the name of a posterior to what :func:`~pyro_advbayes.diagnostics.draw_quality` gave; the legend adds the
        lowest, the highest and the ensembled accuracy.
    :raises ValueError: if there are none.
    """
    ax = _axes_for(qualities, "qualities", "one posterior", ax)
    for place, (name, quality) in enumerate(qualities.items()):
        ensembled = quality.ensembled.value
        label = f"{name} ({quality.lowest:.3f} to {quality.highest:.3f}, together {ensembled:.3f})"
        # side by side in the order of the draws: equal accuracies would hide each other
        across = place + torch.linspace(-0.3, 0.3, len(quality.accuracy))
        dots = ax.scatter(across, quality.accuracy.cpu(), s=8, alpha=0.7, label=label)
        ax.hlines(ensembled, place - 0.35, place + 0.35, color=dots.get_facecolor()[0], alpha=1.0)
    ax.set_xticks(range(len(qualities)), list(qualities))
    return _labelled(ax, ylabel="accuracy of a draw")


@checked
def plot_draw_curves(curves: dict[str, Sequence[DrawQuality]], *, xlabel: str = "epoch", ax: Axes | None = None) -> Axes:
    """Accuracy of draws during training: the mean prediction as a line, the worst to the best draw as a band.

    :param curves: from the name of a run to what :func:`~pyro_advbayes.diagnostics.draw_quality` gave after each epoch; the legend adds
        the ensembled and the lowest accuracy at the end.
    :param xlabel: what is counted, from 1.
    :raises ValueError: if there are no runs, or a run has no epochs.
    """
    ax = _axes_for(curves if all(curves.values()) else {}, "curves", "one run, of one epoch or more", ax)
    for name, run in curves.items():
        label = f"{name} ({run[-1].ensembled.value:.3f}, lowest {run[-1].lowest:.3f})"
        ensembled = [quality.ensembled.value for quality in run]
        _band(ax, range(1, len(run) + 1), ensembled, [q.lowest for q in run], [q.highest for q in run], label)
    return _labelled(ax, xlabel=xlabel, ylabel="accuracy")


@checked
def plot_retained_accuracy(curves: dict[str, RetainedAccuracy], *, ax: Axes | None = None) -> Axes:
    """Accuracy against the share of inputs that are kept, the most certain first.

    :param curves: from the name of a posterior to what :func:`~pyro_advbayes.diagnostics.retained_accuracy` gave; the legend adds the
        accuracy at the smallest and at the largest share.
    :raises ValueError: if there are no curves.
    """
    ax = _axes_for(curves, "curves", "one posterior", ax)
    for name, (share, accuracy) in curves.items():
        ax.plot(share, accuracy, marker="o", markersize=3, label=f"{name} ({accuracy[0]:.3f} to {accuracy[-1]:.3f})")
    return _labelled(ax, xlabel="share of inputs kept", ylabel="accuracy")


@checked
def plot_uncertainty_map(
    scores: Tensor,
    x1: Tensor,
    x2: Tensor,
    *,
    examples: tuple[Tensor, Tensor] | None = None,
    label: str = "predictive entropy [nats]",
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Uncertainty over a plane of inputs, as colours; the title gives its mean. ::

        axis = torch.linspace(-5, 5, 101)
        inputs = torch.cartesian_prod(axis, axis)
        plot_uncertainty_map(predictive_entropy(probs(inputs)), axis, axis, examples=(x, y), limits=(0, math.log(2)))

    :param scores: of the inputs ``torch.cartesian_prod(x1, x2)``, ``[len(x1) * len(x2)]``.
    :param x1: values of the first coordinate, to the right, increasing.
    :param x2: values of the second, upwards, increasing.
    :param examples: inputs ``[N, 2]`` and their classes ``[N]``, to be shown as points.
    :param label: what the scores are, for the colour bar.
    :param limits: scores at both ends of the colour scale, to compare maps; by default the smallest and the largest.
    :raises ValueError: if the scores do not fit the coordinates, or one is not finite.
    """
    for name, values in (("scores", scores), ("x1", x1), ("x2", x2)):
        if need_tensor(values, name).is_complex():
            raise ValueError(f"{name} is a tensor of complex numbers: real ones are needed")
    for name, values in (("x1", x1), ("x2", x2)):
        if values.dim() != 1 or not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be a tensor of finite numbers, of one dimension, not {list(values.shape)}")
    if scores.shape != (len(x1) * len(x2),) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"scores must be {len(x1) * len(x2)} finite numbers, one for each of cartesian_prod(x1, x2), not {list(scores.shape)}"
        )
    ax = _axes(ax)
    right, up, table = x1.cpu().numpy(), x2.cpu().numpy(), scores.detach().cpu().reshape(len(x1), len(x2)).mT.numpy()
    low, high = limits if limits is not None else (None, None)
    mesh = ax.pcolormesh(right, up, table, shading="nearest", vmin=low, vmax=high, cmap="viridis", rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=label, shrink=0.8)
    if examples is not None:
        x, y = (need_tensor(values, f"examples[{i}]").cpu().numpy() for i, values in enumerate(examples))
        ax.scatter(x[:, 0], x[:, 1], c=y, cmap="coolwarm", edgecolors="white", linewidths=0.7, s=25)
    ax.set(aspect="equal", title=f"mean {table.mean():.3f}")
    return ax


def _band(ax: Axes, x: Any, y: Any, low: Any, high: Any, label: str, **style: Any) -> None:
    """A line with a band."""
    (line,) = ax.plot(x, y, marker="o", markersize=3, label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _labelled(ax: Axes, **settings: Any) -> Axes:
    """The finished axes, with labels and a legend."""
    ax.set(**settings)
    ax.legend()
    return ax


def _axes_for(values: Mapping[str, Any], name: str, what: str, ax: Axes | None, **figure: Any) -> Axes:
    """:raises ValueError: if the plot would be empty."""
    if not values:
        raise ValueError(f"{name} must name at least {what}")
    return _axes(ax, **figure)


def _axes(ax: Axes | None, **figure: Any) -> Axes:
    if ax is None:
        return need_extra("matplotlib.pyplot", "plots").subplots(**figure)[1]
    if not isinstance(ax, need_extra("matplotlib.axes", "plots").Axes):
        raise ValueError(f"ax is {kind(ax)}: axes of Matplotlib are needed, or None for new ones")
    return ax
