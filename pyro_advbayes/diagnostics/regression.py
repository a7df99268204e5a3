r"""Scores of regressions, central intervals and their calibration.

A prediction for ``N`` rows is one of these:

- draws of the target, ``[draws, N]``, of any likelihood (``Predictive(...)["obs"]``);
- ``mean`` and ``scale`` of a Normal for each row, ``[N]``;
- ``mean`` and ``scale`` of each posterior draw's Normal, ``[draws, N]``: the law is their equal mixture
  :math:`\frac1S \sum_s \mathrm{Normal}(\mu_s, \sigma_s)`. ``scale`` may be anything that broadcasts to the shape of ``mean``.

Targets ``y`` are ``[N]``. Scores of rows are ``[N]``, in the units that the docstring names; their mean is the score of the
data. Functions compute in float64 and raise ``ValueError`` on wrong shapes and on numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import like
from pyro_advbayes.diagnostics.robustness import Estimate
from pyro_advbayes.given import check_choice, check_int, need_tensor

LEVELS = tuple(j / 20 for j in range(1, 20))  # 0.05, 0.10, ..., 0.95
LAWS = ("mixture", "moments")
EXACT = 1e-10  # tolerance of the probability below a quantile of a mixture
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@checked
def rmse(mean: Tensor, y: Tensor) -> float:
    """Root mean squared error, in the units of ``y``.

    :param mean: predicted means ``[N]``, or ``[draws, N]``, whose mean over draws is judged.
    :param y: targets ``[N]``.
    """
    mean, y = _checked("mean", mean, y, ranks=(1, 2))
    return _over_draws(mean).sub(y).square().mean().sqrt().item()


@checked
def r2(mean: Tensor, y: Tensor) -> float:
    r"""Coefficient of determination, :math:`1 - \sum_i (y_i - \bar\mu_i)^2 / \sum_i (y_i - \bar y)^2`, at most 1.

    :param mean: as for :func:`rmse`.
    :param y: targets ``[N]``.
    :raises ValueError: if all targets are equal, where it is undefined.
    """
    mean, y = _checked("mean", mean, y, ranks=(1, 2))
    return (1 - _over_draws(mean).sub(y).square().mean() / _variance(y)).item()


@checked
def gaussian_nll(mean: Tensor, scale: Tensor | float, y: Tensor, law: str = "mixture") -> Tensor:
    r"""Negative log-density of the targets, in nats per row.

    :param mean: ``[N]`` or ``[draws, N]``.
    :param scale: standard deviations, > 0.
    :param y: targets ``[N]``.
    :param law: how the Normals of several draws are combined. ``"mixture"`` is the posterior predictive law,
        :math:`-\log \frac1S \sum_s \mathrm{Normal}(y; \mu_s, \sigma_s)`. ``"moments"`` is the Normal of the same mean and variance,
        :math:`\bar\mu` and :math:`\frac1S \sum_s \sigma_s^2 + \frac1S \sum_s (\mu_s - \bar\mu)^2`, as in Lakshminarayanan et al.
        (2017). They agree for one draw.
    :return: ``[N]``.
    :raises ValueError: if ``law`` is another.
    """
    given = mean
    mean, scale, y = _normals(mean, scale, y)
    check_choice(law, "law", LAWS)
    if mean.dim() == 2 and law == "moments":
        mean, scale = mean.mean(0), (scale.square().mean(0) + mean.var(0, correction=0)).sqrt()
    log_density = -0.5 * ((y - mean) / scale).square() - scale.log() - HALF_LOG_TWO_PI
    return like(-(_log_mean_exp(log_density) if mean.dim() == 2 else log_density), given)


@checked
def log_predictive_density(log_probs: Tensor) -> Tensor:
    r"""Log of the mean density over draws, :math:`\log \frac1S \sum_s p(y_i \mid x_i, \theta_s)`, in nats per row, for any likelihood.

    Its mean over rows is the LPPD of the literature. For Normals it is ``-gaussian_nll(mean, scale, y)``.

    :param log_probs: each draw's log-density of each target, ``[draws, N]``; -inf is allowed.
    :return: ``[N]``.
    """
    _check_tensor("log_probs", log_probs, floating=True)
    if log_probs.dim() != 2 or 0 in log_probs.shape:
        raise ValueError(f"log_probs must be [draws, N], not {list(log_probs.shape)}")
    if bool(log_probs.isnan().any() | (log_probs == math.inf).any()):
        raise ValueError("log_probs has entries that are NaN or +infinity")
    return like(_log_mean_exp(log_probs.double()), log_probs)


@checked
def crps(draws: Tensor, y: Tensor, *, fair: bool = True) -> Tensor:
    r"""Continuous ranked probability score of draws, in the units of ``y``; lower is better:

    .. math:: \frac1S \sum_s |x_s - y| - \frac{1}{2 S (S - 1)} \sum_{s, t} |x_s - x_t|,

    by sorting, in :math:`O(S \log S)`.

    :param draws: of the target, ``[draws, N]``.
    :param y: targets ``[N]``.
    :param fair: the default is this unbiased estimate of the score of the law that the draws come from (Ferro, 2014). ``False``
        divides by :math:`2 S^2`: the exact score of the draws as the law itself, which is larger by
        :math:`\frac{1}{2 S^2 (S - 1)} \sum_{s, t} |x_s - x_t|`, so that more draws look better.
    :return: ``[N]``.
    :raises ValueError: if ``fair`` and there is a single draw.
    """
    x, y = _checked("draws", draws, y, ranks=(2,))
    count = len(x)
    if fair and count == 1:
        raise ValueError("draws: one draw has no fair CRPS; take more, or fair=False, which makes it the absolute error")
    error = (x - y).sort(0).values
    # Of the sorted draws, the i-th (from 0) is the larger in i pairs and the smaller in S - 1 - i.
    rank = torch.arange(count, dtype=x.dtype, device=x.device)
    pairs = (2 * rank - (count - 1)) @ error
    return like(error.abs().mean(0) - pairs / (count * (count - 1 if fair else count)), draws)


@checked
def gaussian_crps(mean: Tensor, scale: Tensor | float, y: Tensor) -> Tensor:
    r"""Continuous ranked probability score in closed form, in the units of ``y``; lower is better. Of a Normal, with
    :math:`z = (y - \mu) / \sigma`,

    .. math:: \sigma \bigl[ z (2 \Phi(z) - 1) + 2 \varphi(z) - \pi^{-1/2} \bigr];

    of a mixture, with :math:`A(\mu, \sigma) = \mathrm{E}|\mathrm{Normal}(\mu, \sigma)|`,

    .. math:: \frac1S \sum_s A(y - \mu_s, \sigma_s)
        - \frac{1}{2 S^2} \sum_{s, t} A\bigl(\mu_s - \mu_t, (\sigma_s^2 + \sigma_t^2)^{1/2}\bigr),

    in :math:`O(S^2)` (Grimit et al., 2006).

    :param mean: ``[N]`` or ``[draws, N]``.
    :param scale: standard deviations, > 0.
    :param y: targets ``[N]``.
    :return: ``[N]``.
    """
    given = mean
    mean, scale, y = _normals(mean, scale, y)
    mean, scale = (value if value.dim() == 2 else value[None] for value in (mean, scale))
    count, pairs = len(mean), scale.sum(0) / math.sqrt(math.pi)  # half of each draw with itself
    for i in range(count - 1):
        pairs += _mean_absolute(mean[i + 1 :] - mean[i], (scale[i + 1 :].square() + scale[i].square()).sqrt()).sum(0)
    return like(_mean_absolute(y - mean, scale).mean(0) - pairs / count**2, given)


class Intervals(NamedTuple):
    """Central prediction intervals. Intervals of a quantile regression can be put in by hand.

    :ivar levels: ``[levels]``, the nominal probability of each interval, in (0, 1).
    :ivar lower: ``[levels, N]``, the quantile at (1 - level) / 2.
    :ivar upper: ``[levels, N]``, the quantile at (1 + level) / 2.
    """

    levels: Tensor
    lower: Tensor
    upper: Tensor


@checked
def central_intervals(draws: Tensor, levels: Sequence[float] = LEVELS) -> Intervals:
    r"""The central intervals of draws, between their quantiles at plotting positions :math:`k / (S + 1)`.

    A target that is exchangeable with the draws is below the k-th of them with exactly this probability. So the intervals of a calibrated
    law have their nominal coverage for any number of draws, unlike those of ``torch.quantile``.

    :param draws: of the target, ``[draws, N]``.
    :param levels: in (0, 1).
    :raises ValueError: if a level is out of range, or there are fewer than (1 + level) / (1 - level) draws (39 for 0.95).
    """
    _check_tensor("draws", draws, floating=True)
    if draws.dim() != 2 or 0 in draws.shape:
        raise ValueError(f"draws must be [draws, N], not {list(draws.shape)}")
    _check_finite("draws", draws)
    nominal = _checked_levels(levels, draws)
    count, widest = len(draws), float(nominal.max())
    needed = math.ceil((1 + widest) / (1 - widest) - 1e-6)
    if count < needed:
        raise ValueError(f"draws: {count} of them have no interval of level {widest:g}: take {needed} or more, or smaller levels")
    x = draws.double().sort(0).values

    def quantiles(p: Tensor) -> Tensor:
        place = (p * (count + 1) - 1).clamp(0, count - 1)
        below = place.floor().long().clamp_max(max(count - 2, 0))
        return torch.lerp(x[below], x[(below + 1).clamp_max(count - 1)], (place - below)[:, None])

    lower, upper = quantiles((1 - nominal) / 2), quantiles((1 + nominal) / 2)
    return Intervals(*(like(value, draws) for value in (nominal, lower, upper)))


@checked
def gaussian_intervals(mean: Tensor, scale: Tensor | float, levels: Sequence[float] = LEVELS) -> Intervals:
    """The exact central intervals of Normals, or of the mixture of the draws' Normals, by inverting the mixture's distribution function.

    :param mean: ``[N]`` or ``[draws, N]``.
    :param scale: standard deviations, > 0.
    :param levels: in (0, 1).
    :raises ValueError: if a level is out of range.
    """
    given = mean
    mean, scale = check_normals(mean, scale)
    nominal = _checked_levels(levels, mean)
    if mean.dim() == 1:
        half = torch.special.ndtri((1 + nominal) / 2)[:, None] * scale
        lower, upper = mean - half, mean + half
    else:
        p, places = torch.cat([(1 - nominal) / 2, (1 + nominal) / 2]).unique(return_inverse=True)
        lower, upper = _mixture_quantiles(mean, scale, p)[places].chunk(2)
    return Intervals(*(like(value, given) for value in (nominal, lower, upper)))


@checked
def coverage(intervals: Intervals, y: Tensor) -> Tensor:
    """The share of targets inside the intervals of each level, ends included, ``[levels]`` in [0, 1].

    :param intervals: from :func:`central_intervals` or :func:`gaussian_intervals`.
    :param y: targets ``[N]``.
    """
    return like(_inside(intervals, y).mean(-1), intervals.lower)


@checked
def interval_width(intervals: Intervals) -> Tensor:
    """The mean width over rows of the intervals of each level, ``[levels]``, in the units of ``y``."""
    return (intervals.upper - intervals.lower).mean(-1)


class IntervalCalibration(NamedTuple):
    r"""Coverage of central intervals beside their nominal level: the numbers of a calibration plot.

    With nominal levels :math:`P_j`, :math:`j = 1, \ldots, J`, and coverages :math:`\hat P_j`:

    :ivar levels: ``[J]``, in (0, 1).
    :ivar coverage: ``[J]``, in [0, 1].
    :ivar width: ``[J]``, mean over rows, in the units of the target.
    :ivar count: the number of rows.
    """

    levels: Tensor
    coverage: Tensor
    width: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which has no meaning here

    @property
    def ecpe(self) -> float:
        r"""Expected coverage probability error, :math:`\frac1J \sum_j |\hat P_j - P_j|`, in [0, 1]."""
        return self._gap().mean().item()

    @property
    def mcpe(self) -> float:
        r"""Maximum coverage probability error, :math:`\max_j |\hat P_j - P_j|`, in [0, 1]."""
        return self._gap().max().item()

    @property
    def cwce(self) -> float:
        r"""Confidence-weighted calibration error, :math:`100 \sum_j P_j |\hat P_j - P_j| / \sum_j P_j`, in per cent. The name is from
        Cui et al. (2021); this form was recovered from the numbers that they print."""
        return 100 * ((self.levels * self._gap()).sum() / self.levels.sum()).item()

    @property
    def epiw(self) -> float:
        """Expected prediction interval width: the mean over levels and rows, in the units of the target. Compare the
        widths of equally calibrated laws only."""
        return self.width.mean().item()

    def r_cwce(self, r2: float) -> float:
        """(1 - R2) CWCE, in per cent: a calibration error that does not reward uninformative laws.

        :param r2: of the law's means, from :func:`~pyro_advbayes.diagnostics.r2`.
        """
        return (1 - r2) * self.cwce

    def _gap(self) -> Tensor:
        return (self.coverage.double() - self.levels.double()).abs()


@checked
def interval_calibration(intervals: Intervals, y: Tensor) -> IntervalCalibration:
    """
    Coverage beside nominal level, and width, for :func:`~pyro_advbayes.diagnostics.plot_interval_calibration`.

    :param intervals: from :func:`central_intervals` or :func:`gaussian_intervals`.
    :param y: targets ``[N]``.
    """
    return IntervalCalibration(intervals.levels, coverage(intervals, y), interval_width(intervals), len(y))


class RegressionScores(NamedTuple):
    """
    All scores of a predictive law, each with its bootstrap standard error over rows.

    :ivar rmse: :func:`rmse`, in the units of the target.
    :ivar r2: :func:`r2`.
    :ivar nll: mean :func:`gaussian_nll` of the mixture, in nats.
    :ivar crps: mean :func:`gaussian_crps`, in the units of the target.
    :ivar ecpe: :attr:`IntervalCalibration.ecpe`; so the next three.
    :ivar mcpe: maximum coverage probability error.
    :ivar cwce: in per cent.
    :ivar epiw: in the units of the target.
    :ivar r_cwce: in per cent.
    """

    rmse: Estimate
    r2: Estimate
    nll: Estimate
    crps: Estimate
    ecpe: Estimate
    mcpe: Estimate
    cwce: Estimate
    epiw: Estimate
    r_cwce: Estimate

    def __str__(self) -> str:
        return ", ".join(f"{name.upper().replace('_', '-')} {value:.4g} ± {error:.2g}" for name, (value, error) in self._asdict().items())


@checked
def regression_scores(
    mean: Tensor, scale: Tensor | float, y: Tensor, levels: Sequence[float] = LEVELS, num_resamples: int = 200
) -> RegressionScores:
    """
    All scores of Normals or of their mixture at once. ::

        mean, scale = Predictive(model, draws, return_sites=["_RETURN"])(x_test)["_RETURN"].unbind(-1)  # HeteroscedasticRegression
        print(regression_scores(mean * unit, scale * unit, y_test * unit))

    :param mean: ``[N]`` or ``[draws, N]``.
    :param scale: standard deviations, > 0.
    :param y: targets ``[N]``.
    :param levels: of the central intervals, in (0, 1).
    :param num_resamples: bootstrap resamples of the rows, >= 2, drawn with a fixed seed that leaves torch's generator alone.
    :raises ValueError: if ``num_resamples`` is below 2, or all targets are equal.
    """
    check_int(num_resamples, "num_resamples", 2)
    mean, scale, y = _normals(mean, scale, y)
    intervals = gaussian_intervals(mean, scale, levels)
    center = y.mean()  # centred targets, so that variances do not cancel
    rows = torch.stack([(_over_draws(mean) - y).square(), y - center, (y - center).square(), gaussian_nll(mean, scale, y)])
    parts = (rows, gaussian_crps(mean, scale, y)[None], _inside(intervals, y), (intervals.upper - intervals.lower).mean(0)[None])
    columns = torch.cat(parts).T  # [N, 6 + levels]

    def scores(means: Tensor) -> Tensor:
        """From the columns' means, ``[..., 6 + levels]``, to the scores, ``[..., 9]``."""
        squared, first, second, nll, score = means[..., :5].unbind(-1)
        unexplained = squared / (second - first.square())
        gap = (means[..., 5:-1] - intervals.levels).abs()
        cwce = 100 * (gap * intervals.levels).sum(-1) / intervals.levels.sum()
        of_gap = (gap.mean(-1), gap.amax(-1), cwce, means[..., -1], unexplained * cwce)
        return torch.stack([squared.sqrt(), 1 - unexplained, nll, score, *of_gap], -1)

    _variance(y)  # which must not be 0
    generator = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(num_resamples):
        drawn = torch.randint(len(y), (len(y),), generator=generator).to(y.device)
        resampled.append(columns[drawn].mean(0))
    again = scores(torch.stack(resampled))
    errors = again[again.isfinite().all(-1)].std(0)  # a resample of few rows may hold one row only, where R2 is undefined
    return RegressionScores(*(Estimate(*pair) for pair in zip(scores(columns.mean(0)).tolist(), errors.tolist(), strict=True)))


