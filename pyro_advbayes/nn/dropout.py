"""MC dropout: the masks of a network as sites of a Pyro model: :func:`mc_dropout`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from pyro.poutine.runtime import Message

from pyro_advbayes.checked import checked
from pyro_advbayes.kinds import MASKING_DROPOUTS


@checked
def mc_dropout(net: torch.nn.Module) -> PyroModule:
    """
    Copies a network and makes the mask of every Dropout layer a latent site: MC dropout (Gal and Ghahramani, ICML 2016). ::

        model = Classifier(mc_dropout(nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Dropout(0.5), nn.Linear(400, 10))))
        svi = SVI(minibatch(model, len(x)), dropout_guide(model), Adam({"lr": 1e-3, "weight_decay": 1e-4}), Trace_ELBO())
        logits = Predictive(model, guide=dropout_guide(model), num_samples=200, return_sites=["_RETURN"])(x)["_RETURN"]

    A mask is drawn once for a run of the model and is shared by all rows, as weights are; PyTorch draws one for each row. It is the site
    ``"<layer>.mask"``, with an entry for each unit (each channel, for Dropout1d to Dropout3d). The parameters remain ``nn.Parameter`` s for
    Pyro's optimisers. A layer in two places of a network has a separate mask in each. A layer that a ``forward`` calls twice would have two
    masks of one name, which Pyro refuses at the first run.

    :param net: a network with Dropout layers; it does not change.
    :return: the copy.
    :raises ValueError: if it has no Dropout layer, one with p = 1, or one that does not multiply by a mask (AlphaDropout); if another layer
        drops units (recurrent ones of several layers and attention, each with ``dropout``) or skips its Dropout layers
        (TransformerEncoderLayer, unless its activation disables PyTorch's fast path).
    """
    copied, found = copy.deepcopy(net), False
    for name, module in list(copied.named_modules()):
        _refuse_other_dropout(f"layer {name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}", module)
        for attribute, child in list(module._modules.items()):  # named_children leaves out a layer in its second place
            label = f"{name}.{attribute}".lstrip(".")
            if isinstance(child, MASKING_DROPOUTS):
                if child.p >= 1.0:
                    raise ValueError(f"layer {label!r} leaves every unit out (p={child.p}): p < 1")
                setattr(module, attribute, _Mask(child.p, channels=not isinstance(child, torch.nn.Dropout)))
                found = True
    if not found:
        raise ValueError(f"the {type(net).__name__} has no Dropout layer")
    to_pyro_module_(copied)
    assert isinstance(copied, PyroModule)
    return copied


def _refuse_other_dropout(label: str, layer: torch.nn.Module) -> None:
    """:raises ValueError: if a layer drops units without a Dropout layer, or skips its Dropout layers."""
    if isinstance(layer, (torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout)):
        raise ValueError(f"{label} is no mask: use Dropout")
    if isinstance(layer, torch.nn.RNNBase) and layer.num_layers > 1 and layer.dropout > 0.0:
        raise ValueError(f"{label} has dropout={layer.dropout} between its layers, which is no site: use num_layers=1, and Dropout between")
    if isinstance(layer, torch.nn.MultiheadAttention) and layer.dropout > 0.0:
        raise ValueError(f"{label} has dropout={layer.dropout} on its attention weights, which is no site: set its dropout to 0.0")
    if isinstance(layer, torch.nn.TransformerEncoderLayer) and layer.activation_relu_or_gelu:
        if any(part.p > 0.0 for part in layer.modules() if isinstance(part, MASKING_DROPOUTS)):
            raise ValueError(
                f"{label} skips its Dropout layers in eval mode, on PyTorch's fast path: give it an activation that disables this path, "
                "such as activation=lambda x: x.relu()"
            )


class _Mask(PyroModule):
    """
    Takes the place of a Dropout layer.

    :param p: the probability that a unit is left out.
    :param channels: whether the mask has one number for a channel, or one for each unit.
    """

    def __init__(self, p: float, channels: bool) -> None:
        super().__init__()
        self.p, self.channels = p, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.p == 0.0:
            return x
        shape = x.shape[1:2] if self.channels else x.shape[1:]
        keep = dist.Bernoulli(x.new_tensor(1.0 - self.p)).expand(shape).to_event(len(shape))
        mask = pyro.sample(f"{self._pyro_name}.mask", keep)
        return x * mask.reshape(shape + (1,) * (x.dim() - 1 - len(shape))) / (1.0 - self.p)


@checked
def dropout_guide(model: Callable) -> Callable:
    """
    The guide of MC dropout. It draws masks from the model's prior, so that the divergence in an ELBO is 0 and only the parameters are
    trained.

    :param model: a model with a network of :func:`mc_dropout`. Its other latent sites are not drawn by this guide.
    :return: a guide that takes the model's arguments.
    """

    def is_mask(site: Message) -> bool:
        return site["type"] == "sample" and (site["name"] or "").endswith(".mask")

    return poutine.block(model, expose_fn=is_mask)
