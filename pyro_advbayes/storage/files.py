"""Writes and reads files of tensors and plain values. Files are replaced as a whole, carry a digest, and are not unpickled."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


VERSION = "1"  # of the format of all files; another one is refused


def refuse_existing(path: Path, overwrite: bool) -> None:
    """
    Refuses a path to which no file can be written.

    :raises FileExistsError: if there is such a file and it may not be overwritten.
    :raises FileNotFoundError: if its folder is missing.
    :raises PermissionError: if nothing may be written to its folder.
    :raises ValueError: if it is a directory, a device or a dangling link, or its name is no UTF-8 or too long.
    """
    try:
        size = len(path.name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!r} has a name that is no UTF-8: choose another path") from error
    if "\0" in str(path) or size > 255 - len(_part_of("")):
        raise ValueError(f"{str(path)!r} has a name that is too long or holds a zero byte: choose another path")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist: delete it, or choose another path")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {'a directory' if path.is_dir() else 'no regular file'}: give the path of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another path, delete it, or say overwrite=True")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: no file can be written to the folder {path.parent}")


def refuse_missing(path: Path) -> None:
    """:raises FileNotFoundError: if there is no such file; ValueError: if it is no regular one, e.g. a directory or a pipe."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():
        raise ValueError(f"{path} is {'a directory' if path.is_dir() else 'no regular file'}: give the path of a file")


def try_lock(file: int) -> bool:
    """Locks an open file until it is closed, here and in processes forked from this one; False if it is locked elsewhere."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks
        return True
    return True


@contextlib.contextmanager
def unused(path: Path) -> Iterator[None]:
    """
    Holds the lock of a file, if there is one.

    :raises RuntimeError: if another run holds it.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        if not try_lock(file):
            raise _in_use(path)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """
    Yields a new, locked partial file. It replaces ``path`` when the context ends, and is deleted if the context fails. First deletes the
    partial files of ``path`` that a killed process left.
    """
    _remove_left_over(path)
    part, file = _new_part(path)
    with file:
        try:
            yield file
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _new_part(path: Path) -> tuple[Path, BinaryIO]:
    """A new, locked partial file of ``path``."""
    part = path.with_name(_part_of(path.name))
    # O_EXCL: never write to, or follow, a file or link that somebody put there
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = open(part, "r+b", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666))
    try_lock(file.fileno())
    return part, file


def _part_of(name: str) -> str:
    return f"{name}.{secrets.token_hex(8)}.part"


def _remove_left_over(path: Path, own: Path | None = None) -> bool:
    """
    Deletes the partial files of ``path`` that a killed process left.

    :param own: the caller's partial file, which stays.
    :return: whether another process holds one.
    """
    held = False
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if fcntl is None or left == own or not re.fullmatch(r"\.[0-9a-f]{16}\.part", left.name.removeprefix(path.name)):
            continue
        with contextlib.suppress(OSError):
            file = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if try_lock(file):  # no process writes to it
                    left.unlink(missing_ok=True)
                else:
                    held = True
            finally:
                os.close(file)
    return held


