"""Where samples go: memory, or a file that is written as the chains run and mapped when it is read."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_advbayes.infer.mcmc.files import refuse_existing, replacing

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_COUNT = "draws written"  # the name of a tensor in the file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Field(NamedTuple):
    """Shape of one draw of one chain, and the dtype in which it is kept."""

    shape: torch.Size
    dtype: torch.dtype


class MemoryDraws:
    """
    Draws in memory, ``[chains, draws, *shape]``.

    :param fields: what is kept, by name.
    :param num_chains: number of chains.
    :param num_samples: number of draws that there will be.
    """

    def __init__(self, fields: Mapping[str, Field], num_chains: int, num_samples: int) -> None:
        self.count = 0
        self._values = {name: torch.empty((num_chains, num_samples, *field.shape), dtype=field.dtype) for name, field in fields.items()}

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Keeps one draw ``[chains, *shape]`` of every field."""
        for name, kept in self._values.items():
            kept[:, self.count] = values[name]
        self.count += 1

    def get(self) -> dict[str, Tensor]:
        """``[chains, draws, *shape]`` by name."""
        return {name: kept[:, : self.count] for name, kept in self._values.items()}

    def flush(self) -> None:
        """Nothing is held back."""


class FileDraws:
    """
    Draws in a safetensors file of tensors ``[chains, draws, *shape]``, made at its full size at the start and filled in as the
    chains run. Any safetensors reader can read it at any time; ``"draws written"`` tells how far it is filled.

    :param path: the file.
    :param fields: what is kept, by name.
    :param num_chains: number of chains.
    :param num_samples: number of draws that there will be.
    :param overwrite: whether an existing file may be replaced.
    :param resume: how many draws of an existing file stay; None makes a new file.
    :raises FileExistsError: if the file exists and may not be overwritten.
    :raises ValueError: if the file to resume holds other draws than these, or fewer.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, Field],
        num_chains: int,
        num_samples: int,
        overwrite: bool = False,
        resume: int | None = None,
    ) -> None:
        self.path, self.fields = path, dict(fields)
        self.count = resume or 0
        self._num_chains, self._num_samples = num_chains, num_samples
        header, self._starts, size = self._layout()
        if resume is None:
            refuse_existing(path, overwrite)
            with replacing(path) as part, open(part, "wb") as new:
                with self._room():
                    new.write(header)
                    new.flush()
                    _reserve(new.fileno(), size)
        else:
            with open(path, "rb") as old:
                if old.read(len(header)) != header or path.stat().st_size != size:
                    raise ValueError(f"{path} does not hold the draws of this run, or is truncated")
                old.seek(self._starts[_COUNT])
                (written,) = struct.unpack("<q", old.read(8))
            if written < resume:
                raise ValueError(f"{path} holds {written} draws, where the checkpoint was written after {resume}: it is of another run")
        self._file = open(path, "r+b", buffering=0)
        self.flush()

    def _layout(self) -> tuple[bytes, dict[str, int], int]:
        entries: dict[str, Any] = {}
        offset = 0
        shapes = {name: (self._num_chains, self._num_samples, *field.shape) for name, field in self.fields.items()}
        dtypes = {name: field.dtype for name, field in self.fields.items()}
        shapes[_COUNT], dtypes[_COUNT] = (1,), torch.int64
        for name in sorted(shapes, key=lambda n: (-dtypes[n].itemsize, n)):  # wide types first keeps all of them aligned
            size = math.prod(shapes[name]) * dtypes[name].itemsize
            entries[name] = {"dtype": _NAMES[dtypes[name]], "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        return header, {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}, len(header) + offset

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Writes one draw ``[chains, *shape]`` of every field."""
        for name, field in self.fields.items():
            rows = values[name].detach().to("cpu", field.dtype).contiguous()
            size = field.shape.numel() * field.dtype.itemsize
            for chain, row in enumerate(rows):
                at = self._starts[name] + (chain * self._num_samples + self.count) * size
                self._write(row.reshape(-1).view(torch.uint8).numpy().data, at)
        self.count += 1
        self._write_count()

    def flush(self) -> None:
        """Makes the draws so far safe from a crash of the machine too; one of the process never costs any."""
        self._write_count()
        with self._room():
            os.fsync(self._file.fileno())

    def _write_count(self) -> None:
        self._write(memoryview(struct.pack("<q", self.count)), self._starts[_COUNT])

    def _write(self, data: memoryview, at: int) -> None:
        """All of it: one call may write less, of more than 2 GiB always, of less when the disk becomes full."""
        with self._room():
            while len(data):
                done = os.pwrite(self._file.fileno(), data, at)
                if done == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                data, at = data[done:], at + done

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """:raises OSError: that says how many draws are safe, where there is no room for more."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(error.errno, f"disk full: {self.count} draws are safe in {self.path} ({os.strerror(error.errno)})") from error

    def get(self) -> dict[str, Tensor]:
        """``[chains, draws, *shape]`` by name, mapped from the file."""
        self.flush()
        return read_draws(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = open(self.path, "r+b", buffering=0)


def _reserve(file: int, size: int) -> None:
    """Gives a file its size, and the room for it where the system can: a disk that becomes full later takes no draw."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, some file systems refuse it
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        os.truncate(file, size)


def read_draws(path: str | Path) -> dict[str, Tensor]:
    """
    Reads a file of draws, finished or not, without loading it: the tensors are mapped.

    :return: ``[chains, draws, *shape]`` by site; statistics of the sampler have names that begin with ``"sample_stats/"``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is truncated or no file of draws.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        count = int(tensors.pop(_COUNT))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is truncated, or no file of draws: {error}") from error
    return {name: value[:, :count] for name, value in tensors.items()}
