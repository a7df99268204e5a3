"""Digests of a user's function: of its code, and of the values in its closure, defaults and globals. They tell whether it has changed."""

from __future__ import annotations

import dis
import functools
import hashlib
import platform
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_advbayes.given import warn
from pyro_advbayes.storage.digests import tensor_digest
from pyro_advbayes.storage.files import FileError
from pyro_advbayes.storage.reference import parameters

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range)
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_GLOBAL", "LOAD_NAME")  # in which Pythons 3.10 to 3.14 name things
_DEEPEST = 6
_PYTHON = "Python"


def parts(function: Callable) -> dict[str, str]:
    """
    Digests by name: of the code of a function, and of the functions outside of installed packages that it calls; of numbers, strings,
    tensors, networks and distributions in their closures, defaults and globals. For other objects, of the attributes that the code names.
    """
    walk = _Walk()
    walk.value(function, "")
    return {_PYTHON: ".".join(platform.python_version_tuple()[:2]), **dict(walk.finish())}


def check(now: Mapping[str, str], then: Mapping[str, Any], name: str, path: Path) -> None:
    """
    :param now: the parts of a function.
    :param then: those that must not have changed.
    :param name: of the argument that it is.
    :raises ValueError: naming the part that differs. Warns if the file was written by another Python version, whose byte code differs.
    """
    if not all(isinstance(each, str) for each in (then.get(_PYTHON), *then.values())):
        raise FileError(f"{path}: the digests of its {name} are not strings: it is corrupt")
    if now[_PYTHON] != then[_PYTHON]:
        warn(
            f"{path} was written by Python {then[_PYTHON][:20]}, here it is {now[_PYTHON]}: whether {name} is the same function "
            "cannot be checked",
        )
        return
    for part, digest in then.items():
        if now.get(part) != digest:
            raise ValueError(f"{path} is of another run: its {name} is another function ({part or 'its code'} differs)")


class _Walk:
    """Visits functions and the values that they refer to."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._found: dict[str, str] = {}
        self._objects: list[tuple[Any, str, int]] = []
        self._named: set[str] = set()

    def value(self, value: Any, name: str, depth: int = 0) -> None:
        """Records a value."""
        if isinstance(value, _PLAIN):
            self._found[name] = _digest(repr(value))
            return
        if id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(value))
        if isinstance(value, (Tensor, np.ndarray)):
            self._found[name] = _digest(repr(_described(value)))
        elif isinstance(value, functools.partial):
            for i, part in enumerate((value.func, *value.args)):
                self.value(part, f"{name}({i})", depth + 1)
            self._items(value.keywords, name, depth)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, name, depth + 1)
            self.value(value.__self__, f"{name}.__self__", depth + 1)
        elif isinstance(value, types.FunctionType):
            self._function(value, name, depth)
        elif isinstance(value, type):
            self._class(value, name, depth)
        elif isinstance(value, nn.Module):
            self._class(type(value), name, depth)
            self._items(value.state_dict(), name, depth)
        elif isinstance(value, Distribution):
            described = [type(value).__name__, *(_described(part) for part in parameters(value))]
            self._found[name] = _digest(repr(described))
        elif isinstance(value, Mapping):
            self._items(value, name, depth)
        elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            self._items(dict(enumerate(value)), name, depth)
        elif not isinstance(value, types.ModuleType):
            self._class(type(value), name, depth)
            self._found[name] = _digest(getattr(value, "__qualname__", ""))  # of what is a function, and not Python's
            self._objects.append((value, name, depth))

    def finish(self) -> Iterator[tuple[str, str]]:
        """The digests. Attributes of objects come last, when the names in all code are known."""
        while self._objects:
            value, name, depth = self._objects.pop()
            attributes = value._asdict() if hasattr(value, "_fields") else getattr(value, "__dict__", {})
            self._items({key: each for key, each in attributes.items() if key in self._named}, name, depth)
        yield from self._found.items()

    def _items(self, items: Mapping[Any, Any], name: str, depth: int) -> None:
        for key, value in list(items.items())[:1000]:
            self.value(value, f"{name}.{key}" if name else str(key), depth + 1)

    def _class(self, kind: type, name: str, depth: int) -> None:
        self._found[f"{name}: class"] = _digest(kind.__qualname__)
        for key, value in vars(kind).items():
            function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if isinstance(function, types.FunctionType):
                self.value(function, f"{name}.{key}", depth + 1)

    def _function(self, function: types.FunctionType, name: str, depth: int) -> None:
        code = function.__code__
        if code.co_filename.startswith(_LIBRARIES) or str(function.__module__).split(".")[0] == __name__.split(".")[0]:
            self._found[name] = _digest(f"{function.__module__}.{function.__qualname__}")
            return
        self._found[name] = _digest(repr(_described_code(code)))
        codes = list(_codes(code))
        loads = [each for inner in codes for each in dis.get_instructions(inner) if each.opname in _LOADS]
        self._named |= {each.argval for each in loads}
        names = [each.argval for each in loads if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
        known = function.__globals__
        self._items({key: known[key] for key in sorted(set(names)) if key in known}, "", depth)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self._items({key: cell.cell_contents for key, cell in cells if _filled(cell)}, name, depth)
        defaults = dict(zip(code.co_varnames[: code.co_argcount][::-1], (function.__defaults__ or ())[::-1], strict=False))
        self._items({**defaults, **(function.__kwdefaults__ or {})}, name, depth)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018, the one way to ask
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _codes(value)


def _described_code(code: types.CodeType) -> list[Any]:
    """Without file names, line numbers, and the order of sets, which differs between processes."""
    constants = [
        _described_code(value)
        if isinstance(value, types.CodeType)
        else sorted(map(repr, value))
        if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]
    return [code.co_code.hex(), constants, list(code.co_names), list(code.co_freevars), code.co_argcount, code.co_kwonlyargcount]


def _described(value: Tensor | np.ndarray) -> list[Any]:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return [list(value.shape), str(value.dtype)]
        value = torch.from_numpy(np.frombuffer(np.ascontiguousarray(value).tobytes(), dtype=np.uint8).copy())
    return tensor_digest(value) if value.layout == torch.strided else [list(value.shape), str(value.dtype)]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