class Held:
    """
    Context in which one run holds the lock of a file that it writes again and again. Until the file exists, the run holds an empty partial
    file beside it instead.

    :param path: the file; None for no file.
    :param existing: whether the file must exist, as for a resumed run.
    :raises FileNotFoundError: on entry, if the file must exist and does not.
    :raises RuntimeError: on entry or when it writes, if another run holds the file.
    """

    def __init__(self, path: Path | None, existing: bool = False) -> None:
        self.path, self._existing = path, existing
        self._file: BinaryIO | None = None
        self._placeholder: tuple[Path, BinaryIO] | None = None

    def __enter__(self) -> Held:
        if self.path is None:
            return self
        if self._existing:
            refuse_missing(self.path)
        try:
            if not self._lock(self.path):
                self._reserve(self.path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
        if self._file is not None:
            self._file.close()
            self._file = None

    def save(self, content: Mapping[str, Any], kind: str) -> None:
        """:func:`save`, keeping the lock."""
        assert self.path is not None
        save(self.path, content, kind, self)

    def remove(self) -> None:
        """Deletes the file. The run goes on holding its path."""
        assert self.path is not None
        if self._placeholder is None:
            self._reserve(self.path)
        self.path.unlink(missing_ok=True)

    def check(self, path: Path) -> None:
        """:raises RuntimeError: if another run holds the file."""
        mine = None if self._file is None else os.fstat(self._file.fileno())
        if path.exists() and (mine is None or not os.path.samestat(mine, path.stat())):
            with unused(path):
                pass

    def take(self, part: BinaryIO) -> BinaryIO | None:
        """Takes over the lock of the file that will replace the current one. Returns the current one, which the caller closes."""
        before = self._file
        self._hold(os.fdopen(os.dup(part.fileno()), "rb", buffering=0))  # of the same open file, so that the lock goes on
        return before

    def _lock(self, path: Path) -> bool:
        """Locks the file; False if there is none."""
        while path.is_file():
            with contextlib.suppress(FileNotFoundError):
                file = open(path, "rb", buffering=0)
                self._hold(file)
                if not try_lock(file.fileno()):
                    raise _in_use(path)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return True
            self.__exit__()  # another run replaced or deleted it in the meantime
        return False

    def _reserve(self, path: Path) -> None:
        part, file = _new_part(path)
        self._placeholder = part, file
        closed_in_children.add(file)
        if _remove_left_over(path, own=part):
            raise _in_use(path)

    def release(self, before: BinaryIO | None = None) -> None:
        """Closes what was held before the file that is held now."""
        if before is not None:
            before.close()
        if self._placeholder is not None:
            placeholder, file = self._placeholder
            self._placeholder = None
            if not file.closed:  # as in a forked process: the file is its parent's
                placeholder.unlink(missing_ok=True)
                file.close()

    def _hold(self, file: BinaryIO) -> None:
        self._file = file
        closed_in_children.add(file)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_existing": self._existing, "_file": None, "_placeholder": None}


# A process that is forked in a run, such as a loader's worker, inherits the lock, and would hold it after the run has ended.
closed_in_children: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _close_in_child() -> None:
    for file in closed_in_children:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _in_use(path: Path) -> RuntimeError:
    return RuntimeError(f"{path} is in use: another run writes to it. Wait for its end, or choose another path")


def save_file(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    """
    Writes to an existing file. The function of safetensors replaces the file by another one, which has no lock, and which an fsync of the
    file opened before does not reach.
    """
    with open(path, "r+b") as file:
        file.write(safetensors_torch.save(tensors, metadata))


def save(path: Path, content: Mapping[str, Any], kind: str = "values", held: Held | None = None) -> None:
    """
    Writes nested dicts, lists and tuples of tensors, arrays, numbers, strings and None in the safetensors format. The write is atomic: a
    reader sees either the old file or the new one.

    :param kind: the kind of file, which :func:`load` compares, e.g. ``"checkpoint of SGMCMC"``.
    :param held: takes the lock of the new file.
    :raises RuntimeError: if another run holds it.
    """
    (held or Held(path)).check(path)
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_pack(content, tensors))
    metadata = {"format version": VERSION, "kind": kind, "content": plain, "digest": _digest(kind, plain, tensors)}
    with replacing(path) as part:
        save_file(tensors, str(part.name), metadata=metadata)
        os.fsync(part.fileno())
        before = None if held is None else held.take(part)
    if held is not None:
        held.release(before)


def load(path: Path, kind: str = "values") -> Any:
    """
    Reads what :func:`save` wrote.

    :param kind: the expected kind.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is a directory, truncated, corrupt (its digest differs from that of its content), of another version or kind,
        or was not written by :func:`save`. Files from before version 1 are refused: they have no digest that could be checked.
    """
    refuse_missing(path)
    with reading(path):
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            check_version(path, metadata, kind)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if metadata["digest"] != _digest(kind, metadata["content"], tensors):
            raise ValueError("its digest is not that of its content")
        return _unpack(json.loads(metadata["content"]), tensors)


class FileError(ValueError):
    """A file cannot be used; the message names the file and what is wrong with it."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """:raises FileError: in place of the errors that parsing a corrupt or hostile file raises."""
    try:
        yield
    except FileError:
        raise
    except (SafetensorError, LookupError, StopIteration, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{path} is truncated, or no file of this package, or corrupt: {text[:300]}") from error


def check_version(path: Path, metadata: Mapping[str, str], kind: str) -> None:
    """:raises FileError: if the metadata of a file's header are of another version or kind."""
    found = metadata.get("format version")
    if found is None:
        raise ValueError("it names no format version (those of before version 1 are not read any more)")
    if found != VERSION:
        raise FileError(f"{path} is of format version {found[:20]!r}, and this package reads {VERSION!r}: use the package that wrote it")
    if metadata.get("kind") != kind:
        raise FileError(f"{path} is no {kind}: it is a file of kind {metadata.get('kind', '')[:100]!r}")


def check_fields(path: Path, content: Any, fields: Mapping[str, type | tuple[type, ...]], where: str = "content") -> None:
    """
    Checks the types of fields, and that counts are >= 0, before they are used.

    :param fields: the type of each by name.
    :param where: name of the mapping in messages.
    :raises FileError: naming a field that is missing or has an invalid value.
    """
    if not isinstance(content, dict):
        raise FileError(f"{path}: its {where} is a {type(content).__name__}, not a dict: it is corrupt")
    for name, kind in fields.items():
        if name not in content:
            raise FileError(f"{path}: its {where} lacks {name!r}: it is corrupt")
        value = content[name]
        fits = type(value) is int and value >= 0 if kind is int else isinstance(value, kind)
        if not fits:
            raise FileError(f"{path}: {name!r} in its {where} is {repr(value)[:100]}: it is corrupt")


def _digest(kind: str, plain: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    found = hashlib.blake2b(json.dumps([VERSION, kind, plain, described]).encode(), digest_size=16)
    for name in names:
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    name = f"t{len(tensors)}"
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.astype(np.int64))  # torch has few operations on NumPy's unsigned types
        return {"array": name, "dtype": str(value.dtype)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name, "dtype": str(value.dtype)}
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
