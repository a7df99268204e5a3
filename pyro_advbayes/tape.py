"""Python functions of tensors as lists of operations: recorded in the time of one call, replayed on other inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

# Recording a batched call takes as long as the Python of so many calls of vmap: 3 ms against 0.4 ms.
RECORDED_CALLS = 8


class NotRecordable(RuntimeError):
    """The function's Python follows values that change between replays, or writes into tensors that outlive the call."""


def record(fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> tuple[Tape, Sequence[Tensor]]:
    """
    Calls ``fn`` once and notes every operation it performs.

    What :func:`~pyro_advbayes.graph.trace_graph` is for functions that run for hours, this is for functions that run a
    hundred times: recording costs little more than the call itself, where a trace costs some twenty calls. Nothing is
    simplified; operations that no output needs are left out, and those that no input reaches are performed once.

    :param fn: function of tensors to a sequence of tensors. Random operations stay random. What it takes from elsewhere
        (parameters, captured data) stays that very tensor, also for gradients.
    :param inputs: what changes from replay to replay, in values only.
    :return: the tape, and what this call returned.
    :raises NotRecordable: where a Python number or a shape depends on the values of an input or of a random number, and
        where a tensor is written to that existed before. What leaves PyTorch altogether (``.numpy()``, ``.tolist()``,
        Python's own random numbers) goes unseen: compare :meth:`Tape.replay_all` with a second call.
    """
    recorder = _Recorder(inputs)
    with recorder:
        outputs = fn(*inputs)
    return Tape(recorder, outputs), outputs


class _Slot(NamedTuple):
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


class _Operation(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]  # slots in place of tensors
    kwargs: dict[str, Any]
    inputs: list[_Slot]
    outputs: list[_Slot | None]
    several: bool
    writes: frozenset[int]
    random: bool

    @property
    def made(self) -> set[int]:
        """Memory that holds something new afterwards."""
        return {slot.memory for slot in self.outputs if slot is not None} | self.writes

    @property
    def memory(self) -> set[int]:
        return {slot.memory for slot in self.inputs} | self.made


class _Recorder(TorchDispatchMode):
    """Notes operations below autograd, where composite ones have fallen into their parts."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.constants: dict[_Slot, Tensor] = {}
        self.random: set[int] = set()  # memory that random numbers reach
        self.size = 0
        self._slots = WeakTensorKeyDictionary()  # weak, so that activations die as early as without a recorder
        self.inputs = [self._new_slot(tensor) for tensor in inputs]
        self.changing = {slot.memory for slot in self.inputs}  # memory that differs from replay to replay
        self._outer = set(self.changing)  # memory that was there before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch imports its compiler to keep it out of here, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        named_args = tuple([self._name(arg, tensors) for arg in args])
        named_kwargs = {name: self._name(arg, tensors) for name, arg in kwargs.items()}
        inputs = [self._slots[tensor] for tensor in tensors]
        read = {slot.memory for slot in inputs}
        writes = frozenset(_written(func, named_args, named_kwargs)) if func._schema.is_mutable else frozenset()
        changing = bool(read & self.changing)
        if changing and _reads_values(func, args):
            raise NotRecordable(f"{func} makes a Python number or a shape of values that change")
        if writes & self._outer:
            raise NotRecordable(f"{func} writes into a tensor that is older than the call")

        if func is aten.lift_fresh.default:  # torch.tensor([...]) may be written to: every replay gets its own
            func = aten.clone.default
        result = func(*args, **kwargs)
        several = isinstance(result, (tuple, list))
        outputs = [self._output(value, tensors) for value in (result if several else (result,))]
        random = torch.Tag.nondeterministic_seeded in func.tags
        operation = _Operation(func, named_args, named_kwargs, inputs, outputs, several, writes, random)
        if random or read & self.random:
            self.random |= operation.made
        if random or changing:
            self.changing |= operation.made
        self.operations.append(operation)
        return result

    def _name(self, arg: Any, tensors: list[Tensor]) -> Any:
        """An argument with slots in place of tensors, which are noted in ``tensors``."""
        if isinstance(arg, Tensor):
            tensors.append(arg)
            return self.slot(arg)
        if isinstance(arg, (tuple, list)):
            return [self._name(part, tensors) for part in arg]
        return arg

    def slot(self, tensor: Tensor) -> _Slot:
        """A tensor's place; a tensor not seen before becomes a constant."""
        known = self._slots.get(tensor)
        return self._constant(tensor) if known is None else known

    def _constant(self, tensor: Tensor) -> _Slot:
        for known, slot in self._slots.items():
            if _memory(known) == _memory(tensor):
                if _geometry(known) == _geometry(tensor):  # the same view in another Python object
                    self._slots[tensor] = slot
                    return slot
                if slot.memory not in self._outer:
                    raise NotRecordable("a tensor was made from another's memory without an operation")
        slot = self._new_slot(tensor)
        self.constants[slot] = tensor
        self._outer.add(slot.memory)
        return slot

    def _output(self, value: Any, tensors: list[Tensor]) -> _Slot | None:
        if not isinstance(value, Tensor):
            return None
        known = self._slots.get(value)
        if known is not None:  # written in place
            return known
        memory = _memory(value)
        for tensor in tensors:
            if _memory(tensor) == memory:
                return self._new_slot(value, self._slots[tensor].memory)
        return self._new_slot(value)

    def _new_slot(self, tensor: Tensor, memory: int | None = None) -> _Slot:
        slot = _Slot(self.size, self.size if memory is None else memory, tensor.numel(), tensor.dim(), tensor.dtype)
        self.size += 1
        self._slots[tensor] = slot
        return slot


class Tape:
    """
    What a function of tensors did, operation by operation; :func:`record` makes it.

    :ivar elements: how many numbers a replay makes.
    :ivar random: for each output, whether random numbers reach it.
    """

    def __init__(self, recorder: _Recorder, outputs: Sequence[Tensor]) -> None:
        self._inputs = [slot.index for slot in recorder.inputs]
        self._outputs = [recorder.slot(value) for value in outputs]
        self._constants: list[Any] = [None] * recorder.size
        for slot, value in recorder.constants.items():
            self._constants[slot.index] = value
        self._operations, self._changing = recorder.operations, recorder.changing
        self.random = [slot.memory in recorder.random for slot in self._outputs]

        needed = {slot.memory for slot in self._outputs}
        live = []
        for operation in reversed(recorder.operations):
            if not needed.isdisjoint(operation.made):
                live.append(operation)
                needed |= operation.memory
        held = recorder.changing.union(*(operation.writes for operation in live))
        self._each: list[_Operation] = []
        once: list[_Operation] = []
        for operation in reversed(live):
            (once if not operation.random and held.isdisjoint(operation.memory) else self._each).append(operation)
        self._once = _plan(once, {*self._ends, *(slot.index for operation in self._each for slot in operation.inputs)})
        self._steps: dict[tuple[bool, bool], list[_Step]] = {}
        self.elements = sum(s.numel for o in self._each for s in o.outputs if s is not None and s.whole)

    @property
    def _ends(self) -> set[int]:
        return {slot.index for slot in self._outputs}

    def prepare(self) -> list[Any]:
        """The values that stay the same from replay to replay, as they are now."""
        values = list(self._constants)
        _perform(self._once, values)
        return values

    def replay(self, values: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """
        :param values: what :meth:`prepare` returned; it is left as it is.
        :param inputs: tensors of the shapes that were recorded.
        """
        return self._run(self._plan_for(together=False), values, inputs)

    def replay_together(
        self, values: Sequence[Any], inputs: Sequence[Tensor], count: int, shared: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """
        ``count`` replays side by side, each with random numbers of its own.

        :param values: what :meth:`prepare` returned.
        :param inputs: the first inputs, ``[count, *input]``.
        :param shared: the other inputs, the same for all.
        :return: ``[count, *output]``.
        :raises RuntimeError: from PyTorch, for an operation that cannot be batched.
        """
        steps = self._plan_for(together=True)

        def one(lane: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self._run(steps, [*values, lane], (*inputs, *shared))

        # The function may have no input but chance, and vmap needs something to map over.
        return torch.func.vmap(one, randomness="different")(torch.empty(count, 0), *inputs)

    def replay_all(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every operation that was recorded, needed or not: from one state of the random generators, what ``fn`` returns."""
        return self._run(_plan(self._operations, self._ends), self._constants, inputs)

    def _plan_for(self, together: bool) -> list[_Step]:
        key = together, torch.is_grad_enabled()
        if key not in self._steps:
            operations = self._each
            if together:
                operations = _in_lanes(operations, self._changing, len(self._constants))
                operations = _rows_last(operations, self._changing, self._ends)
            if not torch.is_grad_enabled():
                operations = _in_place(operations, {slot.memory for slot in self._outputs})
            self._steps[key] = _plan(operations, self._ends)
        return self._steps[key]

    def _run(self, steps: list[_Step], values: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = list(values)
        for index, tensor in zip(self._inputs, inputs, strict=True):
            values[index] = tensor
        _perform(steps, values)
        return tuple(values[slot.index] for slot in self._outputs)


class Replays:
    """
    Replays a tape for many draws: ``chunk`` of them side by side, or one after the other.

    :param Tape tape: its first inputs are what a draw consists of.
    :param int chunk: how many draws are computed together, >= 1; becomes 1 if an operation cannot be batched.
    :param bool lasting: whether there will be many more runs than one.
    """

    def __init__(self, tape: Tape, chunk: int, lasting: bool = False) -> None:
        self.tape, self.chunk, self.lasting = tape, chunk, lasting
        self._batched: dict[tuple[int, bool], Tape] = {}

    def run(self, draws: Callable[[int, int], list[Tensor]], start: int, stop: int, shared: Sequence[Tensor] = ()) -> Iterator[Any]:
        """
        The outputs, in pieces ``[size, *output]``.

        :param draws: function of ``(start, size)`` to tensors ``[size, *input]``.
        :param start: the first draw.
        :param stop: the one after the last.
        :param shared: the tape's other inputs, the same for all draws.
        """
        constants = self.tape.prepare()
        while start < stop:
            size = min(self.chunk, stop - start)
            piece = None
            if size > 1:
                piece = self._together(constants, draws(start, size), size, (stop - start) // size, shared)
                if piece is None:
                    self.chunk = size = 1
            if piece is None:
                draw = [tensor[0] for tensor in draws(start, 1)]
                piece = [value.unsqueeze(0) for value in self.tape.replay(constants, (*draw, *shared))]
            yield piece
            start += size

    def _together(
        self, constants: list[Any], draws: list[Tensor], size: int, calls: int, shared: Sequence[Tensor]
    ) -> Sequence[Tensor] | None:
        """
        One chunk; None if it cannot be batched, or not within the memory there is.

        The Python of ``vmap`` costs as much as a small network, so that where more chunks follow, what it does is recorded, too.
        """
        places = [i for i, value in enumerate(constants) if value is not None]
        inputs = (*draws, *shared, *(constants[i] for i in places))

        def together(*tensors: Tensor) -> Sequence[Tensor]:
            values, ends = list(constants), (len(draws), len(draws) + len(shared))
            for i, value in zip(places, tensors[ends[1] :], strict=True):
                values[i] = value
            return self.tape.replay_together(values, tensors[: ends[0]], size, tensors[ends[0] : ends[1]])

        key = size, torch.is_grad_enabled()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # one loop in place of another
                warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # by torch.binomial
                if key in self._batched:
                    return self._batched[key].replay(self._batched[key].prepare(), inputs)
                if calls < RECORDED_CALLS and not self.lasting:
                    return together(*inputs)
                self._batched[key], piece = record(together, inputs)
                return piece
        except Exception:
            return None


_Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[int | None], bool, list[int]]


def _plan(operations: Sequence[_Operation], keep: set[int]) -> list[_Step]:
    """The operations with the places that are read for the last time, so that memory is given back as early as in Python."""
    steps: list[_Step] = []
    keep = set(keep)
    for operation in reversed(operations):
        outputs = [None if slot is None else slot.index for slot in operation.outputs]
        last = {slot.index for slot in (*operation.inputs, *operation.outputs) if slot is not None} - keep
        keep |= last
        steps.append((operation.function, operation.args, operation.kwargs, outputs, operation.several, list(last)))
    return steps[::-1]


def _perform(steps: list[_Step], values: list[Any]) -> None:
    for function, args, kwargs, outputs, several, last in steps:
        result = function(*_fill(args, values), **{name: _fill(arg, values) for name, arg in kwargs.items()})
        if several:
            for index, value in zip(outputs, result, strict=True):
                if index is not None:
                    values[index] = value
        elif outputs[0] is not None:
            values[outputs[0]] = result
        for index in last:
            values[index] = None


def _fill(arg: Any, values: list[Any]) -> Any:
    if type(arg) is _Slot:
        return values[arg.index]
    if type(arg) in (tuple, list):
        return [_fill(part, values) for part in arg]
    return arg


_IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.exp.default: aten.exp_.default,
}


def _in_place(operations: Sequence[_Operation], kept: set[int]) -> list[_Operation]:
    """
    Lets an activation write over its argument where nobody reads that again: new memory costs more than the activation, since
    the system hands it out page by page.
    """
    made: set[int] = set()
    for operation in operations:
        made |= operation.made
    result: list[_Operation] = []
    later = set(kept)
    for operation in reversed(operations):
        function = _IN_PLACE.get(operation.function)
        if function is not None:
            (argument,), (value,) = operation.inputs, operation.outputs
            if argument.memory in made - later and argument.whole and argument.dtype == value.dtype:
                operation = operation._replace(function=function)
        later |= operation.memory
        result.append(operation)
    return result[::-1]


def _in_lanes(operations: Sequence[_Operation], changing: set[int], lane: int) -> list[_Operation]:
    """Gives every replay memory of its own where it will write what no other replay does: noise into an empty tensor, say."""
    slot = _Slot(lane, lane, 0, 1, torch.float32)
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


def _rows_last(operations: Sequence[_Operation], changing: set[int], ends: set[int]) -> list[_Operation]:
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


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[int]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (slot.memory for slot in (value if isinstance(value, list) else [value]) if isinstance(slot, _Slot))


def _reads_values(func: Any, args: Sequence[Any]) -> bool:
    if func is aten.index.Tensor:  # a gather, unless it is asked with a mask
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
