from __future__ import annotations

import math

import pytest
import torch

from pyro_advbayes.diagnostics import (
    expected_entropy,
    model_variance,
    mutual_information,
    predictive_entropy,
    variation_ratio,
    vote_variation_ratio,
)

SCORES = [predictive_entropy, expected_entropy, mutual_information, variation_ratio, vote_variation_ratio, model_variance]

# One input, four draws that are sure of one of three classes: pbar = (1/2, 1/4, 1/4).
SURE = torch.eye(3)[[0, 0, 1, 2]].unsqueeze(1)


@pytest.mark.parametrize(
    ("score", "value"),
    [
        (predictive_entropy, 1.5 * math.log(2)),
        (expected_entropy, 0.0),
        (mutual_information, 1.5 * math.log(2)),
        (variation_ratio, 0.5),
        (vote_variation_ratio, 0.5),
        (model_variance, 1 - 0.375),
    ],
)
def test_scores_of_sure_draws_that_disagree_by_hand(score, value):
    assert score(SURE).tolist() == pytest.approx([value], abs=1e-7)


def test_scores_by_their_definitions():
    p = torch.randn(7, 11, 5, dtype=torch.float64).mul(2).softmax(-1)
    mean = sum(p) / 7
    entropy_of_mean = -(mean * mean.log()).sum(-1)
    mean_entropy = sum(-(q * q.log()).sum(-1) for q in p) / 7
    torch.testing.assert_close(predictive_entropy(p), entropy_of_mean)
    torch.testing.assert_close(expected_entropy(p), mean_entropy)
    torch.testing.assert_close(mutual_information(p), entropy_of_mean - mean_entropy)
    torch.testing.assert_close(variation_ratio(p), torch.stack([1 - max(row) for row in mean]))
    torch.testing.assert_close(model_variance(p), sum((q * q).sum(-1) for q in p) / 7 - (mean * mean).sum(-1))
    votes = [[int(q[i].argmax()) for q in p] for i in range(11)]
    wanted = [1 - max(votes[i].count(k) for k in range(5)) / 7 for i in range(11)]
    assert vote_variation_ratio(p).tolist() == pytest.approx(wanted)


def test_the_two_variation_ratios_differ_where_draws_agree_but_are_not_sure():
    p = torch.tensor([[[0.6, 0.4]], [[0.8, 0.2]]])
    assert variation_ratio(p).item() == pytest.approx(0.3)
    assert vote_variation_ratio(p).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_variation_ratio_of_saturated_predictions_is_what_is_left_for_the_other_classes(dtype):
    gaps = torch.tensor([12.0, 20.0, 40.0, 80.0], dtype=dtype)  # exp(-20) is below float32's spacing at 1, exp(-40) below float64's
    p = torch.stack([gaps, torch.zeros_like(gaps), torch.zeros_like(gaps)], -1).softmax(-1)
    wanted = 2 / (gaps.exp() + 2)
    torch.testing.assert_close(variation_ratio(p), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(variation_ratio(p.expand(3, -1, -1)), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("score", [predictive_entropy, expected_entropy, variation_ratio, model_variance], ids=lambda f: f.__name__)
def test_scores_of_saturated_float32_predictions_are_those_of_the_exact_ones(score):
    gaps = 16 + 4 * torch.rand(10, 50, dtype=torch.float64)  # the largest is 1 or one of its neighbours in float32
    exact = torch.stack([gaps, torch.zeros_like(gaps), torch.zeros_like(gaps)], -1).softmax(-1)
    torch.testing.assert_close(score(exact.float()).double(), score(exact), rtol=1e-4, atol=0)


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_zeros_in_probabilities_are_no_trouble(score):
    assert score(SURE.float()).isfinite().all()
    assert score(torch.eye(4)[None]).tolist() == [0.0] * 4


@pytest.mark.parametrize("score", [predictive_entropy, variation_ratio], ids=lambda f: f.__name__)
def test_a_mean_prediction_scores_as_its_draws_do(score):
    p = torch.randn(7, 11, 5, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(score(p.mean(0)), score(p))


def test_model_variance_is_zero_if_and_only_if_all_draws_agree():
    agree = torch.randn(1, 200, 10).softmax(-1).repeat(7, 1, 1)
    assert (model_variance(agree) == 0).all()
    differ = agree.clone()
    differ[3, :, :2] = differ[3, :, :2].flip(-1)
    assert (model_variance(differ) > 0).all()


def test_mutual_information_of_agreeing_float32_draws_is_not_rounding_noise():
    agree = torch.randn(1, 200, 10).softmax(-1).repeat(7, 1, 1)
    information = mutual_information(agree)
    assert (information == 0).all()
    assert (mutual_information(agree.double()) == 0).all()


def test_small_disagreements_are_measured_in_float32():
    # To second order in d, p = 1/2 ± d has the information 2 d^2 and the variance 2 d^2.
    d = 2.0**-12
    p = torch.tensor([[[0.5 + d, 0.5 - d]], [[0.5 - d, 0.5 + d]]])
    assert mutual_information(p).item() == pytest.approx(2 * d**2, rel=1e-5)
    assert model_variance(p).item() == pytest.approx(2 * d**2, rel=1e-5)


def test_scores_pass_gradients_to_the_probabilities():
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for score in (predictive_entropy, expected_entropy, mutual_information, variation_ratio, model_variance):
        assert torch.autograd.gradcheck(lambda x, score=score: score(x.softmax(-1)), logits)
