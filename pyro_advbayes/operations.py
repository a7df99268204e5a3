"""Recorded operations, and how a list of them is rearranged and performed; :mod:`pyro_advbayes.tape` records them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Slot(NamedTuple):
    """A place among a tape's values."""

    index: int
    memory: int  # the same for all views of one tensor
    numel: int
    dim: int
    dtype: torch.dtype

    @property
    def whole(self) -> bool:
        """Not a view of another tensor."""
        return self.index == self.memory


class Operation(NamedTuple):
    """One call of an aten operation."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # slots in place of tensors
    kwargs: dict[str, Any]
    inputs: list[Slot]
    outputs: list[Slot | None]  # None for what is no tensor
    several: bool  # whether it returns a tuple or list
    writes: frozenset[int]  # memory of arguments that it writes into
    random: bool

    @property
    def made(self) -> set[int]:
        """Memory that holds something new afterwards."""
        return {slot.memory for slot in self.outputs if slot is not None} | self.writes

    @property
    def memory(self) -> set[int]:
        """All memory that it reads or makes."""
        return {slot.memory for slot in self.inputs} | self.made


class Step(NamedTuple):
    """An operation as it is performed; Python's part of that takes as long as a small network."""

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    places: list[tuple[int, int]]  # which of args is which of the tape's values
    nested: list[int]  # which of args have such values inside
    keywords: list[str]  # and which of kwargs
    outputs: list[int | None]
    several: bool
    last: list[int]  # values that nobody reads again


def plan(operations: Sequence[Operation], keep: set[int]) -> list[Step]:
    """The operations with the places that are read for the last time, so that memory is given back as early as in Python."""
    steps: list[Step] = []
    keep = set(keep)
    for operation in reversed(operations):
        outputs = [None if slot is None else slot.index for slot in operation.outputs]
        last = {slot.index for slot in (*operation.inputs, *operation.outputs) if slot is not None} - keep
        keep |= last
        places = [(i, arg.index) for i, arg in enumerate(operation.args) if type(arg) is Slot]
        nested = [i for i, arg in enumerate(operation.args) if type(arg) in (tuple, list) and _has_slot(arg)]
        keywords = [name for name, arg in operation.kwargs.items() if _has_slot([arg])]
        function = getattr(operation.function, "_op", operation.function)  # without the Python around an OpOverload
        steps.append(
            Step(function, list(operation.args), operation.kwargs, places, nested, keywords, outputs, operation.several, list(last))
        )
    return steps[::-1]


def perform(steps: list[Step], values: list[Any]) -> None:
    """
    :param steps: what :func:`plan` returned.
    :param values: a tensor for every slot that is read before it is made, in the place of its index; what is made is put there.
    """
    for function, args, kwargs, places, nested, keywords, outputs, several, last in steps:
        args = args.copy()
        for i, index in places:
            args[i] = values[index]
        for i in nested:
            args[i] = _fill(args[i], values)
        if keywords:
            kwargs = {name: _fill(arg, values) for name, arg in kwargs.items()}
        result = function(*args, **kwargs)
        if several:
            for index, value in zip(outputs, result, strict=True):
                if index is not None:
                    values[index] = value
        elif outputs[0] is not None:
            values[outputs[0]] = result
        for index in last:
            values[index] = None


def _has_slot(arg: Any) -> bool:
    return type(arg) is Slot or (type(arg) in (tuple, list) and any(map(_has_slot, arg)))


def _fill(arg: Any, values: list[Any]) -> Any:
    if type(arg) is Slot:
        return values[arg.index]
    if type(arg) in (tuple, list):
        return [_fill(part, values) for part in arg]
    return arg


def _threshold_backward_(gradient: Tensor, result: Tensor, threshold: float) -> Tensor:
    if gradient.stride() != result.stride():  # what follows counts on the layout that new memory would get
        return aten.threshold_backward.default(gradient, result, threshold)
    return aten.threshold_backward.grad_input(gradient, result, threshold, grad_input=gradient)


