"""Decorator that compares a call's arguments with their annotations, so that one of a wrong kind is refused by name."""

from __future__ import annotations

import builtins
import collections.abc
import functools
import inspect
import math
import os
import re
import sys
import types
import typing
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_advbayes.given import is_array, kind, need_dense, need_tensor

F = TypeVar("F", bound=Callable)
_ELEMENTS = 20  # of a sequence or mapping that are looked at
_WORDS = {
    bool: "True or False",
    int: "an int",
    float: "a finite number",
    str: "a string",
    Path: "a path",
    type(None): "None",
    Tensor: "a tensor",
    torch.dtype: "a dtype of PyTorch",
    torch.nn.Module: "a torch.nn.Module",
    TorchDistributionMixin: "a distribution of pyro.distributions",
}


def checked(function: F) -> F:
    """
    Decorates a public function, or a class, whose constructor is then checked.

    An argument fits its annotation if it is of that kind: ``bool`` is True or False (or 0 or 1), ``float`` a finite number, ``Tensor`` a
    dense tensor with data, ``Callable`` and ``Sequence`` whatever can be called or indexed. A number of another kind (of NumPy, in a
    tensor) is passed on as a Python float where a ``float`` is wanted. Ranges, shapes and ``*args`` are the function's own. Its own
    message goes first where a constructor has one. A count for which there is no memory is refused, too.
    """
    if isinstance(function, type):
        # __init__ of the class itself: a subclass has its own, or inherits this one
        modules = [base.__module__ for base in function.__mro__]  # a dataclass has annotations from those of its bases
        setattr(function, "__init__", _wrapped(getattr(function, "__init__"), modules, constructor=True))  # noqa: B009, B010, mypy refuses it
        return function
    return typing.cast(F, _wrapped(function, [function.__module__], constructor=function.__name__ == "__init__"))


def _wrapped(function: Callable, modules: Sequence[str], constructor: bool) -> Callable:
    """:param modules: in which the names of the annotations stand, the nearest first."""
    signature = inspect.signature(function)

    hints = functools.cache(lambda: _hints(function, signature, modules))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own error names the argument
        given = bound.arguments
        wrong = next((each for each in (_misfit(name, value, hints()[name]) for name, value in given.items()) if each is not None), None)
        if wrong is None:
            numbers = {name: float(value) for name, value in given.items() if hints()[name] in _FLOATS and _is_other_number(value)}
            if numbers:
                given |= numbers
                args, kwargs = bound.args, bound.kwargs
            try:
                return function(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                count = _too_many(error, given)
                if count is None:
                    raise
                raise ValueError(f"{count}={given[count]}: more than there is memory for, take fewer") from error
        array = _is_array_for_tensor(wrong)
        if not constructor and not array and int not in (wrong.hint, *get_args(wrong.hint)):
            raise _refusal(wrong) from None
        # constructors, and functions that are given an array or a wrong count, refuse it first of all, in words that say more
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if isinstance(error, (ValueError, TypeError)) and re.search(rf"\b{wrong.argument}\b", str(error)):
                raise
            raise _refusal(wrong) from error
        if array and not constructor:
            return result
        raise _refusal(wrong)

    return wrapper


_FLOATS = (float, float | None)
_MUCH = 10**6  # a count from which on it is what takes the memory


def _is_other_number(value: Any) -> bool:
    return value is not None and not isinstance(value, (int, float))


def _too_many(error: Exception, given: Mapping[str, Any]) -> str | None:
    """The name of the largest count, if there was no memory for it."""
    counts = {name: value for name, value in given.items() if isinstance(value, int) and value >= _MUCH}
    short = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    return max(counts, key=lambda name: counts[name]) if short and counts else None


class _Misfit(NamedTuple):
    """The innermost value that does not fit. ``name``: what it is called, e.g. ``samples['w']``."""

    argument: str
    name: str
    value: Any
    hint: Any


def _misfit(name: str, value: Any, hint: Any, argument: str = "") -> _Misfit | None:
    if _fits(value, hint):
        return None
    argument = argument or name
    options = [each for each in (get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)) if get_args(each)]
    for option in options:
        parts: list[tuple[Any, Any, Any]] = []  # key, value, annotation
        arguments = get_args(option)
        if get_origin(option) in (collections.abc.Mapping, dict) and isinstance(value, collections.abc.Mapping):
            parts = [(key, each, arguments[1]) for key, each in list(value.items())[:_ELEMENTS] if _fits(key, arguments[0])]
        elif get_origin(option) is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
            parts = [(i, each, arguments[i]) for i, each in enumerate(value)]
        elif get_origin(option) in (collections.abc.Sequence, list, tuple) and isinstance(value, (list, tuple)):
            parts = [(i, each, arguments[0]) for i, each in enumerate(value[:_ELEMENTS])]
        for key, each, inner in parts:
            found = _misfit(f"{name}[{key!r}]", each, inner, argument)
            if found is not None:
                return found
    return _Misfit(argument, name, value, hint)


