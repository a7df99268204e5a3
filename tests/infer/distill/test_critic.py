from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_advbayes.infer.distill.critic import Critic


def loss_by_autograd(critic: Critic, real: Tensor, fake: Tensor, share: Tensor, penalty: float) -> Tensor:
    mixed = (share[:, None] * real + (1 - share[:, None]) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return critic(fake).mean() - critic(real).mean() + penalty * ((slope.norm(dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("hidden", [(7,), (7, 5), (6, 8, 5)])
@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_gradients_of_the_critics_loss_equal_autograds(hidden, penalty):
    critic = Critic(4, hidden, torch.float64, torch.device("cpu"))
    for p in critic.parameters():
        torch.nn.init.normal_(p, std=0.7)  # biases too
    real, fake, share = torch.randn(9, 4).double(), torch.randn(9, 4).double() + 1, torch.rand(9).double()
    expected = torch.autograd.grad(loss_by_autograd(critic, real, fake, share, penalty), list(critic.parameters()), allow_unused=True)
    distance = critic.backward(real, fake, share, penalty)
    for p, gradient in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if gradient is None else gradient)
    torch.testing.assert_close(distance, (critic(real).mean() - critic(fake).mean()).detach())


def test_slope_equals_autograds():
    critic = Critic(3, (6, 5), torch.float64, torch.device("cpu"))
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(critic.slope(x.detach()), torch.autograd.grad(critic(x).sum(), x)[0])


def test_penalty_of_a_critic_that_is_linear_where_it_is_looked_at_pulls_its_norm_to_one():
    # one hidden unit that is always on: D = w a x with slope |w a|, penalty 10 (|w a| - 1)^2
    critic = Critic(2, (1,), torch.float64, torch.device("cpu"))
    with torch.no_grad():
        critic.layers[0].weight.copy_(torch.tensor([[3.0, 4.0]]))
        critic.layers[0].bias.fill_(100.0)
        critic.layers[2].weight.fill_(0.5)
    x = torch.randn(5, 2, dtype=torch.float64)
    critic.backward(x, x, torch.rand(5).double(), 10.0)
    norm = 0.5 * 5.0
    torch.testing.assert_close(critic.layers[2].weight.grad, torch.full((1, 1), 20 * (norm - 1) * 5.0).double())
    torch.testing.assert_close(critic.layers[0].weight.grad, (20 * (norm - 1) * 0.5 * torch.tensor([[0.6, 0.8]])).double())


def test_where_the_critic_is_flat_the_penalty_has_no_gradient_and_no_nan():
    critic = Critic(2, (3,), torch.float32, torch.device("cpu"))
    torch.nn.init.constant_(critic.layers[0].bias, -100.0)
    x = torch.randn(5, 2)
    critic.backward(x, x, torch.rand(5), 10.0)
    assert all(bool((p.grad == 0).all()) for p in critic.parameters())
