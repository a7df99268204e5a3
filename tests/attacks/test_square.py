"""Random search that needs no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import PGD, Square, Uniform, square
from pyro_advbayes.attacks.square import _entries, _windows
from tests.attacks.posteriors import digits_examples, digits_network


def test_windows_are_squares_inside_every_image_at_different_places():
    images = torch.zeros(200, 3, 9, 12)
    mask = _windows(images, 0.15)  # 16 pixels of 108
    assert mask.shape == (200, 1, 9, 12)
    assert (mask.sum((1, 2, 3)) == 16).all()
    assert (mask.any(2).sum(-1) == 4).all() and (mask.any(3).sum(-1) == 4).all()
    share = mask.double().mean(0)[0]
    assert share[0, 0] > 0 and share[-1, -1] > 0 and len({tuple(m.flatten().nonzero()[0].tolist()) for m in mask}) > 20
    assert _windows(images, 1.0).sum((1, 2, 3)).unique().tolist() == [81]  # no larger than the shorter side
    assert _windows(images, 1e-9).sum((1, 2, 3)).unique().tolist() == [1]


@pytest.mark.parametrize(("queries", "first"), [(1000, [0.8, 0.4, 0.4, 0.4, 0.4, 0.2]), (2000, [0.8] * 2 + [0.4] * 8 + [0.2])])
def test_windows_shrink_as_they_do_in_the_authors_code(monkeypatch, queries, first):
    shares = []
    monkeypatch.setattr(square, "_windows", lambda images, share: shares.append(share) or _windows(images, share))
    Square(0.1, queries)(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.long))
    assert shares[: len(first)] == first and shares[-1] == 0.8 / 2**8


def test_entries_are_as_many_in_every_row():
    mask = _entries(torch.zeros(50, 40), 0.25)
    assert (mask.sum(1) == 10).all() and mask.any(0).all()
    assert (_entries(torch.zeros(50, 40), 1e-9).sum(1) == 1).all()


class Steps(nn.Module):
    """A network behind steps of inputs and logits, so that it has no gradient."""

    def __init__(self):
        super().__init__()
        self.net = digits_network()

    def forward(self, x):
        return (self.net((x.flatten(1) * 255).round() / 255) * 100).round() / 100


def test_it_succeeds_where_there_is_no_gradient_and_noise_does_not():
    x, y = digits_examples()
    for shape in ((-1, 64), (-1, 1, 8, 8)):
        inputs = x.view(shape)
        right = [
            float((Steps()(attack(Steps(), inputs, y)).argmax(-1) == y).double().mean()) for attack in (Uniform(0.1), Square(0.1, 300))
        ]
        assert right[0] > 0.9 and right[1] < 0.5


def test_with_more_queries_it_comes_near_to_pgd():
    net = digits_network()
    x, y = digits_examples()
    right = [
        float((net(attack(net, x, y)).argmax(-1) == y).double().mean())
        for attack in (Square(0.06, 20), Square(0.06, 500), Square(0.06, 2000), PGD(0.06))
    ]
    assert right[0] > right[1] >= right[2] and right[2] < right[3] + 0.1
