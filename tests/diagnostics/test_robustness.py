from __future__ import annotations

import math

import pytest
import torch

from pyro_advbayes.diagnostics import accuracy_curve, accuracy_under_attack, gradient_norms, softmax_robustness


def one_hot(classes: list[int], num_classes: int = 10) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).double()


def test_a_label_that_flips_with_certainty_has_robustness_zero():
    assert softmax_robustness(one_hot([0, 1, 2]), one_hot([3, 4, 5])).value == 0
    second = softmax_robustness(one_hot([0, 1, 2]).softmax(-1), one_hot([3, 4, 5]).softmax(-1))
    assert second.value == pytest.approx(1 - (math.e - 1) / (math.e + 9))  # 0.853, what a second softmax would make of it


def test_robustness_by_its_definition_is_that_of_the_mean_over_draws():
    clean, attacked = (torch.randn(draws, 30, 4, dtype=torch.float64).softmax(-1) for draws in (5, 7))
    change = torch.stack([max((a - b).abs()) for a, b in zip(clean.mean(0), attacked.mean(0), strict=True)])
    found = softmax_robustness(clean, attacked)
    assert found.value == pytest.approx(1 - change.mean().item())
    assert found.error == pytest.approx(change.std().item() / math.sqrt(30))
    assert softmax_robustness(clean, clean) == (1.0, 0.0)


def test_draws_that_change_in_opposite_directions_leave_the_mean_prediction_as_it_was():
    draws = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])
    assert softmax_robustness(draws, draws.flip(0)).value == 1
    assert softmax_robustness(draws[:1], draws[1:]).value == pytest.approx(0.2)


def test_robustness_of_different_inputs_is_refused():
    with pytest.raises(ValueError, match=r"attacked has inputs and classes \[2, 10\], probs has \[3, 10\]"):
        softmax_robustness(one_hot([0, 1, 2]), one_hot([0, 1]))


def test_accuracy_under_attack_has_the_binomial_error():
    classes = [0] * 300 + [1] * 100
    found = accuracy_under_attack(one_hot(classes), torch.zeros(400, dtype=torch.long))
    assert found.value == 0.75 and found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.01)


def test_an_accuracy_of_one_is_not_free_of_error():
    found = accuracy_under_attack(one_hot([3] * 50), torch.full((50,), 3))
    assert found.value == 1 and found.error == pytest.approx(0.5 / 51)


def test_accuracy_is_that_of_the_mean_prediction():
    draws = torch.tensor([[[0.6, 0.4]], [[0.6, 0.4]], [[0.0, 1.0]]])  # two of three draws vote for class 0
    assert accuracy_under_attack(draws, torch.tensor([1])).value == 1


def test_a_curve_is_its_points():
    labels, wrong = torch.zeros(100, dtype=torch.long), (0, 20, 70)
    predictions = (one_hot([0] * (100 - n) + [1] * n) for n in wrong)
    curve = accuracy_curve([0, 0.1, 0.2], predictions, labels)
    assert curve.eps.tolist() == [0, 0.1, 0.2] and curve.accuracy.tolist() == pytest.approx([1, 0.8, 0.3])
    assert curve.error[1].item() == accuracy_under_attack(one_hot([0] * 80 + [1] * 20), labels).error


@pytest.mark.parametrize(
    ("eps", "words"), [([], "one number or more"), ([0.1, 0.1], "increasing order"), ([0.1, 0.2], "2 sizes, attacked has 1")]
)
def test_sizes_that_do_not_fit_are_refused(eps, words):
    with pytest.raises(ValueError, match=words):
        accuracy_curve(eps, [one_hot([0])], torch.tensor([0]))


def test_norms_are_those_of_the_mean_gradient():
    gradients = torch.randn(100, 6, 2, 3) + 0.5
    found = gradient_norms(gradients, [1, 7, 100])
    assert found.draws.tolist() == [1, 7, 100] and found.linf.shape == (3, 6)
    for row, count in enumerate((1, 7, 100)):
        mean = gradients[:count].double().mean(0).flatten(1)
        torch.testing.assert_close(found.linf[row], mean.abs().amax(1))
        torch.testing.assert_close(found.l2[row], mean.square().sum(1).sqrt())
        lengths = gradients[:count].double().flatten(2).square().sum(-1).mean(0)
        torch.testing.assert_close(found.l2_by_chance[row], (lengths / count).sqrt())


@pytest.mark.parametrize("size", [1, 3, 10, 50, 200])
def test_chunks_of_any_size_give_the_same_norms(size):
    gradients = torch.randn(120, 4, 5)
    whole, parts = gradient_norms(gradients), gradient_norms(chunk for chunk in gradients.split(size))
    assert whole.draws.tolist() == parts.draws.tolist() == [1, 10, 50, 100, 120]
    for a, b in zip(whole[1:], parts[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_expectation_zero_fall_as_chance_has_it_and_others_do_not():
    noise = torch.randn(2000, 50, 20)
    zero, biased = gradient_norms(noise), gradient_norms(noise + 0.5)
    ratio = zero.l2 / zero.l2_by_chance
    assert zero.draws[-1] == 2000
    # the square of the ratio is a mean of 20 squared normals for each of 50 inputs
    assert (ratio.square().mean(1) - 1).abs().max() < 4 * math.sqrt(2 / 1000)
    assert biased.l2[-1].mean() == pytest.approx(0.5 * math.sqrt(20), rel=0.05)
    assert (biased.l2[-1] > 15 * biased.l2_by_chance[-1]).all()


def test_the_share_of_inputs_whose_norm_falls_with_every_count_by_hand():
    means = torch.tensor([[8.0, 8.0, 1.0], [4.0, 4.0, 4.0], [2.0, 5.0, 2.0]])  # running means at 1, 2 and 3 draws
    sums = means * torch.tensor([[1.0], [2.0], [3.0]])
    gradients = torch.diff(sums, dim=0, prepend=torch.zeros(1, 3)).unsqueeze(-1)
    assert gradient_norms(gradients, [1, 2, 3]).share_falling.value == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="only one"):
        _ = gradient_norms(gradients, [2]).share_falling


@pytest.mark.parametrize(
    ("gradients", "draws", "words"),
    [
        (torch.randn(5, 2, 3), [1, 6], "more draws than there are: 5"),
        (torch.randn(5, 2, 3), [2, 1], "increasing order"),
        (torch.randn(5, 2, 3), [0, 1], ">= 1"),
        (torch.randn(5), None, r"\[draws, N, \*input\]"),
        (torch.full((2, 2, 3), float("nan")), None, "NaN"),
        ([], None, "more draws than there are: 0"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradients, draws, words):
    with pytest.raises(ValueError, match=words):
        gradient_norms(gradients, draws)
