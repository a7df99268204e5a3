from __future__ import annotations

import math

import pytest
import sklearn.metrics
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_advbayes.diagnostics import accuracy, brier, ece, nll, reliability


def sure_of(confidences: list[float]) -> torch.Tensor:
    """Two classes, the first predicted with these confidences (of a half at least)."""
    confidence = torch.tensor(confidences)
    return torch.stack([confidence, 1 - confidence], -1)


def random_predictions(n: int = 400, k: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibrated ones: where all bins err to one side, no ECE depends on the bins."""
    probs = torch.randn(n, k, dtype=torch.float64).mul(2).softmax(-1)
    return probs, torch.distributions.Categorical(probs).sample()


def test_accuracy_nll_and_brier_by_hand():
    probs, labels = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), torch.tensor([1, 2])
    assert accuracy(probs, labels) == 0.5
    assert nll(probs, labels) == pytest.approx(-(math.log(0.25) + math.log(0.7)) / 2)
    assert brier(probs, labels) == pytest.approx((0.25 + 0.5625 + 0.0625 + 0.01 + 0.04 + 0.09) / 2)


def test_accuracy_nll_and_brier_agree_with_scikit_learn():
    probs, labels = random_predictions()
    assert accuracy(probs, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, probs.argmax(-1)))
    assert nll(probs, labels) == pytest.approx(sklearn.metrics.log_loss(labels, probs.numpy()))
    two, truth = random_predictions(k=2)
    assert brier(two, truth) == pytest.approx(2 * sklearn.metrics.brier_score_loss(truth, two[:, 1].numpy()))


def test_an_impossible_label_makes_the_nll_infinite_and_an_impossible_other_class_does_not():
    probs = torch.tensor([[1.0, 0.0]])
    assert nll(probs, torch.tensor([1])) == math.inf
    assert nll(probs, torch.tensor([0])) == 0


@pytest.mark.parametrize("score", [accuracy, nll, brier, ece], ids=lambda f: f.__name__)
def test_draws_are_judged_by_their_mean(score):
    probs = torch.randn(5, 100, 4, dtype=torch.float64).mul(3).softmax(-1)
    labels = torch.distributions.Categorical(probs.mean(0)).sample()
    assert score(probs, labels) == pytest.approx(score(probs.mean(0), labels))
    assert score(probs, labels) != pytest.approx(score(probs[0], labels))


def brute_force_ece(probs: torch.Tensor, labels: torch.Tensor, num_bins: int) -> float:
    total = 0.0
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        inside = [i for i in range(len(probs)) if low < float(probs[i].max()) <= high]
        if inside:
            right = sum(int(probs[i].argmax() == labels[i]) for i in inside) / len(inside)
            claimed = sum(float(probs[i].max()) for i in inside) / len(inside)
            total += len(inside) / len(probs) * abs(right - claimed)
    return total


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_ece_is_its_definition(num_bins):
    probs, labels = random_predictions()
    assert ece(probs, labels, num_bins) == pytest.approx(brute_force_ece(probs, labels, num_bins))


def test_ece_agrees_with_torchmetrics_where_no_confidence_lies_on_an_edge():
    probs, labels = random_predictions()
    assert ece(probs, labels) == pytest.approx(multiclass_calibration_error(probs, labels, num_classes=6, n_bins=15).item(), abs=1e-6)


def test_ece_has_fifteen_bins_by_default():
    probs, labels = random_predictions()
    assert len(reliability(probs, labels).count) == 15
    assert ece(probs, labels) == ece(probs, labels, num_bins=15)
    assert abs(ece(probs, labels) - ece(probs, labels, num_bins=10)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", [5, 10, 15, 20])
def test_bins_are_closed_on_the_right(dtype, num_bins):
    edges = [b for b in range(1, num_bins + 1) if 2 * b > num_bins]  # from a confidence of a half
    confidence = torch.tensor([b / num_bins for b in edges], dtype=dtype)
    probs = torch.stack([confidence, 1 - confidence], -1)
    bins = reliability(probs, torch.zeros(len(edges), dtype=torch.long), num_bins)
    assert bins.count.nonzero().flatten().tolist() == [b - 1 for b in edges]
    # The mean over draws that agree stays on the edge, too.
    assert torch.equal(reliability(probs.repeat(7, 1, 1), torch.zeros(len(edges), dtype=torch.long), num_bins).count, bins.count)


def test_right_closed_bins_change_the_ece_of_a_confidence_on_an_edge():
    # 0.8 = 12/15 is in (11/15, 12/15] with 0.75, not with 0.85: gaps of 0.05 (one of two right) and of 0.15.
    probs, labels = sure_of([0.8, 0.75, 0.85]), torch.tensor([0, 1, 0])
    assert ece(probs, labels) == pytest.approx((2 * abs(0.5 - 0.775) + 0.15) / 3)
    left_closed = multiclass_calibration_error(probs, labels, num_classes=2, n_bins=15).item()
    assert left_closed == pytest.approx((0.75 + 2 * abs(1 - 0.825)) / 3)


def test_reliability_says_how_often_each_claim_is_right():
    probs, labels = sure_of([0.95, 0.95, 0.95, 0.95, 0.55, 0.51]), torch.tensor([0, 0, 0, 1, 0, 1])
    bins = reliability(probs, labels, num_bins=10)
    assert bins.edges.tolist() == pytest.approx([b / 10 for b in range(11)])
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 4]
    assert bins.accuracy[[5, 9]].tolist() == pytest.approx([0.5, 0.75])
    assert bins.confidence[[5, 9]].tolist() == pytest.approx([0.53, 0.95])
    assert bins.accuracy[:5].isnan().all() and bins.confidence[6:9].isnan().all()
    assert bins.ece == pytest.approx((2 * 0.03 + 4 * 0.2) / 6)


def test_ece_of_sure_predictions():
    probs = torch.eye(2)[[0, 0, 0, 0]]
    assert ece(probs, torch.tensor([0, 0, 0, 0])) == 0
    assert ece(probs, torch.tensor([0, 1, 1, 1])) == 0.75


def test_ece_of_calibrated_predictions_is_sampling_error():
    n = 100_000
    probs = torch.randn(n, 5, dtype=torch.float64).softmax(-1)
    labels = torch.distributions.Categorical(probs).sample()
    # A bin's gap has a standard error of at most 0.5 / sqrt(n_b): summed with weights n_b / n over 15 bins, and four times.
    assert ece(probs, labels) < 4 * 0.5 * (15 / n) ** 0.5


def test_num_bins_below_one_is_refused():
    with pytest.raises(ValueError, match="num_bins"):
        ece(torch.eye(2), torch.tensor([0, 1]), num_bins=0)
