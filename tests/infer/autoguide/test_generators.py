"""What generators are before anything is trained: their equations and their start."""

from __future__ import annotations

import math

import torch

from pyro_advbayes.infer.autoguide.generators import mlp
from pyro_advbayes.infer.autoguide.hyper import HyperGenerator

CPU = torch.device("cpu")


def test_layers_start_by_he_without_biases():
    """Weights of variance 2 / inputs: their mean square, of n of them, is that within 4 standard errors of the root of 2 / n."""
    layers = mlp((50, 400, 300, 7), torch.float64, CPU)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    for layer in layers[::2]:
        assert not layer.bias.any()
        squares = float(layer.weight.detach().square().mean()) * layer.in_features / 2.0
        assert abs(squares - 1.0) < 4.0 * math.sqrt(2.0 / layer.weight.numel())


def test_a_hypernetwork_is_its_equation_row_by_row():
    generator = HyperGenerator(noise=3, hidden=(6,), width=40)
    generator.build([torch.Size([4, 500]), torch.Size([5])], torch.float64, CPU)
    z = torch.randn(2, 3, dtype=torch.float64)
    codes = generator.code(z)
    assert codes.shape == (2, 2005)
    for n in range(2):
        t, rows = generator.trunk(z[n]), []
        for a, b, head in zip(generator.gains, generator.shifts, generator.heads, strict=True):
            rows += [head.mT @ (a[j] * t + b[j]).clamp(min=0) for j in range(len(a))]
        torch.testing.assert_close(codes[n], torch.cat(rows))
    head = generator.heads[0]  # a row is a sum over the width, which must not grow with it
    assert abs(float(head.detach().square().mean()) * 40 - 1.0) < 4.0 * math.sqrt(2.0 / head.numel())
