"""What a user gave, in words, and what to give instead: unknown arguments, arrays that are no tensors, other forms of a tensor."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SEEDS = 2**32 - 1  # the largest of NumPy and scikit-learn
_INSIDE = {"pyro_advbayes", "torch", "pyro", "contextlib", "functools"}  # packages that a call of this one goes through


def need_extra(module: str, extra: str) -> Any:
    """
    A module that is not installed by default. It is imported where it is used, since it takes long, too.

    :param module: its name.
    :param extra: of this package, which installs it.
    :raises ModuleNotFoundError: naming the extra, where the module is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module.partition('.')[0]} is not installed: pip install 'pyro_advbayes[{extra}]'", name=error.name
        ) from error


class UnknownArgument(TypeError, ValueError):
    """A keyword argument that there is none: a TypeError, as Python raises it, and a ValueError, as all of this package's refusals are."""


def refuse_unknown(function: type | Callable, options: Mapping[str, Any]) -> None:
    """
    :param function: a function, or a class whose constructor may hand options on to its base's.
    :param options: keyword arguments of a call.
    :raises UnknownArgument: naming the first that is no argument, and those that are.
    """
    known = [p.name for p in whole_signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UnknownArgument(f"{function.__name__} has no argument {unknown[0]!r}; there are {', '.join(known)}")


def whole_signature(function: type | Callable) -> inspect.Signature:
    """
    A function's signature; of a class, that of its constructor, in which the arguments of its base's stand for the options that it hands
    on to it.
    """
    bases = [base for base in getattr(function, "__mro__", ()) if base is not object]
    constructors = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]
    merged: dict[str, inspect.Parameter] = {}
    for each in constructors or [function]:
        parameters = list(inspect.signature(each).parameters.values())
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in (*merged, "self"):
                kind = inspect.Parameter.KEYWORD_ONLY if each is not (constructors or [function])[0] else parameter.kind
                merged[parameter.name] = parameter.replace(kind=kind)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return inspect.Signature(list(merged.values()))


class WholeSignature:
    """As a class's ``__signature__``: :func:`whole_signature` for ``help``, completion and documentation, where they would show options."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        return whole_signature(owner)


def check_int(value: Any, name: str, least: int, meaning: str = "", most: int | None = None) -> int:
    """
    The value, if it is an int >= ``least``. A bool is refused: ``True`` is an int in Python, and a mistake here.

    :param name: of the argument, for the message.
    :param meaning: what the number stands for, for the message.
    :param most: the largest value allowed; by default there is none.
    :raises ValueError: naming the argument, its value and its range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        allowed = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
        raise ValueError(f"{name}={value!r}: {meaning + ', ' if meaning else ''}{allowed}")
    return value


