"""Layers whose output or state changes between two calls: kept as they are, or refused; and the absence of gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_advbayes.handlers import Refused
from pyro_advbayes.kinds import BATCH_NORMS, DROPOUTS


@contextlib.contextmanager
def kept_statistics() -> Iterator[None]:
    """
    Within it, layers in training mode write their statistics (BatchNorm's running mean, say) into copies, which are dropped at the end:
    what they compute is the same, and nothing of it is remembered.
    """
    originals: dict[nn.Module, dict[str, Tensor]] = {}

    def keep(module: nn.Module, _: Any) -> None:
        if module.training and module not in originals:
            buffers = dict(module.named_buffers(recurse=False))
            if buffers:
                originals[module] = buffers
                for name, value in buffers.items():  # not restored in place: what autograd has saved must stay as it was
                    setattr(module, name, value.clone())

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in originals.items():
            for name, value in buffers.items():
                setattr(module, name, value)


@contextlib.contextmanager
def refuse_random_layers(model: Callable) -> Iterator[None]:
    """Within it, a BatchNorm or Dropout layer that runs in training mode raises an error with the layer's name."""
    names = {m: name for name, m in model.named_modules()} if isinstance(model, nn.Module) else {}

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, (*BATCH_NORMS, *DROPOUTS)) and module.training:
            why = "changes its statistics" if isinstance(module, BATCH_NORMS) else "draws a new mask"
            raise Refused(
                f"layer {names.get(module) or type(module).__name__!r} ({type(module).__name__}) is in training mode, where it "
                f"{why} at every evaluation, so that there is no fixed log-density: call .eval() on the network first"
            )

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    except Refused as error:
        raise ValueError(str(error)) from None
    finally:
        handle.remove()


def refuse_inference_mode(who: str) -> None:
    """
    :param who: needs gradients.
    :raises RuntimeError: under ``torch.inference_mode``, where ``torch.enable_grad`` does not bring them back.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{who} needs gradients, and torch.inference_mode() has none: use torch.no_grad() instead (in Lightning: "
            "Trainer(inference_mode=False))"
        )
