"""Tensors and plain values in files that are never unpickled, never half-written, never silently overwritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def refuse_existing(path: Path, overwrite: bool) -> None:
    """:raises FileExistsError: if there is such a file and it may not be overwritten; FileNotFoundError: if its folder is missing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another path, delete it, or say overwrite=True")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of ``path`` when all is written, and is removed if that fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save(path: Path, content: Mapping[str, Any]) -> None:
    """
    Writes nested dicts, lists and tuples of tensors, arrays, numbers, strings and None in the safetensors format, all or nothing:
    a reader sees the old file or the new one.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_pack(content, tensors))
    with replacing(path) as part:
        save_file(tensors, str(part), metadata={"content": plain})
        with open(part, "rb") as file:
            os.fsync(file.fileno())


def load(path: Path) -> Any:
    """
    Reads what :func:`save` wrote.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is truncated or was not written by :func:`save`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return _unpack(json.loads(metadata["content"]), tensors)
    except (SafetensorError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{path} is truncated, or no file of this package: {error}") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        name = f"t{len(tensors)}"
        is_array = isinstance(value, np.ndarray)
        # torch has few operations on NumPy's unsigned types
        tensors[name] = torch.from_numpy(value.astype(np.int64)) if is_array else value.detach().cpu().clone().contiguous()
        return {"array" if is_array else "tensor": name, "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _pack(item, tensors) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is neither a tensor nor a plain value")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return tensors[value["array"]].numpy().astype(value["dtype"])
    if "dict" in value:
        return {key: _unpack(item, tensors) for key, item in value["dict"].items()}
    kind, items = next(iter(value.items()))
    unpacked = [_unpack(item, tensors) for item in items]
    return tuple(unpacked) if kind == "tuple" else unpacked


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the random generators of Python, NumPy and PyTorch."""
    state = dict(get_rng_state())
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets what :func:`random_state` read of a device."""
    state = dict(state)
    if "cuda" in state:
        torch.cuda.set_rng_state(state.pop("cuda"), device)
    set_rng_state(state)
