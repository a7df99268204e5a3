"""The update of one chunk of chains: gradient and rule as one function, so that ``torch.compile`` sees all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.rule import Rule, Variables


def chunk_update(kind: str, evaluate: Callable, correction: Callable | None, rule: Rule, learning: str | None) -> Callable[..., Any]:
    """
    A function of ``(theta, noise, step_size, temperature, variables, *tensors)`` that leaves the new theta in ``noise``, and returns
    one number that is finite if all of it is; before it, for the kind ``"both"``, energy and norm of the gradient.

    :param evaluate: what :meth:`Potential.function` gave for ``kind``.
    :param correction: a control variate's, or None.
    """

    def update(theta: Tensor, noise: Tensor, step_size: Tensor, temperature: Tensor, variables: Variables, *tensors: Tensor) -> Any:
        report: tuple[Tensor, ...] = ()
        if kind == "both":
            gradient, energy = evaluate(theta, temperature, *tensors)
            report = (energy, torch.linalg.vector_norm(gradient, dim=-1))
        else:
            gradient = evaluate(theta, temperature, *tensors)
        if correction is not None:
            gradient = gradient + correction(*tensors)
        new = rule.step(theta, gradient, noise, step_size, temperature, variables, learning)
        return *report, new.sum() + report[0].sum() if report else new.sum()

    return update


def compile_update(update: Callable, example: Sequence[Any]) -> Callable | None:
    """
    The update under ``torch.compile``; None, with a warning, where that fails.

    :param example: arguments to compile it for, which it may overwrite.
    """
    # PyTorch allows one code object eight compilations: give each update its own
    update.__code__ = update.__code__.replace()
    compiled = torch.compile(update, dynamic=False)
    try:
        compiled(*example)
    except Exception as error:  # no C++ compiler, an operation that it does not know: the graph runs all the same
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"backend='compile' falls back to 'graph', which is slower: torch.compile failed ({reason})", stacklevel=2)
        return None
    return compiled
