"""The losses that attacks raise."""

from __future__ import annotations

import pytest
import torch

from pyro_advbayes.attacks.losses import cross_entropy, dlr, margin

LOGITS = torch.tensor([[3.0, 1.0, 0.5, -2.0], [0.0, 2.0, 4.0, 5.0]])
LABELS = torch.tensor([0, 1])


def test_each_loss_is_its_formula():
    torch.testing.assert_close(margin(LOGITS, LABELS), torch.tensor([-2.0, 3.0]))
    torch.testing.assert_close(dlr(LOGITS, LABELS), torch.tensor([-2.0 / 2.5, 3.0 / 3.0]))
    expected = torch.nn.functional.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(cross_entropy(LOGITS.log_softmax(-1), LABELS), expected)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_margins_do_not_change_with_a_constant_and_the_ratio_with_a_factor_neither(loss):
    shift = torch.tensor([[7.0], [-3.0]])
    torch.testing.assert_close(loss(LOGITS + shift, LABELS), loss(LOGITS, LABELS))
    if loss is dlr:
        torch.testing.assert_close(loss(100 * LOGITS, LABELS), loss(LOGITS, LABELS))


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
def test_draws_are_independent(loss):
    draws = torch.randn(5, 2, 4).log_softmax(-1)
    torch.testing.assert_close(loss(draws, LABELS), torch.stack([loss(draw, LABELS) for draw in draws]))


def test_the_ratio_is_finite_where_three_logits_are_the_same():
    logits = torch.zeros(1, 4, requires_grad=True)
    value = dlr(logits, LABELS[:1])
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value == 0 and gradient.isfinite().all()
