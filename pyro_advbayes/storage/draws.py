"""Storage of draws: in memory, or in a file that is written while the chains run, and memory-mapped when it is read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.storage.files import (
    VERSION,
    FileError,
    check_version,
    closed_in_children,
    refuse_existing,
    refuse_missing,
    replacing,
    try_lock,
    unused,
)

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
PREFIXES = ("sample_stats/", "extras/")  # of fields that are no sites
_COUNT, _DIGEST = "draws written", "draws digest"  # names of tensors in the file
_KIND = "file of draws"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_name(name: str) -> None:
    """:raises ValueError: if a site has a reserved name, or one that is not UTF-8."""
    taken = ("__metadata__", _COUNT, _DIGEST)
    if name in taken or name.startswith(PREFIXES):
        raise ValueError(
            f"site {name!r}: the names {', '.join(map(repr, taken))} are reserved, and those that begin with "
            f"{' or '.join(map(repr, PREFIXES))}: rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"site {name!r}: its name is no UTF-8: rename it") from error


class Field(NamedTuple):
    """Shape of one draw of one chain, and the dtype in which it is stored."""

    shape: torch.Size
    dtype: torch.dtype


class MemoryDraws:
    """
    Draws in memory, ``[chains, draws, *shape]``.

    :param fields: what is kept, by name.
    :param num_chains: number of chains.
    :param num_samples: final number of draws.
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
        """Does nothing: there is no file."""

    flush = close


class FileDraws:
    """
    Draws in a safetensors file of tensors ``[chains, draws, *shape]``. The file has its full size from the start, and is filled while the
    chains run. Any safetensors reader can read it at any time. The tensor ``"draws written"`` is the number of draws so far;
    ``"draws digest"`` holds a BLAKE2b digest of header and count, and one of each draw.

    :param path: the file.
    :param fields: what is kept, by name.
    :param num_chains: number of chains.
    :param num_samples: number of draws that there will be.
    :param overwrite: whether an existing file may be replaced.
    :param resume: how many draws of an existing file stay; None makes a new file.
    :raises FileExistsError: if the file exists and may not be overwritten.
    :raises ValueError: if the path is no file's, or the file to resume holds other draws than these, or fewer, or corrupt ones.
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
        self._header, self._starts, size = self._layout()
        if resume is None:
            refuse_existing(path, overwrite)
            with unused(path), replacing(path) as part:
                # of the same open file, so that the lock goes on
                self._file = os.fdopen(os.dup(part.fileno()), "r+b", buffering=0)
                with self._room():
                    _reserve(part.fileno(), size)
                # readers touch the first byte of every tensor, which on a full tmpfs kills them if it was never written
                for at in self._starts.values():
                    self._write(memoryview(b"\0")[: size - at], at)
                self._write(memoryview(self._header), 0)
                self._write_count()
        else:
            self._file = open(path, "r+b", buffering=0)
            try:
                self._check_resumed(size)
            except BaseException:
                self._file.close()
                raise
        closed_in_children.add(self._file)
        self.flush()

    def _check_resumed(self, size: int) -> None:
        if not try_lock(self._file.fileno()):
            raise RuntimeError(f"{self.path} is in use: another run writes to it")
        if os.pread(self._file.fileno(), len(self._header), 0) != self._header or os.fstat(self._file.fileno()).st_size != size:
            raise ValueError(f"{self.path} does not hold the draws of this run, or is truncated")
        values, digests = _read(self.path)
        if len(digests) < self.count:
            raise ValueError(
                f"{self.path} holds {len(digests)} draws, where the checkpoint was written after {self.count}: it is of another run"
            )
        _check_draws(self.path, values, digests[: self.count])  # those after the checkpoint are drawn again

    def _layout(self) -> tuple[bytes, dict[str, int], int]:
        entries: dict[str, Any] = {}
        offset = 0
        shapes = {name: (self._num_chains, self._num_samples, *field.shape) for name, field in self.fields.items()}
        dtypes = {name: field.dtype for name, field in self.fields.items()}
        shapes |= {_COUNT: (1,), _DIGEST: (self._num_samples + 1, 2)}
        dtypes |= {_COUNT: torch.int64, _DIGEST: torch.int64}
        # wide types first keeps all of them aligned
        for name in [_COUNT, _DIGEST, *sorted(self.fields, key=lambda n: (-dtypes[n].itemsize, n))]:
            size = math.prod(shapes[name]) * dtypes[name].itemsize
            entries[name] = {"dtype": _NAMES[dtypes[name]], "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": {"format version": VERSION, "kind": _KIND}, **entries}).encode()
        # count and digest of the header lie in one page: a kill leaves both of them old or new
        text += b" " * (-(8 + len(text)) % 64)
        header = struct.pack("<Q", len(text)) + text
        return header, {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}, len(header) + offset

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Writes one draw ``[chains, *shape]`` of every field."""
        kept = {name: values[name].detach().to("cpu", field.dtype).contiguous() for name, field in self.fields.items()}
        for name, field in self.fields.items():
            rows = kept[name]
            size = field.shape.numel() * field.dtype.itemsize
            for chain, row in enumerate(rows):
                at = self._starts[name] + (chain * self._num_samples + self.count) * size
                self._write(row.reshape(-1).view(torch.uint8).numpy().data, at)
        self._write(memoryview(_draw_digest(kept, self.count)), self._starts[_DIGEST] + 16 * (1 + self.count))
        self.count += 1
        self._write_count()

    def flush(self) -> None:
        """
        Writes the draws so far to the disk, so that they survive a crash of the machine. They survive a crash of the process in any case.

        :raises RuntimeError: if the file was removed or replaced by another in the meantime.
        """
        self._write_count()
        with self._room():
            os.fsync(self._file.fileno())
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise RuntimeError(f"{self.path} was removed or replaced by another file while draws were written to it: they are lost")

    def close(self) -> None:
        """Flushes and unlocks the file, which can still be read."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _write_count(self) -> None:
        count = struct.pack("<q", self.count)
        self._write(memoryview(count + _digest(self._header, count)), self._starts[_COUNT])

    def _write(self, data: memoryview, at: int) -> None:
        """Writes all bytes. One ``pwrite`` writes at most 2 GiB, and may write less than asked when the disk becomes full."""
        with self._room():
            while len(data):
                done = os.pwrite(self._file.fileno(), data, at)
                if done == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                data, at = data[done:], at + done

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """:raises OSError: saying how many draws are safe, if the disk is full."""
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
        return {**self.__dict__, "_file": None}  # a copy only reads


def _reserve(file: int, size: int) -> None:
    """Sets the size of a file and, where the system can, allocates its blocks, so that a disk that becomes full later costs no draw."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, some file systems refuse it
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        os.truncate(file, size)


