from __future__ import annotations

import pytest
import torch

from pyro_advbayes.diagnostics import aupr_in, aupr_out, auroc

ALL = [auroc, aupr_out, aupr_in]


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(200), torch.randn(300) + 1


def test_auroc_is_the_probability_that_one_of_the_others_scores_higher():
    own, others = scores()
    own, others = own.mul(4).round(), others.mul(4).round()  # with ties
    higher = (others[:, None] > own).double() + 0.5 * (others[:, None] == own).double()
    assert auroc(own, others) == pytest.approx(higher.mean().item())


def average_precision(positive: list[float], negative: list[float]) -> float:
    """The precision at every positive, going down the scores, averaged; no ties."""
    total = 0.0
    for threshold in positive:
        kept = sum(s >= threshold for s in positive)
        total += kept / (kept + sum(s >= threshold for s in negative))
    return total / len(positive)


def test_aupr_is_the_average_precision_of_the_kind_that_it_names():
    own, others = scores()
    assert aupr_out(own, others) == pytest.approx(average_precision(others.tolist(), own.tolist()))
    assert aupr_in(own, others) == pytest.approx(average_precision((-own).tolist(), (-others).tolist()))


def test_aupr_of_the_two_kinds_swap_when_labels_and_sign_are_swapped():
    own, others = scores()
    assert aupr_in(own, others) == pytest.approx(aupr_out(-others, -own))
    assert aupr_out(own, others) == pytest.approx(aupr_in(-others, -own))
    assert aupr_in(own, others) != pytest.approx(aupr_out(own, others))
    assert auroc(own, others) == pytest.approx(auroc(-others, -own))


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.__name__)
def test_scores_that_are_all_higher_elsewhere_are_perfect(f):
    own, others = torch.rand(10), torch.rand(20) + 1
    assert f(own, others) == pytest.approx(1)
    assert f(others, own) < 0.9


@pytest.mark.parametrize(("f", "value"), [(auroc, 0.5), (aupr_out, 0.75), (aupr_in, 0.25)])
def test_scores_that_are_all_alike_are_chance(f, value):
    assert f(torch.zeros(10), torch.zeros(30)) == value


def test_scores_may_be_of_half_precision_and_require_gradients():
    own, others = scores()
    own_16, others_16 = own.bfloat16().requires_grad_(), others.bfloat16().requires_grad_()
    assert auroc(own_16, others_16) == pytest.approx(auroc(own, others), abs=0.01)
