r"""
A critic, and the gradients of its loss in closed form.

With layers :math:`a_l = W_l h_{l-1} + b_l`, :math:`h_l = m_l a_l`, masks :math:`m_l = [a_l > 0]`, and :math:`D = w \cdot h_L + c`, the
slope at an input is the product :math:`v_0` of

.. math:: v_L = w\, m_L, \qquad v_{l-1} = W_l^\top v_l\, m_{l-1}, \qquad v_0 = W_1^\top v_1.

Masks are constant almost everywhere, so that the slope is a polynomial of the weights: the gradient of a penalty on it is one more pass
through the layers, upwards, and takes no second derivative by autograd. Its norm and that gradient need :math:`W_1 W_1^\top` alone,
so that nothing of the size of a batch times an input is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_advbayes.infer.autoguide.generators import linears, mlp


class Critic(nn.Module):
    """
    Linear layers with ReLU between them and one output; He initialisation.

    :param size: dimension of the inputs.
    :param hidden: widths of the hidden layers, at least one.
    """

    def __init__(self, size: int, hidden: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("critic_hidden=(): a critic needs a hidden layer, since a linear one compares means only")
        self.layers = mlp((size, *hidden, 1), dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1]`` of inputs ``[n, size]``."""
        return self.layers(x)

    @torch.no_grad()
    def slope(self, x: Tensor) -> Tensor:
        """The gradient of D at inputs ``[n, size]``."""
        *hidden, last = linears(self.layers)
        masks = []
        for layer in hidden:
            x = layer(x)
            masks.append(x > 0)
            x = x.relu_()
        v = last.weight * masks[-1]
        for layer, mask in zip(hidden[:0:-1], masks[-2::-1], strict=True):
            v = (v @ layer.weight).mul_(mask)
        return v @ hidden[0].weight

    @torch.no_grad()
    def backward(self, real: Tensor, fake: Tensor, share: Tensor, penalty: float) -> Tensor:
        r"""
        Sets the gradients of :math:`\mathrm E\, D(\tilde c) - \mathrm E\, D(c) + \lambda\, \mathrm E\, (|\nabla D(\hat c)| - 1)^2` with
        :math:`\hat c = u c + (1 - u) \tilde c`.

        :param real: c, ``[n, size]``.
        :param fake: the made ones, ``[n, size]``.
        :param share: u, ``[n]``, in [0, 1].
        :param penalty: λ.
        :return: :math:`\mathrm E\, D(c) - \mathrm E\, D(\tilde c)`.
        """
        *hidden, last = linears(self.layers)
        n, inputs, masks = len(real), [], []
        # the first layer is linear, so that the points in between are interpolated after it; its large inputs are not copied
        first = hidden[0](fake), hidden[0](real)
        x = torch.cat([*first, torch.lerp(*first, share.unsqueeze(-1))])
        for layer in (*hidden[1:], None):
            masks.append((x > 0).to(x.dtype))
            x = x.relu_()
            inputs.append(x[: 2 * n])
            x = x if layer is None else layer(x)
        made, given = (inputs[-1] @ last.weight.mT).squeeze(-1).split(n)
        self._differ(hidden, last, fake, real, inputs, masks)
        if penalty:
            self._penalise(hidden, last, [mask[2 * n :] for mask in masks], penalty / n)
        return given.mean() - made.mean()

    def _differ(
        self, hidden: list[nn.Linear], last: nn.Linear, fake: Tensor, real: Tensor, inputs: list[Tensor], masks: list[Tensor]
    ) -> None:
        """Gradients of the difference of means: those of back-propagation; ``inputs`` are those of the layers after the first."""
        n = len(real)
        signs = real.new_full((2 * n, 1), 1.0 / n)
        signs[n:] = -1.0 / n
        last.weight.grad, last.bias.grad = signs.mT @ inputs[-1], torch.zeros_like(last.bias)
        delta = signs @ last.weight
        for layer, given, mask in zip(hidden[:0:-1], inputs[-2::-1], masks[:0:-1], strict=True):
            delta = delta * mask[: 2 * n]
            layer.weight.grad, layer.bias.grad = delta.mT @ given, delta.sum(0)
            delta = delta @ layer.weight
        delta = delta * masks[0][: 2 * n]
        hidden[0].weight.grad = (delta[:n].mT @ fake).addmm_(delta[n:].mT, real)
        hidden[0].bias.grad = delta.sum(0)

    def _penalise(self, hidden: list[nn.Linear], last: nn.Linear, masks: list[Tensor], weight: float) -> None:
        """Adds the gradients of ``weight`` times the sum of the squared distances of slopes from 1."""
        slopes = [last.weight * masks[-1]]
        for layer, mask in zip(hidden[:0:-1], masks[-2::-1], strict=True):
            slopes.append((slopes[-1] @ layer.weight).mul_(mask))
        matrix, v = hidden[0].weight, slopes.pop()
        reach = v @ (matrix @ matrix.mT)
        norm = (reach * v).sum(-1).clamp_min_(0.0).sqrt_()
        pull = torch.where(norm > 0, (norm - 1.0) / norm, torch.zeros_like(norm)).mul_(2.0 * weight).unsqueeze(-1)
        _gradient(matrix).addmm_(v.mT @ (pull * v), matrix)
        u = (pull * reach).mul_(masks[0])
        for layer, mask in zip(hidden[1:], masks[1:], strict=True):
            _gradient(layer.weight).addmm_(slopes.pop().mT, u)
            u = (u @ layer.weight.mT).mul_(mask)
        _gradient(last.weight).add_(u.sum(0))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # the difference of means has set it
    return parameter.grad
