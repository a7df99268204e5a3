"""What is legitimate in a model and seldom meant: statistics that have never seen data, parameters that no sampler moves. Warnings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_advbayes.handlers import UnvalidatedMessenger, kept_random_state

_SILENCE = "warnings.simplefilter('ignore', pyro_advbayes.TemperedLikelihoodWarning) silences this"


def never_seen_data(module: nn.Module) -> bool:
    """Whether a layer is a BatchNorm whose running statistics are those that it was made with."""
    counted = module.num_batches_tracked if isinstance(module, _BatchNorm) else None
    return counted is not None and not counted.is_meta and int(counted) == 0


def statistics_message(layers: Sequence[str]) -> str:
    """What is to be known of BatchNorm layers that have :func:`never_seen_data`, in eval mode."""
    return (
        f"BatchNorm {_in_words('layer', layers)}: running statistics that have never seen data (num_batches_tracked is 0), so that in eval "
        "mode inputs are not normalised. Run the network in train mode over the data first (variational inference: "
        "bayesianize(..., eval_only=False)), or take GroupNorm or LayerNorm"
    )


@contextlib.contextmanager
def tell_of_new_statistics(model: Any) -> Iterator[None]:
    """
    Within it, BatchNorm layers that run in eval mode and have :func:`never_seen_data` are noted; one warning names them at the end.
    Copies that ``bayesianize`` keeps in eval mode are left out: it has told already.
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    names = {module: name for name, module in modules.items()}
    told = {part for module in modules.values() if getattr(module, "_eval_only", False) for part in module.modules()}
    found: dict[nn.Module, str] = {}

    def check(module: nn.Module, _: Any) -> None:
        if not module.training and module not in told and never_seen_data(module):
            found[module] = names.get(module) or type(module).__name__

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
    if found:
        warnings.warn(statistics_message(list(found.values())), stacklevel=4)


def tell_of_held_parameters(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
    """
    Warns of parameters on which the log-joint depends and that no sampler moves: those of ``pyro.param``, ``PyroParam``, and of plain
    layers in the model. Those with ``requires_grad=False``, those that are detached, and those that ``bayesianize`` was told to leave out
    are meant to be fixed.

    :param model: a Pyro model.
    :param args: its arguments, a minibatch's.
    :param kwargs: its keyword arguments.
    :param names: the parameters' names in a trace of it.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    excluded = {id(p) for module in modules if hasattr(module, "_eval_only") for p in module.parameters()}
    if not names or torch.is_inference_mode_enabled():
        return
    with kept_random_state(), torch.enable_grad(), poutine.block(), pyro.validation_enabled(False), UnvalidatedMessenger():
        trace = poutine.trace(InitMessenger(init_to_sample)(model)).get_trace(*args, **kwargs)
        total = trace.log_prob_sum()
    values = {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}
    values = {name: value for name, value in values.items() if value.requires_grad and id(value) not in excluded}
    if not values or not total.requires_grad:
        return
    gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    held = [name.replace("$$$", ".") for name, gradient in zip(values, gradients, strict=True) if gradient is not None]
    if held:
        warnings.warn(
            f"{_in_words('parameter', held)}: a sampler moves latent sites only, and holds parameters at the values that they have now. "
            "Give them priors (pyro.sample, PyroSample, nn.bayesianize), or fit them first (SVI with AutoDelta); .detach(), or "
            "requires_grad_(False) on a layer, says that they are meant to be fixed",
            stacklevel=3,
        )


class TemperedLikelihoodWarning(UserWarning):
    """The likelihood counts for more or less than the data do, so that the posterior is tempered."""


def tell_of_scales(scales: Mapping[str, float]) -> None:
    """:param scales: by which a model multiplies the log-likelihood at observed sites."""
    for name, scale in scales.items():
        warnings.warn(
            f"observed site {name!r}: its log-likelihood is multiplied by {scale:g} (poutine.scale), so that the posterior is that of data "
            f"which count {scale:g} times: prior x likelihood^{scale:g}. Drop the scale (minibatches are scaled already); if it is "
            f"meant, {_SILENCE}",
            TemperedLikelihoodWarning,
            stacklevel=4,
        )


def tell_of_mean(name: str, whole: float, total: float, rows: int) -> None:
    """
    :param name: of a site of which the log-likelihood is a mean over rows.
    :param whole: what it is for a few rows.
    :param total: the sum of what it is for the halves of these.
    :param rows: of all data, N.
    """
    warnings.warn(
        f"observed site {name!r}: the log-likelihood of some rows is {whole:.6g}, the mean of those of two halves and not their sum, "
        f"{total:.6g}: a mean over rows, so that all {rows} rows count like one and the posterior is nearly the prior. Give every row its "
        f"own term (reduction='none', inside the plate), or multiply the mean by {rows}; if it is meant, {_SILENCE}",
        TemperedLikelihoodWarning,
        stacklevel=4,
    )


def _in_words(what: str, names: Sequence[str]) -> str:
    """Of many names the first few."""
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
    return f"{what}{'s' if len(names) > 1 else ''} {shown}"
