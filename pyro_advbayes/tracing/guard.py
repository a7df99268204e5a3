"""Whether a recording is still what it was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def autocast_state() -> list[tuple[str, torch.dtype]]:
    """Where autocast casts, and to what: a graph has it as it was."""
    return [(device, torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]


def roots_of(model: Callable) -> list[nn.Module]:
    """The module that a model is, or is a method of, as far as that shows from outside: :func:`noting_modules` finds the others."""
    model = poutine.unwrap(model)
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


@contextlib.contextmanager
def noting_modules(roots: list[nn.Module]) -> Iterator[None]:
    """Within it, modules that run and are in none of ``roots`` are added to them: a function may use networks from elsewhere."""
    known = {module for root in roots for module in root.modules()}

    def note(module: nn.Module, _: Any) -> None:
        if module not in known:
            roots.append(module)
            known.update(module.modules())

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def held_by(roots: Sequence[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]


class RandomState:
    """The state of the random generators at one moment."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Goes back to that moment, and at the end to where the generators were."""
        now = RandomState()
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def restore(self) -> None:
        """Goes back to that moment."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
