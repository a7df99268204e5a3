"""Whether a recording still holds: it agrees with the function that it records, and that function has not changed."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_advbayes.given import warn

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

# Number of graphs that a kernel keeps from run to run. A run makes one or two for each shape of a batch and of a chunk of chains.
KEPT = 32


class Kept(OrderedDict):
    """
    Recordings by key: at most ``most`` of them; those that were used last stay.

    :param int most: >= 1.
    """

    def __init__(self, most: int = KEPT) -> None:  # pickle needs the default
        super().__init__()
        self._most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        self.move_to_end(key)
        return self[key]


def autocast_state() -> list[tuple[str, torch.dtype]]:
    """The devices of autocast, and its dtypes: graphs hold them as they were."""
    return [(device, torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]


def roots_of(model: Callable) -> list[nn.Module]:
    """The module that a model is, or is a method of; :func:`noting_modules` finds other modules."""
    model = poutine.unwrap(model)
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


@contextlib.contextmanager
def noting_modules(roots: list[nn.Module]) -> Iterator[None]:
    """Within it, modules that run and are in none of ``roots`` are added to these: a function may use networks from elsewhere."""
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


class Guard:
    """
    Fingerprint of a model's modules, to detect stale recordings: the layers, their modes, and their tensors.

    :param roots: the modules; with :func:`noting_modules`, all that are used.
    :param versions: whether a write into a buffer counts as a change.
    :param attributes: whether tensors count that are attributes of modules, but no buffers.

    :ivar held: all these tensors. The guard holds them, so that no other tensor gets their ids.
    :ivar state: equal to another guard's if nothing has changed.
    """

    def __init__(self, roots: Sequence[nn.Module], versions: bool = False, attributes: bool = False) -> None:
        modules = [module for root in roots for module in root.modules()]
        # every call of a guide makes a guard, and parameters() and buffers() take three times as long
        parameters = [value for module in modules for value in module._parameters.values() if value is not None]
        places = [place for m in modules for place in ((m._buffers, vars(m)) if attributes else (m._buffers,))]
        others = [value for place in places for value in place.values() if isinstance(value, Tensor)]
        self.held = [*parameters, *others]
        self.state = (
            tuple((module, module.training) for module in modules),
            tuple((id(value), value.requires_grad) for value in parameters),
            tuple((id(value), version_of(value) if versions else 0) for value in others),
        )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for one of ``torch.inference_mode``, which does not count. PyTorch has no public name for it."""
    return 0 if tensor.is_inference() else tensor._version


DIFFERS = (
    "its recording gives other numbers than the handlers on other values: its Python depends on something that changes from call to call, "
    "or draws random numbers outside of its sites"
)


def warn_of_handlers(what: str, why: str) -> None:
    """The one warning of the package that Pyro's handlers run in place of a recording."""
    warn(f"{what} falls back to 'handlers', which is slower, for this model: {why}")


def agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], leaves: Sequence[Tensor] = ()) -> bool:
    """Whether results are equal to half their digits, and their gradients with respect to ``leaves``."""
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad or not _close(a, b):
            return False
    if not leaves:
        return True
    return all(_close(a, b) for a, b in zip(_gradients(ours, leaves), _gradients(theirs, leaves), strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):  # most are, which takes one pass to see
        return True
    if not a.is_floating_point():
        return False
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    size = float(b.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _gradients(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    values = [value for value in values if value.requires_grad]
    if not values:
        return []
    # uneven weights, since a sum may be constant: that of probabilities is
    weights = [torch.arange(v.numel(), dtype=v.dtype, device=v.device).cos().view(v.shape) for v in values]
    gradients = torch.autograd.grad(values, leaves, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]


class RandomState:
    """The state of PyTorch's random generators when this is made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within it, the generators continue from this state; at the end, from where they were before."""
        now = RandomState()
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def restore(self) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
