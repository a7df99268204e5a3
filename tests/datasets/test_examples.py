from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import FGSM
from pyro_advbayes.datasets.examples import image_examples


def test_pixels_are_left_as_they_were():
    pixels = torch.full((1, 2, 2), 255.0)
    x, _ = image_examples(pixels, torch.zeros(1), white=255, scale=(0.0, 1.0), flatten=False)
    assert (x == 1).all() and (pixels == 255).all()


@pytest.mark.parametrize("scale", [(-1.5, 0.7), (-2.12, 2.64), (0.0, 1.0), (-0.4242, 2.8215)])
def test_black_and_white_are_the_ends_of_the_scale_to_the_last_bit(scale):
    x, y = image_examples(torch.tensor([[[0, 255], [128, 3]]]), torch.zeros(1), white=255, scale=scale, flatten=True)
    assert x[0, :2].tolist() == torch.tensor(scale).tolist()
    low, high = scale
    torch.testing.assert_close(x[0, 2:], torch.tensor([low + (high - low) * pixel / 255 for pixel in (128, 3)]))
    FGSM(0.1, clip=scale)(nn.Linear(4, 2), x, y)
