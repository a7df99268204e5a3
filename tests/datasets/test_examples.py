from __future__ import annotations

import torch

from pyro_advbayes.datasets.examples import image_examples


def test_pixels_are_left_as_they_were():
    pixels = torch.full((1, 2, 2), 255.0)
    x, _ = image_examples(pixels, torch.zeros(1), white=255, scale=(0.0, 1.0), flatten=False)
    assert (x == 1).all() and (pixels == 255).all()
