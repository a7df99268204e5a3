from __future__ import annotations

import itertools

import pytest
import torch

from pyro_advbayes.diagnostics import LearningCurve, acquire, acquire_regression, batch_bald, mutual_information, predictive_entropy


def predictions(draws=4, inputs=6, classes=3, sharp=2.0):
    return (sharp * torch.randn(draws, inputs, classes, dtype=torch.float64)).softmax(-1)


def joint_information(probs, chosen):
    """I(labels of the chosen inputs; draw), by counting all joint labels."""
    draws, _, classes = probs.shape
    total = 0.0
    for labels in itertools.product(range(classes), repeat=len(chosen)):
        p = torch.stack([probs[:, i, k] for i, k in zip(chosen, labels, strict=True)]).prod(0)
        total += float(torch.special.entr(p.mean()))
    return total - float(torch.special.entr(probs[:, chosen]).sum() / draws)


def test_every_choice_of_batch_bald_raises_the_joint_information_the_most():
    probs = predictions()
    chosen = batch_bald(probs, 4).tolist()
    for size in range(4):
        gains = [joint_information(probs, [*chosen[:size], i]) if i not in chosen[:size] else -1.0 for i in range(6)]
        assert gains[chosen[size]] == pytest.approx(max(gains))
    assert chosen[0] == int(mutual_information(probs).argmax())


def test_drawn_labels_estimate_what_all_labels_give():
    """With far fewer joint labels than there are (81 of 3^8), most choices are those of the full count."""
    torch.manual_seed(0)
    probs = predictions(inputs=10)
    exact = batch_bald(probs, 8, num_labels=3**8).tolist()
    drawn = batch_bald(probs, 8, num_labels=2000).tolist()
    assert exact[:6] == drawn[:6]  # up to here nothing had to be drawn in either, or much less than there is
    information = [joint_information(probs, chosen) for chosen in (exact, drawn)]
    assert information[1] == pytest.approx(information[0], rel=0.02)


def test_long_batches_stay_finite():
    probs = predictions(draws=6, inputs=400, classes=10, sharp=0.5)
    chosen = batch_bald(probs, 390, num_labels=50)
    assert len(chosen.unique()) == 390
    with pytest.raises(ValueError, match="count=7: inputs to label of the pool, an int from 1 to 6"):
        batch_bald(predictions(), 7)
    with pytest.raises(ValueError, match="num_labels=0: an int >= 1"):
        batch_bald(predictions(), 2, num_labels=0)


def test_labels_that_no_draw_allows_have_no_weight():
    probs = predictions(inputs=5)
    probs[:, 2] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.double)
    probs[:2, 3], probs[2:, 3] = torch.eye(3, dtype=torch.double)[0], torch.eye(3, dtype=torch.double)[2]
    chosen = batch_bald(probs, 5).tolist()
    for size in range(4):
        gains = [joint_information(probs, [*chosen[:size], i]) if i not in chosen[:size] else -1.0 for i in range(5)]
        assert gains[chosen[size]] == pytest.approx(max(gains))


def test_batch_bald_does_not_ask_the_same_twice_and_bald_does():
    probs = predictions(inputs=5)
    best = int(mutual_information(probs).argmax())
    probs = torch.cat([probs[:, [best]], probs], 1)
    assert set(acquire(probs, 2, "bald").tolist()) == {0, best + 1}
    assert set(acquire(probs, 2, "batch_bald").tolist()) != {0, best + 1}


def test_scores_are_taken_from_the_highest_down_and_ties_in_order():
    probs = predictions(inputs=20)
    assert acquire(probs, 5, "entropy").tolist() == predictive_entropy(probs).argsort(descending=True)[:5].tolist()
    same = torch.full((2, 6, 3), 1 / 3)
    for acquisition in ("entropy", "bald", "variation_ratio", "batch_bald"):
        assert acquire(same, 3, acquisition).tolist() == [0, 1, 2]
    for count in (37, 1001):
        same = torch.randn(5, 1, 3, dtype=torch.double).softmax(-1).repeat(1, count, 1)
        for each in (same, same.float()):
            for acquisition in ("entropy", "bald", "variation_ratio"):
                assert acquire(each, 5, acquisition).tolist() == [0, 1, 2, 3, 4]
            assert int(acquire(each, 5, "batch_bald")[0]) == 0
    # no label tells one draw from itself, nor draws that agree from each other
    agree = torch.randn(1, 40, 10).softmax(-1)
    assert acquire(agree, 6, "batch_bald").tolist() == acquire(agree.repeat(20, 1, 1), 6, "batch_bald").tolist() == [0, 1, 2, 3, 4, 5]
    assert acquire(probs.float(), 4, "batch_bald").tolist() == acquire(probs, 4, "batch_bald").tolist()


def test_random_choices_are_different_inputs_under_the_seed():
    torch.manual_seed(3)
    first = acquire(predictions(inputs=50), 20, "random")
    assert len(first.unique()) == 20 and int(first.max()) < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [((0,), "count=0"), ((7,), "an int from 1 to 6"), ((2, "BALD"), "acquisition='BALD': choose one of 'entropy', 'bald'")],
)
def test_what_cannot_be_acquired_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        acquire(predictions(), *options)


def test_a_learning_curve_has_its_mean_and_standard_error():
    curve = LearningCurve(torch.tensor([20, 30]), torch.tensor([[0.5, 0.7], [0.7, 0.7], [0.6, 0.7]]))
    torch.testing.assert_close(curve.mean, torch.tensor([0.6, 0.7]))
    torch.testing.assert_close(curve.error, torch.tensor([0.1 / 3**0.5, 0.0]), atol=1e-6, rtol=1e-5)
    assert LearningCurve(torch.tensor([20]), torch.tensor([[0.5]])).error.tolist() == [0.0]


def test_a_regression_asks_by_the_whole_variance_or_by_that_of_the_means():
    mean = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 2.0]])  # variances 0, 1, 0, 0
    scale = torch.tensor([[1.0, 0.1, 3.0, 1.0], [1.0, 0.1, 1.0, 2.0]])  # mean squares 1, 0.01, 5, 2.5
    assert acquire_regression(mean, scale, 4).tolist() == [2, 3, 1, 0]
    assert acquire_regression(mean, scale, 2, "mean_variance").tolist() == [1, 0]  # the first of a tie
    assert acquire_regression(mean, 0.5, 1).tolist() == [1]
    assert sorted(acquire_regression(mean, scale, 4, "random").tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), 1.0, 1), r"mean must be \[draws, N\], not \[4\]"),
        ((torch.zeros(2, 4), -1.0, 1), "scale has entries that are not above 0"),
        ((torch.zeros(2, 4), 1.0, 5), "count=5: inputs to label of the pool, an int from 1 to 4"),
        ((torch.zeros(2, 4), 1.0, 1, "bald"), "acquisition='bald': choose one of 'variance', 'mean_variance', 'random'"),
    ],
)
def test_what_makes_no_sense_for_a_regression_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        acquire_regression(*arguments)
