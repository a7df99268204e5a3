from __future__ import annotations

import math

import pytest
import torch

from pyro_advbayes.diagnostics import mmd_test, sliced_wasserstein


def test_sliced_wasserstein_in_one_dimension_is_the_mean_distance_of_sorted_points():
    x, y = torch.randn(50, 1).double(), torch.randn(50, 1).double() + 1
    expected = (x.sort(0).values - y.sort(0).values).abs().mean()
    assert sliced_wasserstein(x, y, 3) == pytest.approx(float(expected))


@pytest.mark.parametrize(("n", "m"), [(4, 6), (3, 7), (50, 1)])
def test_sets_of_different_sizes_are_compared_as_their_repetitions(n, m):
    x, y = torch.randn(n, 1).double(), torch.randn(m, 1).double()
    expected = sliced_wasserstein(x.repeat(m, 1), y.repeat(n, 1), 1)
    assert sliced_wasserstein(x, y, 1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dim", [2, 30])
def test_a_shift_of_length_one_counts_as_much_in_every_dimension(dim):
    x = torch.randn(500, dim)
    # √d times a random direction's part in any other is about a normal number
    assert sliced_wasserstein(x, x + 1 / math.sqrt(dim), 2000) == pytest.approx(math.sqrt(2 / math.pi), rel=0.15)


def mmd_by_sums(x: torch.Tensor, y: torch.Tensor) -> float:
    points = torch.cat([x, y])
    distances = torch.cdist(points, points)
    scale2 = distances[~torch.eye(len(points), dtype=torch.bool)].square().median()

    def k(a, b):
        return math.exp(-float((a - b).square().sum() / scale2 / 2))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_mmd_is_the_unbiased_estimate_of_its_definition():
    x, y = torch.randn(7, 3).double(), torch.randn(5, 3).double() + 0.5
    assert mmd_test(x, y, 1).mmd2 == pytest.approx(mmd_by_sums(x, y))


def test_p_values_of_equal_laws_are_uniform_and_of_others_small():
    p = torch.tensor([mmd_test(torch.randn(30, 2), torch.randn(40, 2), 99).p_value for _ in range(200)])
    for level in (0.1, 0.5):  # standard errors .021 and .035
        assert abs(float((p <= level).float().mean()) - level) < 4 * math.sqrt(level * (1 - level) / 200)
    assert mmd_test(torch.randn(100, 2), torch.randn(100, 2) + 1, 99).p_value == 0.01
    assert mmd_test(torch.randn(200, 2), 1.7 * torch.randn(200, 2), 99).p_value < 0.05


def test_where_the_points_lie_is_of_no_matter():
    x, y = 0.1 * torch.randn(50, 3), 0.1 * torch.randn(50, 3) + 0.03
    near, far = (mmd_test(x + shift, y + shift, 99, torch.Generator().manual_seed(0)) for shift in (0.0, 1024.0))
    assert far.mmd2 == pytest.approx(near.mmd2, abs=1e-4) and abs(far.p_value - near.p_value) <= 0.02


def test_float32_does_not_break_the_ties_of_labellings():
    for _ in range(20):
        x, y = torch.randn(4, 2), torch.randn(4, 2)
        single, double = (mmd_test(x.to(t), y.to(t), 200, torch.Generator().manual_seed(0)) for t in (torch.float, torch.double))
        assert single.p_value == double.p_value


def test_bad_points_are_refused():
    x = torch.randn(5, 2)
    for function in (sliced_wasserstein, mmd_test):
        for bad, message in (
            (x[0], "y must be points"),
            (x.long(), "y must be points"),
            (x[:0], "y must be points"),
            (torch.full((5, 2), math.nan), "y has entries that are NaN"),
            (torch.randn(5, 3), "x has 2 coordinates and y 3"),
        ):
            with pytest.raises(ValueError, match=message):
                function(x, bad)
    with pytest.raises(ValueError, match="two points or more"):
        mmd_test(x, x[:1])
    for wrong in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=f"num_projections={wrong}: an int >= 1"):
            sliced_wasserstein(x, x, wrong)
        with pytest.raises(ValueError, match=f"num_permutations={wrong}: an int >= 1"):
            mmd_test(x, x, wrong)
