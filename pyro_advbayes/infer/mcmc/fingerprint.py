"""Fingerprint of a run, so that a checkpoint continues with the same model, kernel and data, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_advbayes.given import warn
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.schedules import check_value
from pyro_advbayes.infer.mcmc.state import AutoStepSize
from pyro_advbayes.model.loader import Loader
from pyro_advbayes.storage import reference
from pyro_advbayes.storage.digests import tensor_digest
from pyro_advbayes.storage.files import FileError, reading


def model_name(model: Callable) -> str:
    """The name of a model's class or function, under any effect handlers and ``functools.partial``."""
    while isinstance(model, partial):  # poutine.unwrap would take any two arguments for a handler and its model
        handled = model.args and isinstance(model.args[0], Messenger)
        model = model.args[1] if handled else model.func
    return type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__qualname__", type(model).__name__)


def schedule_values(kernel: SGMCMCKernel, num_samples: int) -> dict[str, list[float]]:
    """
    Step size and temperature from a run's first update to its last.

    :param num_samples: samples of a chain, warm-up included.
    :raises ValueError: if one is out of range anywhere, before hours of sampling up to there.
    """
    last = num_samples * kernel.updates_per_sample - 1
    steps = sorted({round(last * i / 1000) for i in range(1001)})
    schedules = {"step_size": kernel.step_size, "temperature": kernel.temperature}
    return {
        name: [check_value(schedule(step), name, step) for step in steps]
        for name, schedule in schedules.items()
        if not isinstance(schedule, AutoStepSize)
    }


def data_digests(kernel: SGMCMCKernel, loader: bool) -> list[Any]:
    """
    Digests of all tensors of the data, and of a loader's first batches. Warns of a loader that cannot be replayed.

    :param loader: whether the data come from a loader.
    """
    batches = kernel.potential.batches
    if loader and isinstance(batches, Loader):
        return [*map(tensor_digest, batches.tensors), *batches.describe(), _batches_digest(batches)]
    return [tensor_digest(value) for value in kernel.potential.arguments.tensors]


def _batches_digest(loader: Loader) -> list[Any] | None:
    first, second = ([tensor_digest(value) for batch in loader.first_batches() for value in batch] for _ in range(2))
    if first == second:
        return first
    data = getattr(loader.loader, "dataset", None)
    name = type(loader.loader).__name__ + ("" if data is None else f" of {type(data).__name__}")
    warn(
        f"the loader cannot be replayed: {name} gave other batches the second time, from the same random state. A resumed run will not see "
        "the data that this one would have seen, and cannot check that they are the same data. Draw random numbers from the global "
        "generators of PyTorch, NumPy or Python, or from a torch.Generator that is an attribute of the loader, its sampler or its data set",
    )
    return None


def fingerprint(kernel: SGMCMCKernel, scheduled: Mapping[str, list[float]], data: list[Any] | None) -> dict[str, Any]:
    """What a run depends on, as plain values. Takes the results of :func:`schedule_values` and :func:`data_digests`."""
    potential = kernel.potential
    return {
        "model": model_name(kernel.model),
        "sites": [[site.name, list(site.shape), str(site.dtype)] for site in potential.sites],
        "kernel": type(kernel).__name__,
        "settings": kernel.settings(),
        **{name: values[::20] for name, values in scheduled.items()},
        "data": data,
        "num_data": potential.batches.num_data,
        "backend": [kernel.backend, potential.chunk_size],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def check_fingerprint(now: dict[str, Any], then: dict[str, Any], path: Path) -> None:
    """
    Warns of differences that may change the last bits.

    :raises ValueError: naming another difference.
    """
    for key in [key for key in now if key not in ("threads", "torch")]:
        here, there = now[key], then.get(key)
        if differ(here, there):
            if isinstance(here, dict) and isinstance(there, dict):  # name the setting that differs
                name = next(name for name in (*here, *there) if differ(here.get(name), there.get(name)))
                key, here, there = f"{key}[{name!r}]", here.get(name), there.get(name)
            raise ValueError(f"{path} is of another run: its {key} is {_shorten(there)}, here it is {_shorten(here)}")
    for key in ("threads", "torch"):
        if differ(now[key], then.get(key)):
            warn(
                f"{path} was written with {key}={_shorten(then.get(key))}, here it is {now[key]}: results may differ in the last bits",
            )


def kernel_content(kernel: SGMCMCKernel) -> dict[str, Any]:
    """A kernel's part of a checkpoint."""
    return {"energy": kernel.reference_energy(), "reference": kernel.reference(), "kernel": kernel.state()}


KERNEL_FIELDS = {"energy": Tensor, "reference": dict, "kernel": dict}


def load_kernel(kernel: SGMCMCKernel, content: Mapping[str, Any], path: Path) -> None:
    """
    Sets a kernel back to the state of a checkpoint.

    :param content: from :func:`kernel_content`.
    :raises ValueError: if model or functions compute other values now; the fingerprint does not hold these.
    """
    then = content["energy"]
    with reading(path):
        kernel.load(_to(content["kernel"], kernel.potential.device))
        coldest = None if kernel.chains.effective is None else {site.name for site in kernel.potential.sites}
        if (None if kernel.chains.coldest is None else set(kernel.chains.coldest)) != coldest:
            raise ValueError(f"coldest is {str(kernel.chains.coldest)[:100]}")
        energy, now = kernel.reference_energy(), kernel.reference()
    rtol = 1e-5 if energy.dtype.itemsize >= 4 else 1e-2  # the same model on another machine differs by rounding
    if (then.shape, then.dtype) != (energy.shape, energy.dtype):
        raise FileError(f"{path}: its energy is of shape {list(then.shape)} and {then.dtype}: it is corrupt")
    same = torch.isclose(energy, then.to(energy.device), rtol=rtol, equal_nan=True)
    if not bool(same.all()):
        place = int((~same).nonzero()[0])
        raise ValueError(
            f"{path} is of another model: its sites {sorted(site.name for site in kernel.potential.sites)} have the same names and shapes, "
            f"but the energy {('where chain 0 was', 'at 0')[place]} is {float(energy[place]):.6g} instead of {float(then[place]):.6g} "
            "(another prior or likelihood?)"
        )
    reference.check(now, content["reference"], path)


def differ(here: Any, there: Any) -> bool:
    """Whether two entries of a fingerprint differ."""
    try:
        return bool(here != there)
    except RuntimeError:  # a tensor, in a file that somebody changed
        return True


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:300] + "..."


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: item if key in ("random", "batches", "alive") else _to(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value
