"""Where samples go: memory, or a file that is written as the chains run and mapped when it is read."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_advbayes.infer.mcmc.files import refuse_existing, refuse_missing, replacing, try_lock, unused

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
PREFIXES = ("sample_stats/", "extras/")  # of what is kept beside the sites
_COUNT, _DIGEST = "draws written", "draws digest"  # names of tensors in the file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_name(name: str) -> None:
    """:raises ValueError: if a site's name has another meaning beside the draws, in their file or in memory."""
    taken = ("__metadata__", _COUNT, _DIGEST)
    if name in taken or name.startswith(PREFIXES):
        raise ValueError(
            f"site {name!r}: draws cannot be kept under {', '.join(map(repr, taken))}, or names that begin with "
            f"{' or '.join(map(repr, PREFIXES))}: rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"site {name!r}: its name is no UTF-8: rename it") from error


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

    def close(self) -> None:
        """Nothing is held back."""

    flush = close


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
    :raises ValueError: if the path is no file's, or the file to resume holds other draws than these, or fewer.
    :raises RuntimeError: if another run writes to the file.
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
            with unused(path), replacing(path) as part:
                # of the same open file, so that the lock goes on
                self._file = os.fdopen(os.dup(part.fileno()), "r+b", buffering=0)
                with self._room():
                    _reserve(part.fileno(), size)
                self._write(memoryview(header), 0)
                self._write_count()
        else:
            self._file = open(path, "r+b", buffering=0)
            try:
                self._check_resumed(header, size)
            except BaseException:
                self._file.close()
                raise
        _open_files.add(self)
        self.flush()

    def _check_resumed(self, header: bytes, size: int) -> None:
        if not try_lock(self._file.fileno()):
            raise RuntimeError(f"{self.path} is in use: another run writes to it")
        if os.pread(self._file.fileno(), len(header), 0) != header or os.fstat(self._file.fileno()).st_size != size:
            raise ValueError(f"{self.path} does not hold the draws of this run, or is truncated")
        (written,) = struct.unpack("<q", os.pread(self._file.fileno(), 8, self._starts[_COUNT]))
        if written < self.count:
            raise ValueError(
                f"{self.path} holds {written} draws, where the checkpoint was written after {self.count}: it is of another run"
            )

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
        """
        Makes the draws so far safe from a crash of the machine too; one of the process never costs any.

        :raises RuntimeError: if the file was removed or replaced by another in the meantime.
        """
        self._write_count()
        with self._room():
            os.fsync(self._file.fileno())
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise RuntimeError(f"{self.path} was removed or replaced by another file while draws were written to it: they are lost")

    def close(self) -> None:
        """The last flush; releases the file for others. What it holds can still be read."""
        try:
            self.flush()
        finally:
            self._file.close()

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
        return read_draws(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a copy reads, the original alone writes


_open_files: weakref.WeakSet[FileDraws] = weakref.WeakSet()


def _close_in_child() -> None:
    """A process forked in a run, e.g. a loader's worker, would hold the lock for longer than the run lives."""
    for draws in _open_files:
        draws._file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


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
    refuse_missing(Path(path))
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        count = int(tensors.pop(_COUNT))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is truncated, or no file of draws: {error}") from error
    return {name: value[:, :count] for name, value in tensors.items()}
