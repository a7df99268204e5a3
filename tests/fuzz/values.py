"""Edge values: what a user may give for an argument by mistake."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor


class Subclass(Tensor):
    """A subclass of Tensor that overrides nothing."""


class Anything:
    """An object of no meaning."""

    def __repr__(self) -> str:
        return "Anything()"


PLAIN: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "3": lambda: 3,
    "10**12": lambda: 10**12,
    "-0.5": lambda: -0.5,
    "2.5": lambda: 2.5,
    "1e300": lambda: 1e300,
    "1e-320": lambda: 1e-320,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1j": lambda: 1j,
    "Fraction": lambda: Fraction(1, 3),
    "'nonsense'": lambda: "nonsense",
    "''": lambda: "",
    "b'x'": lambda: b"x",
    "lone surrogate": lambda: "\udcff",
    "[]": list,
    "()": lambda: (),
    "{}": dict,
    "[1, 'x']": lambda: [1, "x"],
    "(0.0, 1.0)": lambda: (0.0, 1.0),
    "(1.0, 0.0)": lambda: (1.0, 0.0),
    "set": lambda: {1, 2},
    "lambda": lambda: lambda *args, **kwargs: None,
    "object": Anything,
    "type": lambda: int,
    "Path": lambda: Path("/nowhere/at/all"),
    "numpy int": lambda: np.int64(2),
    "numpy float": lambda: np.float32(0.5),
    "numpy array": lambda: np.ones((6, 3)),
    "numpy strings": lambda: np.array(["a", "b"]),
    "pandas": lambda: pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}),
    "0-d tensor": lambda: torch.tensor(0.5),
    "empty tensor": lambda: torch.empty(0),
    "tensor of ints": lambda: torch.arange(6),
    "tensor": lambda: torch.full((6, 3), 1.0 / 3),
    "generator": lambda: (each for each in (1, 2)),
    "module": lambda: torch.nn.Linear(3, 2),
}


def with_nan(value: Tensor) -> Tensor:
    """One element is NaN; an integer tensor stays as it is."""
    value = value.clone()
    if value.is_floating_point() and value.numel():
        value.view(-1)[0] = math.nan
    return value


OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "half": lambda value: value.half(),
    "double": lambda value: value.double(),
    "bool": lambda value: value > 0,
    "complex": lambda value: value.to(torch.complex64),
    "int": lambda value: value.long(),
    "uint8": lambda value: value.to(torch.uint8),
    "NaN inside": with_nan,
    "inf": lambda value: value.float() / 0.0,
    "huge": lambda value: value.double() * 1e300,
    "negative": lambda value: -value,
    "non-contiguous": lambda value: torch.stack([value, value], -1)[..., 0],
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "requires grad": lambda value: value.clone().float().requires_grad_(),
    "no rows": lambda value: value[:0],
    "one row": lambda value: value[:1],
    "rows missing": lambda value: value[:-1],
    "0-d": lambda value: value.sum(),
    "one more dimension": lambda value: value.unsqueeze(-1),
    "one dimension less": lambda value: value[0],
    "transposed": lambda value: value.mT if value.dim() > 1 else value,
    "flat": lambda value: value.reshape(-1),
    "list": lambda value: value.tolist(),
    "numpy": lambda value: value.numpy(),
    "numpy objects": lambda value: value.numpy().astype(object),
    "pandas": lambda value: pandas.DataFrame(value.reshape(len(value), -1).numpy()),
    "subclass": lambda value: value.as_subclass(Subclass),
    "parameter": lambda value: torch.nn.Parameter(value.clone().float()),
    "zeros": torch.zeros_like,
    "strings": lambda value: [str(each) for each in value.flatten().tolist()],
}


def edges(value: Any) -> dict[str, Callable[[], Any]]:
    """Edge values for an argument whose valid value is given, by what they are called."""
    found = dict(PLAIN)
    if isinstance(value, Tensor) and value.dim():
        # weigh towards tensors: they are what users give
        found |= {f"{name} of it": (lambda change=change: change(value.clone())) for name, change in OF_TENSORS.items()}
    if isinstance(value, dict) and value and all(isinstance(each, Tensor) and each.dim() for each in value.values()):
        for name, change in OF_TENSORS.items():
            first = next(iter(value))
            found[f"{name} in it"] = lambda change=change, first=first: {**value, first: change(value[first].clone())}
        found["a name missing"] = lambda: dict(list(value.items())[1:])
        found["another name"] = lambda: {**value, "nonsense": torch.ones(3)}
        found["a number for a name"] = lambda: {**value, 3: torch.ones(3)}
    if isinstance(value, (list, tuple)) and value:
        found["something else in it"] = lambda: type(value)([*value[:-1], Anything()]) if not hasattr(value, "_fields") else Anything()
        found["shorter"] = lambda: list(value)[:-1]
    return found


def is_senseless(valid: Any, given: Any) -> bool:
    """Whether a value can have no meaning where ``valid`` has one, so that accepting it is a fault."""
    nonsense = isinstance(given, (Anything, bytes, complex)) or (isinstance(given, str) and given in ("nonsense", "\udcff"))
    if isinstance(valid, bool):
        return nonsense or isinstance(given, (float, list, tuple, dict, set))
    if isinstance(valid, (int, float)):
        return nonsense or isinstance(given, (list, dict, set)) or (isinstance(given, float) and not math.isfinite(given))
    return nonsense and not isinstance(valid, str)
