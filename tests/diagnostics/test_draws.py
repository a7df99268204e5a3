from __future__ import annotations

import pytest
import torch

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.diagnostics import accuracy, draw_quality, predictive_entropy, retained_accuracy
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal


def predictions(draws: int = 9, inputs: int = 50, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(draws, inputs, classes, dtype=torch.double).mul(2).log_softmax(-1), torch.randint(classes, (inputs,))


def test_accuracies_are_those_of_each_draw_and_of_the_mean():
    log_probs, labels = predictions()
    quality = draw_quality(log_probs, labels)
    each = [float((row.argmax(-1) == labels).double().mean()) for row in log_probs]
    assert quality.accuracy.tolist() == pytest.approx(each)
    assert (quality.lowest, quality.highest) == (min(each), max(each)) and quality.spread == max(each) - min(each)
    assert quality.mean == pytest.approx(sum(each) / len(each))
    assert quality.ensembled.value == pytest.approx(float(accuracy(log_probs.exp(), labels)))
    torch.testing.assert_close(quality.probs, log_probs.exp().mean(0))


def test_chunks_of_draws_make_what_all_draws_make():
    log_probs, labels = predictions()
    whole = draw_quality(log_probs, labels)
    for size in (1, 2, 9):
        found = draw_quality((chunk for chunk in log_probs.float().split(size)), labels)
        assert torch.equal(found.accuracy, whole.accuracy) and found.ensembled == whole.ensembled
        torch.testing.assert_close(found.probs, whole.probs, rtol=1e-6, atol=1e-7)


def test_a_classifier_of_draws_gives_it_all_in_one_line():
    model, x = mlp((3, 8, 2)), torch.randn(40, 3)
    labels = (x[:, 0] > 0).long()
    guide = AutoAdversarialNormal(model, init_scale=0.5)
    guide(x, labels)
    network = ab.PosteriorClassifier(model, guide=guide, num_samples=11, chunk_size=4)
    quality = draw_quality(network.log_probs(x), labels)
    assert quality.accuracy.shape == (11,) and quality.lowest < quality.highest
    torch.testing.assert_close(quality.probs.float(), network(x).exp().detach(), rtol=1e-4, atol=1e-5)


def test_draws_that_are_certain_count():
    log_probs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]).log()
    quality = draw_quality(log_probs, torch.tensor([0, 1]))
    assert quality.accuracy.tolist() == [1.0, 0.5]
    assert str(quality) == "2 draws: lowest 0.5000, highest 1.0000, mean 0.7500, ensembled 1.0000 ± 0.1667"


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_half_precision_counts_too(dtype, classes):
    log_probs, labels = predictions(classes=classes)
    quality, coarse = draw_quality(log_probs, labels), draw_quality(log_probs.to(dtype), labels)
    assert (quality.probs - coarse.probs).abs().max() < 4 * torch.finfo(dtype).eps
    assert abs(quality.mean - coarse.mean) < 0.1
    with pytest.raises(ValueError, match="must sum to 1"):
        draw_quality((log_probs - 0.1).to(dtype), labels)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (torch.rand(3, 5, 2).softmax(-1), "entries above 0: give logarithms"),
        (-torch.rand(3, 5, 2), "must sum to 1"),
        (torch.rand(5, 2).log_softmax(-1), r"\[draws, N, K\]"),
        ([], "no draws"),
        (torch.full((1, 5, 2), torch.nan), "above 0|NaN"),
    ],
)
def test_what_are_no_logarithms_of_probabilities_is_refused(log_probs, message):
    with pytest.raises(ValueError, match=message):
        draw_quality(log_probs, torch.zeros(5, dtype=torch.long))


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="labels"):
        draw_quality(predictions()[0], torch.zeros(3, dtype=torch.long))


def test_retained_accuracy_by_its_definition():
    log_probs, labels = predictions(inputs=101)
    probs = log_probs.exp()
    found = retained_accuracy(probs, labels, [0.2, 0.5, 1.0])
    order = predictive_entropy(probs).argsort()
    right = (probs.mean(0).argmax(-1) == labels).double()[order]
    assert found.accuracy.tolist() == pytest.approx([float(right[:size].mean()) for size in (20, 50, 101)])
    assert found.accuracy[-1] == pytest.approx(float(accuracy(probs, labels)))
    assert found.share.tolist() == [0.2, 0.5, 1.0]


def test_where_the_uncertain_are_wrong_less_is_more():
    labels = torch.arange(100) % 2
    sure = torch.where(torch.arange(100) < 60, 0.95, 0.45)
    probs = torch.stack([torch.where(labels == k, sure, 1 - sure) for k in (0, 1)], -1)
    found = retained_accuracy(probs, labels, (0.3, 0.6, 0.8, 1.0))
    assert found.accuracy.tolist() == pytest.approx([1.0, 1.0, 0.75, 0.6])


def test_the_order_of_inputs_of_equal_uncertainty_is_of_no_matter():
    probs = torch.tensor([[0.8, 0.2]] * 10)
    labels = torch.tensor([0] * 7 + [1] * 3)
    for each in (labels, labels.flip(0)):
        assert retained_accuracy(probs, each, (0.2, 0.5)).accuracy.tolist() == pytest.approx([0.7, 0.7])


def test_all_right_is_an_accuracy_of_1():
    probs = torch.tensor([[0.9, 0.1]]).repeat(1000, 1)
    assert retained_accuracy(probs, torch.zeros(1000, dtype=torch.long), (0.3, 0.7, 1.0)).accuracy.tolist() == [1.0, 1.0, 1.0]


def test_another_uncertainty_may_be_given():
    log_probs, labels = predictions()
    right = (log_probs.exp().mean(0).argmax(-1) == labels).double()
    found = retained_accuracy(log_probs.exp(), labels, (0.1, 1.0), uncertainty=-right)
    assert found.accuracy[0] == 1
    with pytest.raises(ValueError, match=r"uncertainty must be \[50\]"):
        retained_accuracy(log_probs.exp(), labels, uncertainty=right[:3])


@pytest.mark.parametrize("shares", [(), (0.0, 0.5), (0.5, 1.2), (0.5, 0.5), (0.8, 0.2)])
def test_shares_out_of_range_are_refused(shares):
    log_probs, labels = predictions()
    with pytest.raises(ValueError, match="shares must be numbers in"):
        retained_accuracy(log_probs.exp(), labels, shares)