def _over_draws(mean: Tensor) -> Tensor:
    return mean.mean(0) if mean.dim() == 2 else mean


def _variance(y: Tensor) -> Tensor:
    variance = y.var(correction=0)
    if not variance > 0:
        raise ValueError(f"y: all {len(y)} targets are equal, which leaves R2 undefined")
    return variance


def _log_mean_exp(log_probs: Tensor) -> Tensor:
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _mean_absolute(mean: Tensor, scale: Tensor) -> Tensor:
    """E|Normal(mean, scale)|."""
    z = mean / scale
    return mean * torch.erf(z / math.sqrt(2)) + scale * math.sqrt(2 / math.pi) * (-0.5 * z.square()).exp()


def _mixture_quantiles(mean: Tensor, scale: Tensor, p: Tensor) -> Tensor:
    """
    Where the distribution functions of the rows' mixtures are ``p``, by Newton's method inside a bracket, which is halved wherever
    Newton leaves it or does not halve its last step.

    :param p: ``[P]``, increasing: each search starts where the one before ended.
    :return: ``[P, N]``.
    """
    found, x = [], mean.mean(0)
    for target in p:
        ends = mean + scale * torch.special.ndtri(target)
        low, high = ends.amin(0), ends.amax(0)  # a mixture's quantile is between its components'
        x = torch.minimum(torch.maximum(x, low), high)
        step, open_rows = high - low, torch.arange(len(x), device=x.device)
        for _ in range(200):
            z = (x[open_rows] - mean[:, open_rows]) / scale[:, open_rows]
            excess = torch.special.ndtr(z).mean(0) - target
            far = excess.abs() > EXACT
            if not bool(far.any()):
                break
            open_rows, z, excess = open_rows[far], z[:, far], excess[far]
            at = x[open_rows]
            low[open_rows] = torch.where(excess < 0, at, low[open_rows])
            high[open_rows] = torch.where(excess > 0, at, high[open_rows])
            density = ((-0.5 * z.square()).exp() / scale[:, open_rows]).mean(0) / math.sqrt(2 * math.pi)
            bottom, top, newton = low[open_rows], high[open_rows], at - excess / density
            good = (newton > bottom) & (newton < top) & ((newton - at).abs() <= 0.5 * step[open_rows])
            new = torch.where(good, newton, (bottom + top) / 2)
            step[open_rows], x = (new - at).abs(), x.index_put((open_rows,), new)
        found.append(x)
    return torch.stack(found)


