"""An argument of a wrong kind is refused by its name, whatever the function does with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_advbayes.checked import checked

if TYPE_CHECKING:
    from nowhere import Unknown

Pair = tuple[float, float]


@checked
def function(
    flag: bool = False,
    count: int | None = 1,
    rate: float = 1.0,
    name: str = "",
    values: Tensor | None = None,
    path: str | Path = "",
    many: Sequence[float] = (),
    rows: Sequence[Any] = (),
    pair: Pair | None = None,
    by_name: Mapping[str, Tensor] | None = None,
    call: Callable[[Tensor], Tensor] | None = None,
    draws: Tensor | Iterable[Tensor] = (),
    dtype: torch.dtype | None = None,
    unknown: Unknown | None = None,
    *args: int,
    **options: int,
) -> str:
    """Does nothing."""
    return "called"


DENSE = torch.ones(2)
GOOD = {
    "flag": [True, 0, np.bool_(True)],
    "count": [3, None, np.int64(3)],
    "rate": [1, 2.5, np.float32(0.5), torch.tensor(0.5)],
    "values": [DENSE, torch.nn.Parameter(DENSE), None],
    "path": ["x", Path("x")],
    "many": [[0.1, 1], (0.5,), DENSE, np.ones(2), range(3)],
    "rows": [(DENSE, DENSE), [DENSE]],
    "pair": [(0.0, 1.0), [0, 1], None, torch.ones(2)],
    "by_name": [{"a": DENSE}, {}],
    "call": [len, torch.nn.Linear(1, 1)],
    "draws": [DENSE, [DENSE], (DENSE for _ in range(2))],
    "dtype": [torch.float16, None],
    "unknown": [object(), 3],
}
BAD = {
    "flag": ["nonsense", 2, 0.5, None, [], DENSE],
    "count": [1.5, "1", DENSE, True],
    "rate": ["1", None, float("nan"), float("inf"), 1j, [], DENSE, torch.tensor(1.0, device="meta")],
    "name": [1, None, b"x"],
    "values": [DENSE.to("meta"), DENSE.to_sparse(), 1.0],
    "path": [None, 3, b"x", DENSE],
    "many": [3, "abc", ["a"], [None], {1: 2}, torch.tensor(1.0), torch.ones(2, 2), np.array(["a"]), torch.ones(2, device="meta")],
    "rows": [DENSE, np.ones(2), "x"],
    "pair": [(1.0,), (1.0, "x"), 3, "ab", torch.ones(3)],
    "by_name": [[DENSE], {"a": "x"}, {1: DENSE}, DENSE],
    "call": [3, "len"],
    "draws": [3, "abc", DENSE.to_sparse(), DENSE.to("meta")],
    "dtype": ["float16", 16],
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in GOOD.items() for value in values])
def test_what_fits_its_annotation_is_passed_on(name, value):
    assert function(**{name: value}) == "called"


@pytest.mark.parametrize("name,value", [(name, value) for name, values in BAD.items() for value in values])
def test_what_does_not_fit_is_refused_by_name_in_one_sentence(name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\[.*\])?( is |=)") as caught:
        function(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_message_says_what_is_needed():
    with pytest.raises(ValueError, match=r"^rate='1': a finite number is needed$"):
        function(rate="1")
    with pytest.raises(ValueError, match=r"^count=1.5: an int or None is needed$"):
        function(count=1.5)
    with pytest.raises(ValueError, match=r"^many='a': a sequence, each a finite number is needed$"):
        function(many="a")
    with pytest.raises(ValueError, match=r"^many\[1\]='a': a finite number is needed$"):
        function(many=[1, "a"])
    with pytest.raises(ValueError, match=r"^by_name\['w'\]='x': a tensor is needed$"):
        function(by_name={"w": "x"})


@checked
def half(rate: float, other: float | None = None, call: float | Callable = 1.0) -> Any:
    return rate, other, call


@pytest.mark.parametrize("value", [Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)], ids=["fraction", "numpy", "tensor"])
def test_a_number_of_another_kind_becomes_a_float_where_one_is_wanted(value):
    assert [type(each) for each in half(value, other=value, call=value)] == [float, float, type(value)]
    assert half(value) == (0.5, None, 1.0)
    assert type(half(1)[0]) is int, "which Python takes for a float itself"


@checked
def takes_memory(count: int, error: Any, other: int = 10**7) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("no")]
)
def test_a_count_for_which_there_is_no_memory_is_refused_by_name(error):
    with pytest.raises(ValueError, match=r"^count=1000000000: more than there is memory for"):
        takes_memory(10**9, error)
    with pytest.raises(type(error)):
        takes_memory(3, error, other=5)


def test_another_error_of_a_large_count_stays_what_it_is():
    with pytest.raises(RuntimeError, match="something inside"):
        takes_memory(10**9, RuntimeError("something inside"))


@checked
def takes_arrays(x: Tensor) -> Any:
    if len(x) == 3:
        raise ValueError("x: a message of the function itself")
    if len(x) == 2:
        raise RuntimeError("something inside")
    return len(x)


def test_a_function_may_refuse_arrays_or_take_them_itself():
    assert takes_arrays(np.ones(4)) == 4
    with pytest.raises(ValueError, match="a message of the function itself"):
        takes_arrays(np.ones(3))
    with pytest.raises(ValueError, match=r"^x is a numpy array: give a tensor, torch.as_tensor\(x\)$"):
        takes_arrays(np.ones(2))


def test_arguments_by_position_are_checked_and_those_of_the_models_are_not():
    with pytest.raises(ValueError, match="count='x'"):
        function(True, "x")
    assert function(*GOOD_POSITIONS, "anything", option="anything") == "called"


GOOD_POSITIONS = [values[0] for name, values in {**GOOD, "name": ["x"]}.items() if name != "name"]
GOOD_POSITIONS.insert(3, "x")


def test_what_python_refuses_stays_a_type_error():
    with pytest.raises(TypeError, match="multiple values for argument 'flag'"):
        function(True, flag=True)


def test_signature_name_and_docstring_stay():
    assert list(inspect.signature(function).parameters)[:2] == ["flag", "count"]
    assert function.__name__ == "function" and function.__doc__ == "Does nothing."


@dataclass(frozen=True)
class Base:
    rate: float
    pair: Pair = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.rate == "mine":
            raise ValueError("rate: a message of the class itself")


@checked
@dataclass(frozen=True)
class Settings(Base):
    flag: bool = False


def test_a_class_checks_its_constructor_and_its_own_message_goes_first():
    assert Settings(1.0, flag=True).flag
    for arguments, name in (((1.0, 3), "pair"), ((1.0, (0.0, 1.0), "x"), "flag"), ((float("inf"),), "rate")):
        with pytest.raises(ValueError, match=f"^{name}"):
            Settings(*arguments)
    with pytest.raises(ValueError, match="a message of the class itself"):
        Settings("mine")
