"""Errors that name the argument at fault if a model fails, with a remedy that was tried."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_advbayes.given import Form, as_tensor, forms, is_array, kind
from pyro_advbayes.handlers import Refused, in_a_line

T = TypeVar("T")

ATTEMPTS = 40  # runs of a model to find the form of its arguments


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Within it, inside a model, a ValueError becomes :class:`Refused`."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from original(error).__cause__


class Mismatch(ValueError):
    """
    A refusal whose cause may be the form of an argument (a shape, a dtype).

    :param what: the misfit.
    :param why: its usual cause and remedy, for the message if no argument is found at fault.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what


def original(error: BaseException) -> BaseException:
    """The error that a model raised, of which Pyro may have made a copy with a table of shapes."""
    while type(error.__cause__) is type(error) and str(error).startswith(str(error.__cause__)):
        error = error.__cause__
    return error


def signature_of(model: Callable) -> inspect.Signature | None:
    """The signature of a model's call; None if unknown."""
    model = poutine.unwrap(model)
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return None


def label_of(model: Callable, key: int | str) -> str:
    """The name of an argument in messages: the name of the model's parameter, or its position."""
    if isinstance(key, str):
        return key
    signature = signature_of(model)
    names = [] if signature is None else list(signature.parameters)
    return names[key] if key < len(names) else f"args[{key}]"


def bound_arguments(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments | None:
    """A call's arguments by name; None if the signature is unknown, or does not allow the call."""
    signature = signature_of(model)
    try:
        return None if signature is None else signature.bind(*args, **kwargs)
    except TypeError:
        return None


def not_given(model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Arguments that a call leaves at their default of None; none if they are unknown."""
    call = bound_arguments(model, args, kwargs)
    if call is None:
        return []
    return [name for name, p in call.signature.parameters.items() if p.default is None and call.arguments.get(name) is None]


def check_number(model: Callable, item: Sequence[Any]) -> None:
    """:raises ValueError: if a loader's item holds more or fewer values than the model has arguments."""
    signature = signature_of(model)
    if signature is None:
        return
    try:
        signature.bind(*item)
    except TypeError:
        names, held = list(signature.parameters), f"{len(item)} tensor" + "s" * (len(item) != 1)
        remedy = f": leave the others out, collate_fn=lambda rows: default_collate(rows)[:{len(names)}]" if len(item) > len(names) else ""
        raise ValueError(f"the loader's items hold {held} and the model takes {len(names)} ({', '.join(names)}){remedy}") from None


class Given:
    """
    A call's arguments, by their names in messages.

    :param model: what is called.
    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """

    def __init__(self, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        self._args, self._kwargs = tuple(args), dict(kwargs or {})
        self._keys = {label_of(model, key): key for key in (*range(len(self._args)), *self._kwargs)}

    @property
    def values(self) -> dict[str, Any]:
        """Every argument by its name."""
        return {name: self._args[key] if isinstance(key, int) else self._kwargs[key] for name, key in self._keys.items()}

    def call(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with other values."""
        new = {self._keys[name]: value for name, value in values.items()}
        args = tuple(new.get(i, value) for i, value in enumerate(self._args))
        return args, {name: new.get(name, value) for name, value in self._kwargs.items()}


def told(attempt: Callable[[Mapping[str, Any]], T], given: Mapping[str, Any]) -> T:
    """
    The result of an attempt. If it fails, the error names the argument at fault, if the attempt succeeds with that argument
    as a tensor, or in another dtype or shape.

    :param attempt: function of arguments by name that raises if they do not fit.
    :param given: the arguments.
    :raises ValueError: naming arguments and a replacement that was tried. Without one, the attempt's own error.
    """
    with naming(attempt, given):
        return attempt(given)


@contextlib.contextmanager
def naming(attempt: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> Iterator[None]:
    """:func:`told` of errors within the context, of which the attempt is a part."""
    try:
        yield
    except Exception as error:  # whatever a model's Python does with arguments that it was not written for
        _explain(error, attempt, given)
        if isinstance(error, Mismatch):
            raise ValueError(str(error)) from error.__cause__
        raise


def _explain(error: Exception, attempt: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> None:
    ours = isinstance(error, ValueError) and not isinstance(error, Mismatch) and raised_here(error)
    if ours and not any(is_array(value) for value in given.values()):
        return
    if _runs(attempt, given):
        return
    found = _find(attempt, given)
    if found is None:
        _explain_no_rows(error, given)
        return _explain_arrays(error, attempt, given)
    causes = " and ".join(_cause(name, given[name], form.value) for name, form in found.items())
    remedies = ", ".join(form.expression for form in found.values())
    if any(is_array(given[name]) for name in found):
        message = f"{causes}: give {remedies}"
    elif isinstance(error, Mismatch):
        message = f"{error.what}: {causes}, give {remedies}"
    else:
        message = f"{causes}, which the model cannot take ({in_a_line(error)}): give {remedies}"
    raise ValueError(message) from original(error)


def _explain_no_rows(error: Exception, given: Mapping[str, Any]) -> None:
    """:raises ValueError: naming a tensor without elements, or a single number whose rows were asked for."""
    scalar = re.search(r"\b0-d|no dimensions|dimension 0$", in_a_line(error)) is not None
    for name, value in given.items():
        if isinstance(value, Tensor) and (value.numel() == 0 or (scalar and value.dim() == 0)):
            message = f"argument {name} is a tensor {list(value.shape)}, without rows, which the model cannot take ({in_a_line(error)})"
            raise ValueError(message) from original(error)


def _explain_arrays(error: Exception, attempt: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> None:
    """:raises ValueError: naming arrays that are no tensors, if the error changes when they are tensors."""
    tensors: dict[str, Form] = {}
    for name, value in given.items():
        if is_array(value):
            form = as_tensor(name, value, torch.get_default_dtype())
            if form is None:
                message = f"argument {name} is {kind(value)} with entries that are no numbers: encode them first"
                raise ValueError(message) from original(error)
            tensors[name] = form
    try:
        attempt({**given, **{name: form.value for name, form in tensors.items()}})
    except Exception as other:  # whatever a model's Python does with such arguments
        if in_a_line(other) == in_a_line(error):
            return
    if tensors:
        causes = " and ".join(_cause(name, given[name], form.value) for name, form in tensors.items())
        raise ValueError(f"{causes}: give {', '.join(form.expression for form in tensors.values())}") from original(error)


def raised_here(error: BaseException) -> bool:
    """Whether an error was raised by this package, and not by a model's code or PyTorch."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("pyro_advbayes.")


def _find(attempt: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> dict[str, Form] | None:
    """The fewest changes of arguments with which an attempt succeeds."""
    options = {name: list(forms(name, value)) for name, value in given.items()}
    options = {name: found for name, found in options.items() if found}
    several = (names for count in range(1, len(options) + 1) for names in itertools.combinations(options, count))
    changes = (dict(zip(names, each, strict=True)) for names in several for each in itertools.product(*(options[n] for n in names)))
    for change in itertools.islice(changes, ATTEMPTS):
        if _runs(attempt, {**given, **{name: form.value for name, form in change.items()}}):
            return change
    return None


def _runs(attempt: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> bool:
    with torch.no_grad(), warnings.catch_warnings(), contextlib.suppress(Exception):  # whatever a model's Python does with such arguments
        warnings.simplefilter("ignore")
        attempt(given)
        return True
    return False


def _cause(name: str, value: Any, form: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"argument {name} is {kind(value)}, not a tensor"
    if value.dim() != form.dim():
        return f"argument {name} has shape {tuple(value.shape)}"
    return f"argument {name} is of {value.dtype}"