def _inside(intervals: Intervals, y: Tensor) -> Tensor:
    """Whether each target is in each interval, 0 or 1, ``[levels, N]``."""
    _, y = _checked("intervals.lower", intervals.lower, y, ranks=(2,))
    return ((intervals.lower <= y) & (y <= intervals.upper)).double()


def _checked_levels(levels: Sequence[float], reference: Tensor) -> Tensor:
    nominal = torch.as_tensor(levels, dtype=torch.float64, device=reference.device)
    if nominal.dim() != 1 or len(nominal) == 0 or not bool(((nominal > 0) & (nominal < 1)).all()):
        raise ValueError(f"levels={levels!r}: a sequence of probabilities, each between 0 and 1")
    return nominal


def _normals(mean: Tensor, scale: Tensor | float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means and scales of one shape, and targets, in float64."""
    checked, y = _checked("mean", mean, y, ranks=(1, 2))
    return *check_normals(checked, scale), y


def check_normals(mean: Tensor, scale: Tensor | float, ranks: tuple[int, ...] = (1, 2)) -> tuple[Tensor, Tensor]:
    """
    Means and standard deviations in float64, of one shape.

    :param mean: ``[N]`` or ``[draws, N]``.
    :param scale: > 0, of a shape that broadcasts to that of ``mean``.
    :param ranks: the numbers of dimensions that the caller takes.
    :raises ValueError: if they are anything else.
    """
    _check_tensor("mean", mean, floating=True)
    if mean.dim() not in ranks or 0 in mean.shape:
        raise ValueError(f"mean must be {' or '.join({1: '[N]', 2: '[draws, N]'}[rank] for rank in ranks)}, not {list(mean.shape)}")
    _check_finite("mean", mean)
    number = isinstance(scale, float | int) and not isinstance(scale, bool)
    scale = _check_tensor("scale", torch.tensor(float(scale)) if number else scale, floating=True)
    try:
        wide = scale.to(mean.device, torch.float64).expand(mean.shape)
    except RuntimeError as error:
        raise ValueError(f"scale has shape {list(scale.shape)}, which does not broadcast to that of mean, {list(mean.shape)}") from error
    if not bool(((wide > 0) & wide.isfinite()).all()):
        raise ValueError("scale has entries that are not above 0 and finite: give standard deviations, not their logarithms")
    return mean.double(), wide


def _checked(name: str, value: Tensor, y: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A prediction and its targets in float64, of checked shapes."""
    _check_tensor(name, value, floating=True)
    _check_tensor("y", y, floating=False)
    if y.dim() != 1 or len(y) == 0:
        remedy = "; y.squeeze(-1) makes a vector of a column" if y.dim() == 2 and y.shape[1] == 1 else ""
        raise ValueError(f"y must be targets [N], not {list(y.shape)}{remedy}")
    if value.dim() not in ranks or value.shape[-1] != len(y) or 0 in value.shape:
        shapes = " or ".join({1: f"[{len(y)}]", 2: f"[draws, {len(y)}]"}[rank] for rank in ranks)
        remedy = f"; {name}.squeeze(-1) takes a last dimension of 1 away" if value.dim() > 1 and value.shape[-1] == 1 else ""
        raise ValueError(f"{name} must be {shapes}, as y is [{len(y)}], not {list(value.shape)}{remedy}")
    _check_finite(name, value)
    _check_finite("y", y)
    return value.double(), y.to(value.device, torch.float64)


def _check_tensor(name: str, value: object, *, floating: bool) -> Tensor:
    value = need_tensor(value, name)
    if value.is_complex() or value.dtype == torch.bool or (floating and not value.is_floating_point()):
        raise ValueError(f"{name} is of {value.dtype}: give real numbers{' of floating type' if floating else ''}")
    return value


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} has entries that are NaN or infinite")