@checked
def read_draws(path: str | Path, check: bool = False) -> dict[str, Tensor]:
    """
    Reads a file of draws, finished or not. The tensors are memory-mapped.

    :param bool check: whether to compare every draw with its digest, for which all are read once; :meth:`SGMCMC.resume` always does.
    :return: ``[chains, draws, *shape]`` by site; statistics of the sampler have names that begin with ``"sample_stats/"``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is truncated, corrupt, no file of draws, or of another format version.
    """
    values, digests = _read(Path(path))
    if check:
        _check_draws(Path(path), values, digests)
    return values


def _read(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Draws and their digests, ``[draws, 2]``."""
    refuse_missing(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            check_version(path, file.metadata() or {}, _KIND)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        digests = tensors.pop(_DIGEST)
        del tensors[_COUNT]
        count = _read_count(path)
        if not all(value.dim() >= 2 and value.shape[1] == len(digests) - 1 >= count >= 0 for value in tensors.values()):
            raise ValueError("its header is not of draws")
    except FileError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is truncated, or no file of draws, or corrupt: {error}") from error
    return {name: value[:, :count] for name, value in tensors.items()}, digests[1 : count + 1]


def _read_count(path: Path) -> int:
    with open(path, "rb", buffering=0) as file:
        (size,) = struct.unpack("<Q", file.read(8))
        file.seek(0)
        header = file.read(8 + size)
        for _ in range(20):
            file.seek(8 + size)
            found = file.read(24)
            if found[8:] == _digest(header, found[:8]):
                return struct.unpack("<q", found[:8])[0]
            time.sleep(0.001)  # a run may be writing it
    raise ValueError("the digest of header and count is another")


def _check_draws(path: Path, values: Mapping[str, Tensor], digests: Tensor) -> None:
    for i, digest in enumerate(digests):
        if _draw_digest({name: value[:, i] for name, value in values.items()}, i) != digest.numpy().tobytes():
            raise FileError(f"{path} is corrupt: draw {i} is not what was written to it (its digest is another)")


def _draw_digest(values: Mapping[str, Tensor], number: int) -> bytes:
    rows = (row.reshape(-1).view(torch.uint8).numpy() for name in sorted(values) for row in values[name])
    return _digest(struct.pack("<q", number), *rows)


def _digest(*parts: Any) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.digest()