_IN_PLACE = {  # what writes over its first argument, in the place of what does not
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.exp.default: aten.exp_.default,
}
_IN_PLACE_ALONE = {aten.threshold_backward.default: _threshold_backward_}  # what vmap does not know in this form

# Views that have every number of their argument once: what is written into them is not written twice.
_REARRANGED = {aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten._unsafe_view.default, aten.detach.default}


def in_place(operations: Sequence[Operation], kept: set[int], together: bool) -> list[Operation]:
    """
    Lets an activation (or its derivative) write over its argument where nobody reads that again: new memory costs more than the
    activation, since the system hands it out page by page.
    """
    made: set[int] = set()
    entire: set[int] = set()  # slots with every number of their memory once
    for operation in operations:
        made |= operation.made
        rearranged = operation.function in _REARRANGED and operation.inputs[0].index in entire
        entire |= {slot.index for slot in operation.outputs if slot is not None and (slot.whole or rearranged)}
    functions = _IN_PLACE if together else _IN_PLACE | _IN_PLACE_ALONE
    result: list[Operation] = []
    later = set(kept)
    for operation in reversed(operations):
        function = functions.get(operation.function)
        if function is not None:
            (argument, *others), (value,) = operation.inputs, operation.outputs
            needed = later.union(slot.memory for slot in others)
            if argument.memory in made - needed and argument.index in entire and argument.dtype == value.dtype:
                operation = operation._replace(function=function)
        later |= operation.memory
        result.append(operation)
    return result[::-1]


def in_lanes(operations: Sequence[Operation], changing: set[int], lane: int) -> list[Operation]:
    """Gives every replay memory of its own where it will write what no other replay does: noise into an empty tensor, say."""
    slot = Slot(lane, lane, 0, 1, torch.float32)
    result = []
    for operation in operations:
        made = {out.memory for out in operation.outputs if out is not None and out.whole}
        if not operation.random and made & changing and changing.isdisjoint(i.memory for i in operation.inputs):
            args = (slot, operation.function, operation.args, operation.kwargs)
            operation = operation._replace(function=_own, args=args, kwargs={}, inputs=[*operation.inputs, slot])
        result.append(operation)
    return result


def _own(lane: Tensor, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    value = function(*args, **kwargs)
    own = lane.new_empty(value.shape, dtype=value.dtype, device=value.device)
    return own if function is aten.empty.memory_format else own.copy_(value)


def rows_last(operations: Sequence[Operation], changing: set[int], ends: set[int]) -> list[Operation]:
    """
    Brings linear layers whose weights change into the form that is fast side by side: ``[out, in] @ [in, rows]`` is one
    product for all replays where the rows are the same, and leaves the many rows next to each other in memory.
    """
    transposed = {o.outputs[0]: o.inputs[0] for o in operations if o.function is aten.t.default}
    written = set().union(*(operation.writes for operation in operations))
    result = []
    for operation in operations:
        if operation.function is aten.view.default and operation.inputs[0].memory not in written:
            operation = operation._replace(function=aten.reshape.default)  # what was in order one by one need not be so here
        function = {aten.addmm.default: _addmm, aten.mm.default: _mm}.get(operation.function)
        *others, weight = operation.args or [None]
        if function is not None and weight in transposed and weight.memory in changing and not operation.kwargs:
            if function is _mm or others[0].dim == 1:
                weight = transposed[weight]
                inputs = [*operation.inputs[:-1], weight]
                operation = operation._replace(function=function, args=(*others, weight), inputs=inputs)
        result.append(operation)
    read = ends.union(slot.index for operation in result for slot in operation.inputs)
    return [o for o in result if o.function is not aten.t.default or o.outputs[0].index in read]


def _addmm(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, rows.t()).add_(bias.unsqueeze(1)).t()


def _mm(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, rows.t()).t()