class _Names(dict):
    """Names of a module. One that it does not have, e.g. one imported for type checkers only, may be anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def _hints(function: Callable, signature: inspect.Signature, modules: Sequence[str]) -> dict[str, Any]:
    """Annotations by argument."""
    found = typing.get_type_hints(function, localns=_Names(ChainMap(*(vars(sys.modules[name]) for name in modules))))
    for name, parameter in signature.parameters.items():
        if name not in found or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found[name] = Any
        elif parameter.default is None:
            found[name] = found[name] | None
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, Tensor) and Tensor in arguments:  # and not because a sparse one can be iterated over
            return _fits(value, Tensor)
        return any(_fits(value, each) for each in arguments)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1))
    if hint is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if hint is float:
        scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_complex()
        return (isinstance(value, Real) or scalar) and math.isfinite(value)
    if hint is Path:
        return isinstance(value, os.PathLike)
    if hint is Tensor:
        return isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided
    base = origin or hint
    if base in (collections.abc.Sequence, list, tuple):
        if not hasattr(value, "__len__") or not hasattr(value, "__getitem__") or isinstance(value, (str, bytes, collections.abc.Mapping)):
            return False
        return _elements_fit(value, arguments, base)
    if base is collections.abc.Iterable:
        return (hasattr(value, "__iter__") or hasattr(value, "__getitem__")) and not isinstance(value, (str, bytes))
    if base in (collections.abc.Mapping, dict):
        items = list(value.items())[:_ELEMENTS] if isinstance(value, collections.abc.Mapping) else None
        return items is not None and (not arguments or all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in items))
    if base is collections.abc.Callable:
        return callable(value)
    return not isinstance(base, type) or getattr(base, "_is_protocol", False) or isinstance(value, base)


def _elements_fit(value: Any, arguments: tuple[Any, ...], base: Any) -> bool:
    if hasattr(value, "ndim"):  # a tensor or an array, also of pandas: args=x is a slip of args=(x,)
        dense = not isinstance(value, Tensor) or _fits(value, Tensor)
        numbers = bool(dense and value.ndim == 1 and arguments and arguments[0] in (int, float))
        long = numbers and (base is not tuple or arguments[-1] is ... or len(value) == len(arguments))
        return long and all(_fits(each, float) for each in value[:_ELEMENTS].tolist())
    if base is tuple and arguments and arguments[-1] is not ...:
        return len(value) == len(arguments) and all(_fits(each, hint) for each, hint in zip(value, arguments, strict=True))
    return not arguments or not isinstance(value, (list, tuple)) or all(_fits(each, arguments[0]) for each in value[:_ELEMENTS])


def _is_array_for_tensor(wrong: _Misfit) -> bool:
    return Tensor in (wrong.hint, *get_args(wrong.hint)) and is_array(wrong.value)


def _refusal(wrong: _Misfit) -> ValueError:
    _, name, value, hint = wrong
    if _is_array_for_tensor(wrong):
        try:
            need_tensor(value, name)
        except ValueError as error:
            return error
    if isinstance(value, Tensor):
        try:
            need_dense(value, name)
        except ValueError as error:
            return error
    plain = isinstance(value, (bool, int, float, complex, str, bytes, type(None)))
    given = f"{name}={value!r}"[:200] if plain else f"{name} is {kind(value)}"
    return ValueError(f"{given}: {_words(hint)} is needed")


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in arguments))
    if hint is None or hint in _WORDS:
        return _WORDS[type(None) if hint is None else hint]
    base = origin or hint
    if base is tuple and arguments and arguments[-1] is not ...:
        return f"a tuple ({', '.join(_words(each) for each in arguments)})"
    if base in (collections.abc.Sequence, collections.abc.Iterable, list, tuple):
        return "a sequence" + (f", each {_words(arguments[0])}" if arguments else "")
    if base in (collections.abc.Mapping, dict):
        return "a dict" + (f" from {_words(arguments[0])} to {_words(arguments[1])}" if arguments else "")
    if base is collections.abc.Callable:
        return "a function"
    if not isinstance(base, type):
        return "another value"
    return f"an {base.__name__}" if base.__name__[0] in "AEIOU" else f"a {base.__name__}"
