from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import sklearn.metrics
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pyro_advbayes.diagnostics import (
    IntervalCalibration,
    Intervals,
    central_intervals,
    coverage,
    crps,
    gaussian_crps,
    gaussian_intervals,
    gaussian_nll,
    interval_calibration,
    interval_width,
    log_predictive_density,
    r2,
    regression_scores,
    rmse,
)
from pyro_advbayes.diagnostics.regression import LEVELS

PAIR = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 2.0], [2.0, 2.0]])  # means and scales of two draws at two rows


@pytest.fixture
def law() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and scales of seven draws at five rows, which differ much, and targets."""
    return torch.randn(7, 5).double() * 2, torch.rand(7, 5).double() + 0.1, torch.randn(5).double()


def test_rmse_and_r2_by_hand_and_by_scikit_learn():
    y, mean = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    assert rmse(mean, y) == pytest.approx(math.sqrt(5 / 3))
    assert r2(mean, y) == pytest.approx(1 - 5 / 8) == pytest.approx(sklearn.metrics.r2_score(y, mean))
    draws = torch.stack([mean - 3, mean + 3])  # whose mean is judged
    assert (rmse(draws, y), r2(draws, y)) == (pytest.approx(math.sqrt(5 / 3)), pytest.approx(3 / 8))
    assert r2(y, y) == 1 and r2(torch.full((3,), 2.0), y) == 0


def test_r2_of_large_targets_keeps_its_digits():
    for y in (1e4 + torch.tensor([0.0, 1.0, 2.0]), 1e9 + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)):
        assert r2(y + 0.5, y) == pytest.approx(1 - 0.25 / (2 / 3), rel=1e-6)
        assert regression_scores(y + 0.5, 1.0, y).r2.value == pytest.approx(1 - 0.25 / (2 / 3), rel=1e-6)


def test_the_nll_of_one_normal_is_that_of_torch_under_either_law():
    mean, scale, y = torch.randn(6), torch.rand(6) + 0.5, torch.randn(6)
    expected = -Normal(mean, scale).log_prob(y)
    for law in ("mixture", "moments"):
        torch.testing.assert_close(gaussian_nll(mean, scale, y, law), expected)
        torch.testing.assert_close(gaussian_nll(mean[None], scale[None], y, law), expected)


def test_the_nll_of_draws_is_that_of_their_mixture_or_of_the_normal_with_its_moments():
    (mean, scale), y = PAIR, torch.tensor([2.0, -1.0])
    mixture = MixtureSameFamily(Categorical(torch.ones(2, 2)), Normal(mean.T, scale.T))
    torch.testing.assert_close(gaussian_nll(mean, scale, y), -mixture.log_prob(y))
    moments = Normal(torch.tensor([2.0, 0.0]), torch.tensor([(1 + 4) / 2 + 1.0, 4.0]).sqrt())
    torch.testing.assert_close(gaussian_nll(mean, scale, y, "moments"), -moments.log_prob(y))
    torch.testing.assert_close(mixture.variance, moments.variance)


def test_a_scale_may_be_one_number_or_one_of_each_draw():
    mean, y = torch.randn(3, 4), torch.randn(4)
    for scale in (0.5, torch.tensor(0.5), torch.tensor([[0.1], [0.2], [0.7]]), torch.rand(4) + 0.1):
        wide = torch.as_tensor(scale).expand(3, 4)
        for score in (gaussian_nll, gaussian_crps):
            torch.testing.assert_close(score(mean, scale, y), score(mean, wide, y))


def test_the_log_predictive_density_is_the_log_of_the_mean_density():
    (mean, scale), y = PAIR, torch.tensor([2.0, -1.0])
    log_probs = Normal(mean, scale).log_prob(y)
    found = log_predictive_density(log_probs)
    torch.testing.assert_close(found, log_probs.exp().mean(0).log())
    torch.testing.assert_close(found, -gaussian_nll(mean, scale, y))
    counts = torch.distributions.Poisson(torch.tensor([[1.0], [3.0]])).log_prob(torch.tensor([2.0]))
    assert log_predictive_density(counts).item() == pytest.approx(math.log((math.exp(-1) / 2 + math.exp(-3) * 9 / 2) / 2))
    assert log_predictive_density(torch.tensor([[-math.inf], [-1e4]])).item() == pytest.approx(-1e4 - math.log(2))


def test_crps_by_hand():
    draws, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([1.0])
    # mean |x - y| = 1; the pairs' distances are 1, 3, 2
    assert crps(draws, y, fair=False).item() == pytest.approx(1 - 6 / 9)
    assert crps(draws, y).item() == pytest.approx(1 - 6 / 6)
    assert crps(draws[:1], torch.tensor([2.5]), fair=False).item() == 2.5


@pytest.mark.parametrize("fair", [True, False])
def test_crps_by_sorting_is_its_double_sum_and_the_integral_of_its_definition(fair):
    draws, y = torch.randn(40, 6).double(), 3 * torch.randn(6).double()
    draws[1] = draws[0]  # ties
    distance = (draws[:, None] - draws).abs().sum((0, 1))
    expected = (draws - y).abs().mean(0) - distance / (2 * 40 * (39 if fair else 40))
    torch.testing.assert_close(crps(draws, y, fair=fair), expected)
    if not fair:  # the integral of (F - 1[y <= t])^2 over the steps of F
        for row in range(6):
            knots = torch.cat([draws[:, row], y[row : row + 1]]).sort().values
            below = (draws[:, row, None] <= knots[:-1]).double().mean(0)
            steps = (below - (y[row] <= knots[:-1]).double()).square() * knots.diff()
            assert crps(draws, y, fair=False)[row].item() == pytest.approx(steps.sum().item())


def test_fair_crps_of_few_draws_is_right_on_average_and_the_plain_one_too_large():
    y, exact = torch.tensor([0.7]), gaussian_crps(torch.zeros(1), 1.0, torch.tensor([0.7])).item()
    repeats = 40_000
    draws = torch.randn(4, repeats)
    found = crps(draws, y.expand(repeats))
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / math.sqrt(repeats)
    # E|X - X'| = 2 / sqrt(pi): the plain one counts it S / (S - 1) times too little
    plain = crps(draws, y.expand(repeats), fair=False).mean().item()
    assert plain - exact == pytest.approx(1 / math.sqrt(math.pi) / 4, abs=0.01)


def test_the_crps_of_a_normal_is_the_known_value_and_the_integral():
    assert gaussian_crps(torch.zeros(1), 1.0, torch.zeros(1)).item() == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi))
    for mean, scale, y in ((0.3, 0.5, 1.0), (-2.0, 3.0, 1.0)):
        norm = scipy.stats.norm(mean, scale)
        expected = scipy.integrate.quad(lambda t, n=norm: n.cdf(t) ** 2, -40, y)[0]
        expected += scipy.integrate.quad(lambda t, n=norm: n.sf(t) ** 2, y, 40)[0]
        assert gaussian_crps(torch.tensor([mean]), scale, torch.tensor([y])).item() == pytest.approx(expected, rel=1e-6)


def test_the_crps_of_a_mixture_is_the_integral_of_its_definition(law):
    mean, scale, y = law
    found = gaussian_crps(mean, scale, y)
    for row in range(5):
        grid = torch.linspace(-15, 15, 200_001, dtype=torch.float64)
        below = Normal(mean[:, row, None], scale[:, row, None]).cdf(grid).mean(0)
        expected = torch.trapezoid((below - (grid >= y[row]).double()).square(), grid)
        assert found[row].item() == pytest.approx(expected.item(), abs=1e-3)
    same = gaussian_crps(mean[:1].expand(4, 5), scale[:1].expand(4, 5), y)
    torch.testing.assert_close(same, gaussian_crps(mean[0], scale[0], y))


def test_draws_of_a_mixture_have_its_scores(law):
    mean, scale, y = law
    draws = Normal(mean, scale).sample((4000,)).flatten(0, 1)
    error = 4 * draws.std(0) / math.sqrt(len(draws))
    assert ((crps(draws, y) - gaussian_crps(mean, scale, y)).abs() < error).all()
    exact, sampled = gaussian_intervals(mean, scale, [0.5]), central_intervals(draws, [0.5])
    assert (exact.lower - sampled.lower).abs().max() < 0.15 and (exact.upper - sampled.upper).abs().max() < 0.15


def test_the_intervals_of_a_normal_are_its_quantiles():
    mean, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    found = gaussian_intervals(mean, scale, [0.5, 0.95])
    for row in range(2):
        lower, upper = scipy.stats.norm(mean[row], scale[row]).interval([0.5, 0.95])
        assert np.allclose(found.lower[:, row], lower) and np.allclose(found.upper[:, row], upper)
    torch.testing.assert_close(interval_width(found), (found.upper - found.lower).mean(1))


@pytest.mark.parametrize("apart", [0.0, 1.0, 30.0])
def test_the_intervals_of_a_mixture_hold_their_level_exactly(apart):
    """Of components that coincide, overlap, or have a desert between them."""
    mean = torch.stack([torch.randn(20).double() + apart * i for i in range(4)])
    scale = 10 ** torch.empty(4, 20).double().uniform_(-3, 1)
    found = gaussian_intervals(mean, scale)
    for side, ends in ((-1, found.lower), (1, found.upper)):
        below = Normal(mean, scale).cdf(ends[:, None]).mean(1)
        expected = ((1 + side * found.levels) / 2)[:, None].expand_as(below)
        torch.testing.assert_close(below, expected, atol=1e-9, rtol=0)


def test_the_intervals_of_equal_draws_are_those_of_one():
    mean, scale = torch.randn(5), torch.rand(5) + 0.1
    one, many = gaussian_intervals(mean, scale), gaussian_intervals(mean.expand(3, 5), scale.expand(3, 5))
    torch.testing.assert_close(many.lower, one.lower)
    torch.testing.assert_close(many.upper, one.upper)


def test_central_intervals_of_draws_by_hand():
    draws = torch.arange(1.0, 10.0).flip(0)[:, None]  # 1 to 9: the k-th is the quantile at k / 10
    found = central_intervals(draws, [0.8, 0.5])
    assert found.lower.flatten().tolist() == pytest.approx([1.0, 2.5])
    assert found.upper.flatten().tolist() == pytest.approx([9.0, 7.5])


def test_intervals_of_exchangeable_draws_hold_their_level_even_if_draws_are_few():
    rows = 40_000
    draws, y = torch.randn(9, rows), torch.randn(rows)
    found = coverage(central_intervals(draws, [0.2, 0.4, 0.6, 0.8]), y)
    error = torch.tensor([p * (1 - p) / rows for p in (0.2, 0.4, 0.6, 0.8)]).sqrt()
    assert ((found - torch.tensor([0.2, 0.4, 0.6, 0.8])).abs() < 4 * error).all()
    linear = torch.quantile(draws, torch.tensor([0.1, 0.9]), dim=0)  # torch's, for comparison
    assert ((linear[0] <= y) & (y <= linear[1])).double().mean() < 0.75


def test_coverage_counts_the_ends_and_each_level_by_itself():
    intervals = Intervals(torch.tensor([0.5, 0.9]), torch.tensor([[0.0, 0.0, 0.0, 0.0], [-9.0] * 4]), torch.tensor([[1.0] * 4, [9.0] * 4]))
    assert coverage(intervals, torch.tensor([0.0, 1.0, 1.1, -9.5])).tolist() == [0.5, 0.75]
    assert interval_width(intervals).tolist() == [1.0, 18.0]


def test_calibration_errors_by_hand():
    found = IntervalCalibration(torch.tensor([0.25, 0.75]), torch.tensor([0.35, 0.55]), torch.tensor([1.0, 4.0]), 100)
    assert found.ecpe == pytest.approx(0.15) and found.mcpe == pytest.approx(0.2)
    assert found.cwce == pytest.approx(100 * (0.25 * 0.1 + 0.75 * 0.2) / 1.0)
    assert found.epiw == 2.5
    assert found.r_cwce(r2=0.9) == pytest.approx(1.75)


def test_relative_cwce_reproduces_published_rows():
    """R2, CWCE and R-CWCE of Cui et al. (2021), to the digits printed."""
    for explained, cwce, printed in ((0.877, 52.152, 6.428), (0.892, 10.552, 1.136), (0.939, 2.894, 0.177), (0.943, 4.878, 0.280)):
        found = IntervalCalibration(torch.tensor([0.5]), torch.tensor([0.5 + cwce / 100]).double(), torch.ones(1), 1)
        assert found.r_cwce(explained) == pytest.approx(printed, abs=0.0005 * cwce)


def test_a_normal_law_that_is_right_is_calibrated_and_its_width_is_the_normals():
    rows = 20_000
    mean, scale = torch.randn(rows), torch.rand(rows) + 0.5
    y = Normal(mean, scale).sample()
    found = interval_calibration(gaussian_intervals(mean, scale), y)
    levels = torch.tensor(LEVELS)
    assert torch.equal(found.levels, levels) and found.count == rows
    error = (levels * (1 - levels) / rows).sqrt()
    assert ((found.coverage - levels).abs() < 4 * error).all()
    assert found.mcpe < 4 * 0.5 / math.sqrt(rows) and found.cwce < 4 * 50 / math.sqrt(rows)
    widths = 2 * torch.special.ndtri((1 + levels) / 2) * scale.mean()
    torch.testing.assert_close(found.width, widths)
    assert found.epiw == pytest.approx(widths.mean().item())


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scale_that_is_off_by_two_has_the_calibration_errors_worked_out(factor):
    """An interval of level P holds 2 Phi(factor z_P) - 1."""
    rows = 20_000
    y = torch.randn(rows)
    found = interval_calibration(gaussian_intervals(torch.zeros(rows), factor), y)
    levels = torch.tensor(LEVELS).double()
    exact = 2 * torch.special.ndtr(factor * torch.special.ndtri((1 + levels) / 2)) - 1
    error = (exact * (1 - exact) / rows).sqrt()
    assert ((found.coverage - exact).abs() < 4 * error).all()
    gap = (exact - levels).abs()
    bound = 4 * 0.5 / math.sqrt(rows)
    assert found.ecpe == pytest.approx(gap.mean().item(), abs=bound) and found.ecpe > 0.15
    assert found.mcpe == pytest.approx(gap.max().item(), abs=bound)
    assert found.cwce == pytest.approx(100 * ((gap * levels).sum() / levels.sum()).item(), abs=100 * bound)


def test_regression_scores_are_the_single_ones_with_their_errors(law):
    mean, scale, y = law
    found = regression_scores(mean, scale, y)
    calibration = interval_calibration(gaussian_intervals(mean, scale), y)
    explained = r2(mean, y)
    expected = {
        "rmse": rmse(mean, y),
        "r2": explained,
        "nll": gaussian_nll(mean, scale, y).mean().item(),
        "crps": gaussian_crps(mean, scale, y).mean().item(),
        **{name: getattr(calibration, name) for name in ("ecpe", "mcpe", "cwce", "epiw")},
        "r_cwce": calibration.r_cwce(explained),
    }
    assert {name: value for name, (value, _) in found._asdict().items()} == pytest.approx(expected)
    state = torch.get_rng_state()
    assert regression_scores(mean, scale, y) == found and torch.equal(torch.get_rng_state(), state)
    assert all(error > 0 for _, error in found)
    assert str(found).startswith(f"RMSE {expected['rmse']:.4g} ± ") and "R-CWCE" in str(found)


def test_bootstrap_errors_are_those_of_a_mean():
    """Rows are heteroscedastic, so that all of them must be drawn from."""
    mean, y = torch.zeros(2000), torch.randn(2000)
    y[:1000] *= 0.3
    found = regression_scores(mean, 1.0, y)
    for name, rows in (("nll", gaussian_nll(mean, 1.0, y)), ("crps", gaussian_crps(mean, 1.0, y))):
        # of 200 resamples: a standard deviation good to 5 %
        assert getattr(found, name).error == pytest.approx(rows.std().item() / math.sqrt(2000), rel=0.2)
    assert found.rmse.error == pytest.approx(y.square().std().item() / (2 * rmse(mean, y) * math.sqrt(2000)), rel=0.2)
    assert found.epiw.error == pytest.approx(0, abs=1e-12)  # every row has the same width


def test_scores_are_in_the_type_of_the_prediction():
    mean, y = torch.randn(3, 4), torch.randn(4)
    for dtype in (torch.float32, torch.float64):
        found = [gaussian_nll(mean.to(dtype), 1.0, y), gaussian_crps(mean.to(dtype), 1.0, y), crps(mean.to(dtype), y)]
        assert [score.dtype for score in found] == [dtype] * 3 and [score.shape for score in found] == [(4,)] * 3
    assert crps(mean, torch.arange(4)).isfinite().all()  # counts are numbers, too


MEAN, Y = torch.zeros(3, 4), torch.arange(4.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmse(MEAN, Y[:, None]), r"y must be targets \[N\], not \[4, 1\]; y.squeeze\(-1\)"),
        (lambda: rmse(Y[:, None], Y), r"mean must be \[4\] or \[draws, 4\], as y is \[4\], not \[4, 1\]; mean.squeeze\(-1\)"),
        (lambda: rmse(MEAN[:, :3], Y), r"mean must be \[4\] or \[draws, 4\], as y is \[4\], not \[3, 3\]"),
        (lambda: crps(Y, Y), r"draws must be \[draws, 4\], as y is \[4\], not \[4\]"),
        (lambda: crps(MEAN[:1], Y), "one draw has no fair CRPS"),
        (lambda: rmse(Y.numpy(), Y), r"mean is a numpy array: give a tensor, torch.as_tensor\(mean\)"),
        (lambda: rmse(MEAN, [0.0] * 4), r"y is a list: give a tensor"),
        (lambda: rmse(torch.zeros(4, dtype=torch.int64), Y), "mean is of torch.int64: give real numbers of floating type"),
        (lambda: rmse(MEAN, Y > 0), "y is of torch.bool: give real numbers"),
        (lambda: rmse(MEAN, Y / 0), "y has entries that are NaN or infinite"),
        (lambda: crps(MEAN / 0, Y), "draws has entries that are NaN or infinite"),
        (lambda: r2(MEAN, torch.ones(4)), "all 4 targets are equal, which leaves R2 undefined"),
        (lambda: regression_scores(MEAN, 1.0, torch.ones(4)), "all 4 targets are equal"),
        (lambda: regression_scores(MEAN, 1.0, Y, num_resamples=1), "num_resamples=1: an int >= 2"),
        (lambda: gaussian_nll(MEAN, MEAN - 1, Y), "scale has entries that are not above 0 and finite: give standard deviations"),
        (lambda: gaussian_crps(MEAN, 0.0, Y), "scale has entries that are not above 0"),
        (lambda: gaussian_intervals(MEAN, torch.ones(3)), r"scale has shape \[3\], which does not broadcast to that of mean, \[3, 4\]"),
        (lambda: gaussian_nll(MEAN, 1.0, Y, law="normal"), "law='normal': choose one of 'mixture', 'moments'"),
        (lambda: log_predictive_density(Y), r"log_probs must be \[draws, N\], not \[4\]"),
        (lambda: log_predictive_density(MEAN + math.inf), r"log_probs has entries that are NaN or \+infinity"),
        (lambda: central_intervals(torch.randn(38, 4)), "draws: 38 of them have no interval of level 0.95: take 39 or more"),
        (lambda: central_intervals(torch.randn(50, 4), [0.5, 1.0]), r"levels=\[0.5, 1.0\]: a sequence of probabilities"),
        (lambda: gaussian_intervals(MEAN, 1.0, []), r"levels=\[\]"),
        (lambda: coverage(gaussian_intervals(MEAN, 1.0), Y[:3]), r"intervals.lower must be \[draws, 3\]"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_39_draws_reach_the_widest_default_interval():
    draws = torch.randn(39, 4)
    found = central_intervals(draws)
    torch.testing.assert_close(found.lower[-1], draws.amin(0))
    torch.testing.assert_close(found.upper[-1], draws.amax(0))