def check_choice(value: Any, name: str, choices: Collection[str], remedy: str = "") -> None:
    """:raises ValueError: naming the argument and its choices, if the value is none of them; ends with ``remedy``."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}{remedy}")


def kind(value: Any) -> str:
    """``a numpy array``, ``a pandas DataFrame``, ``a list``: what a value is."""
    if isinstance(value, np.ndarray):
        return "a numpy array"
    root = type(value).__module__.split(".")[0]
    name = type(value).__name__ if root == "builtins" else f"{root} {type(value).__name__}"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def is_pandas(value: Any) -> bool:
    """Whether a value is a DataFrame or a Series; without importing pandas, which need not be there."""
    return type(value).__module__.split(".")[0] == "pandas" and hasattr(value, "values")


def is_array(value: Any) -> bool:
    """Whether a value holds numbers like a tensor, and is none."""
    numbers = isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (list, tuple, int, float))
    return not isinstance(value, Tensor) and (hasattr(value, "__array__") or numbers)


def need_tensor(value: Any, name: str, inputs: bool = False) -> Tensor:
    """
    The value, if it is a tensor.

    :param name: of the argument, for the message.
    :param inputs: whether weights are multiplied with it, whose dtype is mostly the default one.
    :raises ValueError: saying what it is, and how to make it a tensor.
    """
    if isinstance(value, Tensor):
        return value
    form = as_tensor(name, value, torch.get_default_dtype() if inputs else None) if is_array(value) else None
    raise ValueError(f"{name} is {kind(value)}: give a tensor" + ("" if form is None else f", {form.expression}"))


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Warns at the line outside of this package, and of those that it calls itself through, that led here."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def need_dense(value: Tensor, name: str) -> Tensor:
    """
    The tensor, if it is dense and has data.

    :param name: of the argument, for the message.
    :raises ValueError: saying what it is.
    """
    if value.is_meta or value.layout != torch.strided:
        what = "a tensor of the meta device, without data" if value.is_meta else f"a tensor of layout {value.layout}"
        raise ValueError(f"{name} is {what}: give a dense tensor")
    return value


def class_labels(labels: Any, count: int, of: str, name: str) -> Tensor:
    """
    Labels as int64.

    :param count: how many there must be.
    :param of: what there is one of for each, in words.
    :param name: of the argument.
    :raises ValueError: unless they are a tensor of integers ``[count]``.
    """
    need_tensor(labels, name)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        whole = not labels.is_complex() and torch.equal(labels.double(), labels.double().floor())
        remedy = f": give {name}.long()" if whole else ""
        raise ValueError(f"labels must be a tensor of integers, not {labels.dtype}{remedy}")
    if labels.shape != (count,):
        one_hot = labels.dim() == 2 and labels.shape[1] > 1 and _is_one_hot(labels)
        remedy = ".argmax(-1)" if one_hot else ".squeeze(-1)" if labels.shape == (count, 1) else ""
        give = f": give {name}{remedy}" if remedy else ""
        raise ValueError(f"labels must be [{count}], {of}, not {list(labels.shape)}{give}")
    return labels.to(torch.int64)


class Form(NamedTuple):
    """Another form of a value, and the expression that makes it of the value's name."""

    expression: str
    value: Tensor


def as_tensor(name: str, value: Any, dtype: torch.dtype | None = None) -> Form | None:
    """
    A value as a tensor, of the numbers that it holds.

    :param name: in the expression.
    :param dtype: of floating-point numbers; by default as they are.
    :return: None for what holds no numbers (text, missing objects).
    """
    name, array = (f"{name}.values", value.values) if is_pandas(value) else (name, value)
    floats = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    attempts: list[tuple[str, Callable[[], Any]]] = [(name, lambda: array)]
    if isinstance(array, np.ndarray):
        # a copy of what is read-only (as pandas gives it) or runs backwards; numbers kept as objects, or in another byte order
        attempts = attempts if array.flags.writeable else []
        attempts += [(f"{name}.copy()", array.copy), (f'{name}.astype("{floats}")', lambda: array.astype(floats))]
    for expression, make in attempts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tensor = torch.as_tensor(make())
        except Exception:  # whatever NumPy and PyTorch raise for what they cannot convert
            continue
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            return Form(f"torch.as_tensor({expression}, dtype={dtype})", tensor.to(dtype))
        return Form(f"torch.as_tensor({expression})", tensor)
    return None


def forms(name: str, value: Any) -> Iterator[Form]:
    """Other forms that an argument may have to have: a tensor, another dtype, another shape; the likeliest first."""
    if isinstance(value, Tensor):
        yield from _forms(Form(name, value))
    elif is_array(value):
        tensor = as_tensor(name, value, torch.get_default_dtype())
        if tensor is not None:
            yield tensor
            yield from _forms(tensor)


def _forms(given: Form) -> Iterator[Form]:
    expression, value = given
    number = _floating(given)
    yield number
    column = value.dim() == 2 and value.shape[1] == 1
    if column:
        flat = Form(f"{expression}.squeeze(-1)", value.squeeze(-1))
        yield flat
        yield _floating(flat)
    elif value.dim() >= 2 and _is_one_hot(value):
        yield Form(f"{expression}.argmax(-1)", value.argmax(-1))
    elif value.dim() == 1:
        yield Form(f"{expression}.unsqueeze(-1)", value.unsqueeze(-1))
        if value.dtype != torch.int64 and bool((value == value.long()).all()):
            yield Form(f"{expression}.long()", value.long())


def _floating(given: Form) -> Form:
    """In the default dtype, or in the other one."""
    expression, value = given
    if value.dtype == torch.float32 or torch.get_default_dtype() == torch.float64 != value.dtype:
        return Form(f"{expression}.double()", value.double())
    return Form(f"{expression}.float()", value.float())


def _is_one_hot(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all()) and bool((value.sum(-1) == 1).all())
