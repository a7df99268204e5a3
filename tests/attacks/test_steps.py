"""Attacks that are a few lines of arithmetic do that arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import APGD, FGSM, IFGSM, MIM, PGD, WRM
from pyro_advbayes.attacks.apgd import _Schedule, checkpoints
from tests.attacks.posteriors import digits_examples, digits_network, examples, posterior

EPS = 0.1


@pytest.fixture
def case():
    """A network, inputs in the middle of their range, labels, and the gradient of the cross-entropy."""
    _, (network,) = posterior(1)
    x, y = examples()
    x = 0.4 + 0.2 * x

    def slope(point):
        point = point.clone().requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(network(point), y, reduction="sum"), point)[0]

    return network, x, y, slope


def test_fgsm_is_its_formula(case):
    network, x, y, slope = case
    torch.testing.assert_close(FGSM(EPS)(network, x, y), x + EPS * slope(x).sign())
    torch.testing.assert_close(FGSM(EPS, norm="l2")(network, x, y), x + EPS * slope(x) / slope(x).norm(dim=1, keepdim=True))
    torch.testing.assert_close(FGSM(EPS, targeted=True)(network, x, y), x - EPS * slope(x).sign())


@pytest.mark.parametrize(("attack", "step"), [(IFGSM(EPS, 7), EPS / 7), (PGD(EPS, 7, random_start=False), 2.5 * EPS / 7)])
def test_iterated_steps_are_projected_on_the_ball(case, attack, step):
    network, x, y, slope = case
    point = x
    for _ in range(7):
        point = x + (point + step * slope(point).sign() - x).clamp(-EPS, EPS)
    torch.testing.assert_close(attack(network, x, y), point)


def test_pgd_starts_at_a_random_point_of_the_ball(case):
    network, x, y, slope = case
    torch.manual_seed(5)
    start = x + torch.empty_like(x).uniform_(-EPS, EPS)
    expected = x + (start + 0.01 * slope(start).sign() - x).clamp(-EPS, EPS)
    torch.manual_seed(5)
    torch.testing.assert_close(PGD(EPS, 1, 0.01)(network, x, y), expected)


def test_mim_adds_up_gradients_of_size_1(case):
    network, x, y, slope = case
    point, total = x, torch.zeros_like(x)
    for _ in range(5):
        gradient = slope(point)
        total = 0.9 * total + gradient / gradient.abs().sum(1, keepdim=True)
        point = x + (point + EPS / 5 * total.sign() - x).clamp(-EPS, EPS)
    torch.testing.assert_close(MIM(EPS, 5, decay=0.9)(network, x, y), point)


def test_mim_forgets_earlier_gradients_at_its_decay(case):
    """In the Euclidean norm, where what is left of them turns the step."""
    network, x, y, slope = case
    points = {}
    for decay in (0.3, 1.0):
        point, total = x, torch.zeros_like(x)
        for _ in range(3):
            gradient = slope(point)
            total = decay * total + gradient / gradient.abs().sum(1, keepdim=True)
            point = point + 0.02 * total / total.norm(dim=1, keepdim=True)  # three of these stay in the ball
        torch.testing.assert_close(MIM(EPS, 3, 0.02, decay, norm="l2")(network, x, y), point)
        points[decay] = point
    assert float((points[0.3] - points[1.0]).abs().max()) > 1e-4


class Turning(nn.Module):
    """Two classes whose margin is linear, with another slope from the second gradient on."""

    def __init__(self, *slopes):
        super().__init__()
        self.slopes, self.gradients = slopes, 0

    def forward(self, x):
        slope = self.slopes[min(self.gradients, 1)]
        self.gradients += x.requires_grad
        return torch.stack([torch.zeros_like(x[:, 0]), x @ slope], 1)


@pytest.mark.parametrize("scale", [1e-42, 1e36])
def test_mim_weighs_gradients_of_any_size_alike(scale):
    x, y = 0.4 + 0.2 * torch.rand(5, 6), torch.zeros(5, dtype=torch.long)
    first, second = torch.linspace(-1.0, 1.0, 6), torch.linspace(2.0, -1.0, 6)
    attack = MIM(EPS, 2, norm="l2", loss="margin")
    torch.testing.assert_close(attack(Turning(scale * first, second), x, y), attack(Turning(first, second), x, y), rtol=1e-2, atol=1e-3)


def test_mim_climbs_in_half_precision():
    slope = (300.0 * (-1.0) ** torch.arange(1200)).half()  # a gradient whose sum half precision does not hold
    x = torch.full((2, 1200), 0.5).half()
    found = MIM(EPS, 2, loss="margin")(Turning(slope, slope), x, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(found, x + EPS * slope.sign(), rtol=0, atol=1e-3)


def test_wrm_climbs_the_loss_less_the_price_of_the_distance(case):
    network, x, y, slope = case
    point = x + 0.05 * slope(x)
    for t in range(4):
        point = point + (0.05 * slope(point) - (point - x)) / math.sqrt(t + 2)
    torch.testing.assert_close(WRM(0.05, 4, clip=None)(network, x, y), point)
    # a linear loss is worth the same everywhere: the maximum is exact
    direction = torch.randn(1, 6, dtype=torch.double)
    found = WRM(0.2, 400, clip=None).on_loss(lambda z: (z * direction).sum(1), x)
    torch.testing.assert_close(found, x + 0.2 * direction, rtol=1e-6, atol=1e-9)


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(5)[0] == 2 and checkpoints(1) == [1]


def test_step_sizes_are_halved_one_by_one_where_little_rose_or_nothing_changed():
    loss = torch.zeros(3)
    schedule = _Schedule(loss, 0.4, 100)
    top = torch.tensor([1.0, 1.0, 0.0])  # the third never gets better than its start
    for k in range(1, 23):
        rose = torch.tensor([True, k <= 10, True])  # the second rises in fewer than 75 % of the steps
        returns = schedule.after(k, rose, top)
        assert (returns is None) == (k != 22)
    assert returns.tolist() == [False, True, True]
    torch.testing.assert_close(schedule.step_size, torch.tensor([0.4, 0.2, 0.2]))
    for k in range(23, 42):
        returns = schedule.after(k, torch.ones(3, dtype=torch.bool), top)
    # what halved its step at the last checkpoint is given time; the first has been standing still
    assert returns.tolist() == [True, False, False]
    torch.testing.assert_close(schedule.step_size, torch.tensor([0.2, 0.2, 0.2]))


def test_apgd_steps_with_momentum_and_begins_anew_at_the_best_point_after_a_checkpoint():
    """Of a loss whose top lies inside the ball, which steps of its size jump over."""
    visited = []

    def loss(x):
        visited.append(x.detach())
        return -(x - 0.53).square().sum(1)

    APGD(EPS, 30).on_loss(loss, torch.full((1, 2), 0.5, dtype=torch.double))

    def aim(x, step):
        return (x + step * (0.53 - x).sign()).clamp(0.5 - EPS, 0.5 + EPS)

    assert checkpoints(30)[0] == 7
    torch.testing.assert_close(visited[1], aim(visited[0], 2 * EPS))
    for k in range(1, 7):
        before, x = visited[k - 1 : k + 1]
        momentum = x + 0.75 * (aim(x, 2 * EPS) - x) + 0.25 * (x - before)
        torch.testing.assert_close(visited[k + 1], momentum.clamp(0.5 - EPS, 0.5 + EPS))
    top = max(visited[:8], key=lambda x: float(-(x - 0.53).square().sum()))
    assert not torch.equal(top, visited[7])
    torch.testing.assert_close(visited[8], top + 0.75 * (aim(top, EPS) - top))


@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
def test_apgd_is_no_weaker_than_pgd_of_as_many_steps(loss):
    net = digits_network()
    x, y = digits_examples(200)
    for eps in (0.03, 0.1):
        attacks = PGD(eps, 40, loss=loss), APGD(eps, 40, loss=loss)
        right = [int((net(attack(net, x, y)).argmax(-1) == y).sum()) for attack in attacks]
        assert right[1] <= right[0] + 2


def test_apgd_finds_the_corner_of_a_ball_on_which_a_linear_loss_is_highest():
    x = torch.full((3, 5), 0.5, dtype=torch.double)
    direction = torch.randn(3, 5, dtype=torch.double)
    found = APGD(EPS, 20).on_loss(lambda z: (z * direction).sum(1), x)
    torch.testing.assert_close(found, x + EPS * direction.sign())


def test_the_ratio_of_logits_sees_through_confidence():
    """Logits a thousand times as large leave the cross-entropy without a gradient in float32."""
    net = digits_network()
    sure = nn.Sequential(net, nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        sure[1].weight.copy_(1000 * torch.eye(10))
    x, y = digits_examples()
    x, y = (t[net(x).argmax(-1) == y] for t in (x, y))
    right = {loss: int((net(APGD(EPS, 20, loss=loss)(sure, x, y)).argmax(-1) == y).sum()) for loss in ("cross_entropy", "dlr", "margin")}
    assert right["cross_entropy"] > 0.9 * len(x)
    assert right["dlr"] < 0.5 * len(x) and right["margin"] < 0.5 * len(x)
