"""Warnings of what is rarely intended: statistics that have never seen data, parameters that no sampler moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_advbayes.given import warn
from pyro_advbayes.kinds import BATCH_NORMS
from pyro_advbayes.model.program import Call, run
from pyro_advbayes.tracing.guard import RandomState

_SILENCE = "warnings.simplefilter('ignore', pyro_advbayes.TemperedLikelihoodWarning) silences this"


def never_seen_data(module: nn.Module) -> bool:
    """Whether a layer is a BatchNorm with its initial running statistics."""
    counted = module.num_batches_tracked if isinstance(module, BATCH_NORMS) else None
    return counted is not None and not counted.is_meta and int(counted) == 0


def statistics_message(layers: Sequence[str]) -> str:
    """The warning for BatchNorm layers in eval mode that have :func:`never_seen_data`."""
    return (
        f"BatchNorm {_in_words('layer', layers)}: running statistics that have never seen data (num_batches_tracked is 0), so that in eval "
        "mode inputs are not normalised. Run the network in train mode over the data first (variational inference: "
        "bayesianize(..., eval_only=False)), or take GroupNorm or LayerNorm"
    )


@contextlib.contextmanager
def tell_of_new_statistics(model: Any) -> Iterator[None]:
    """
    At its end, one warning names the BatchNorm layers that ran in eval mode and have :func:`never_seen_data`. Copies that ``bayesianize``
    keeps in eval mode are left out: ``bayesianize`` has warned of them.
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
        warn(statistics_message(list(found.values())))


def tell_of_held_parameters(model: Any, call: Call, names: Sequence[str]) -> None:
    """
    Warns of parameters on which the log-joint depends and that no sampler moves: those of ``pyro.param``, ``PyroParam``, and of plain
    layers in the model. Parameters with ``requires_grad=False``, detached ones, and those that ``bayesianize`` was told to leave out are
    meant to be fixed.

    :param model: a Pyro model.
    :param call: its ``(args, kwargs)``, with the rows of a minibatch.
    :param names: the parameters' names in a trace of it.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    excluded = {id(p) for module in modules if hasattr(module, "_eval_only") for p in module.parameters()}
    if not names or torch.is_inference_mode_enabled():
        return
    with RandomState().again(), torch.enable_grad(), pyro.validation_enabled(False):
        trace = run(model, call, None, InitMessenger(init_to_sample), validated=False)
        total = torch.as_tensor(trace.log_prob_sum())
    found = {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}
    values = {n: value for n, value in found.items() if value is not None and value.requires_grad and id(value) not in excluded}
    if not values or not total.requires_grad:
        return
    gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    held = [name.replace("$$$", ".") for name, gradient in zip(values, gradients, strict=True) if gradient is not None]
    if held:
        warn(
            f"{_in_words('parameter', held)}: a sampler moves latent sites only, and holds parameters at the values that they have now. "
            "Give them priors (pyro.sample, PyroSample, nn.bayesianize), or fit them first (SVI with AutoDelta); .detach(), or "
            "requires_grad_(False) on a layer, says that they are meant to be fixed",
        )


class TemperedLikelihoodWarning(UserWarning):
    """The likelihood counts for more or less than the data, so that the posterior is tempered."""


def tell_of_scales(scales: Mapping[str, float]) -> None:
    """:param scales: factors of the log-likelihood by observed site."""
    for name, scale in scales.items():
        warn(
            f"observed site {name!r}: its log-likelihood is multiplied by {scale:g} (poutine.scale), so that the posterior is that of data "
            f"which count {scale:g} times: prior x likelihood^{scale:g}. Drop the scale (minibatches are scaled already); if it is "
            f"meant, {_SILENCE}",
            TemperedLikelihoodWarning,
        )


def tell_of_mean(name: str, whole: float, total: float, rows: int) -> None:
    """
    :param name: of a site whose log-likelihood is a mean over rows.
    :param whole: the log-likelihood of a few rows.
    :param total: the sum over the two halves of these rows.
    :param rows: N, the number of all rows.
    """
    warn(
        f"observed site {name!r}: the log-likelihood of some rows is {whole:.6g}, the mean of those of two halves and not their sum, "
        f"{total:.6g}: a mean over rows, so that all {rows} rows count like one and the posterior is nearly the prior. Give every row its "
        f"own term (reduction='none', inside the plate), or multiply the mean by {rows}; if it is meant, {_SILENCE}",
        TemperedLikelihoodWarning,
    )


def _in_words(what: str, names: Sequence[str]) -> str:
    """``layers 'a', 'b'``: the first five of the names."""
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
    return f"{what}{'s' if len(names) > 1 else ''} {shown}"
