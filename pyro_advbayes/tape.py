"""Python functions of tensors as lists of operations: recorded in the time of one call, replayed on other inputs."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_advbayes.operations import Operation, Slot, Step, in_lanes, in_place, perform, plan, rows_last
from pyro_advbayes.tracing.replay import quiet_batching

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
    :raises NotRecordable: where a Python number, an array or a shape depends on the values of an input or of a random number, where
        Python's or NumPy's random numbers are drawn, and where a tensor is written to that existed before.
    """
    recorder, others = _Recorder(inputs), _other_random_states()
    with _no_autocast_cache(), _NoArrays(recorder), recorder:
        outputs = fn(*inputs)
    if _other_random_states() != others:
        raise NotRecordable("random numbers are drawn that are not PyTorch's")
    return Tape(recorder, outputs), outputs


def _other_random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), name, keys.tobytes(), *rest


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps what it made of parameters, a copy that no later change of them reaches."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class _NoArrays(TorchFunctionMode):
    """Refuses to give the values of tensors that change to what is not PyTorch's."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVING and self._recorder.changes(args[0]):
            raise NotRecordable(f"{func.__name__} makes an array or Python numbers of values that change")
        return func(*args, **(kwargs or {}))


_LEAVING = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}


_NOTHING: frozenset[int] = frozenset()


class _Recorder(TorchDispatchMode):
    """Notes operations below autograd, where composite ones have fallen into their parts."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.constants: dict[Slot, Tensor] = {}
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
        random, reads_values, mutable = _traits(func)
        read: list[tuple[Tensor, Slot]] = []
        named_args = tuple([self._name(arg, read) for arg in args])
        named_kwargs = {name: self._name(arg, read) for name, arg in kwargs.items()} if kwargs else {}
        inputs = [slot for _, slot in read]
        memory = {slot.memory for slot in inputs}
        changing = not memory.isdisjoint(self.changing)
        if changing and reads_values and not _gathers(func, args):
            raise NotRecordable(f"{func} makes a Python number or a shape of values that change")
        writes = frozenset(_written(func, named_args, named_kwargs)) if mutable else _NOTHING
        if not writes.isdisjoint(self._outer):
            raise NotRecordable(f"{func} writes into a tensor that is older than the call")

        if func is aten.lift_fresh.default:  # torch.tensor([...]) may be written to: every replay gets its own
            func = aten.clone.default
        result = func(*args, **kwargs)
        several = isinstance(result, (tuple, list))
        outputs = [self._output(value, read) for value in (result if several else (result,))]
        operation = Operation(func, named_args, named_kwargs, inputs, outputs, several, writes, random)
        self.operations.append(operation)
        if random or changing:
            made = operation.made
            self.changing |= made
            if random or not memory.isdisjoint(self.random):
                self.random |= made
        return result

    def _name(self, arg: Any, read: list[tuple[Tensor, Slot]]) -> Any:
        """An argument with slots in place of tensors, which are noted in ``read``."""
        if isinstance(arg, Tensor):
            slot = self.slot(arg)
            read.append((arg, slot))
            return slot
        if isinstance(arg, (tuple, list)):
            return [self._name(part, read) for part in arg]
        return arg

    def changes(self, tensor: Tensor) -> bool:
        """Whether a tensor differs from replay to replay."""
        slot = self._slots.get(tensor)
        return slot is not None and slot.memory in self.changing

    def slot(self, tensor: Tensor) -> Slot:
        """A tensor's place; a tensor not seen before becomes a constant."""
        known = self._slots.get(tensor)
        return self._constant(tensor) if known is None else known

    def _constant(self, tensor: Tensor) -> Slot:
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

    def _output(self, value: Any, read: list[tuple[Tensor, Slot]]) -> Slot | None:
        if not isinstance(value, Tensor):
            return None
        for tensor, slot in read:
            if tensor is value:  # written in place
                return slot
        memory = _memory(value)
        for tensor, slot in read:
            if _memory(tensor) == memory:
                return self._new_slot(value, slot.memory)
        return self._new_slot(value)

    def _new_slot(self, tensor: Tensor, memory: int | None = None) -> Slot:
        slot = Slot(self.size, self.size if memory is None else memory, tensor.numel(), tensor.dim(), tensor.dtype)
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
        self._each: list[Operation] = []
        once: list[Operation] = []
        for operation in reversed(live):
            (once if not operation.random and recorder.changing.isdisjoint(operation.memory) else self._each).append(operation)
        self._once = plan(once, {*self._ends, *(slot.index for operation in self._each for slot in operation.inputs)})
        self._steps: dict[tuple[bool, bool], list[Step]] = {}
        self.elements = sum(s.numel for o in self._each for s in o.outputs if s is not None and s.whole)

    @property
    def _ends(self) -> set[int]:
        return {slot.index for slot in self._outputs}

    def prepare(self) -> list[Any]:
        """The values that stay the same from replay to replay, as they are now."""
        values = list(self._constants)
        perform(self._once, values)
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
        with quiet_batching():
            return torch.func.vmap(one, randomness="different")(torch.empty(count, 0), *inputs)

    def replay_all(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every operation that was recorded, needed or not: from one state of the random generators, what ``fn`` returns."""
        return self._run(plan(self._operations, self._ends), self._constants, inputs)

    def _plan_for(self, together: bool) -> list[Step]:
        key = together, torch.is_grad_enabled()
        if key not in self._steps:
            operations = self._each
            if together:
                operations = in_lanes(operations, self._changing, len(self._constants))
                operations = rows_last(operations, self._changing, self._ends)
            if not torch.is_grad_enabled():
                operations = in_place(operations, {slot.memory for slot in self._outputs}, together)
            self._steps[key] = plan(operations, self._ends)
        return self._steps[key]

    def _run(self, steps: list[Step], values: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = list(values)
        for index, tensor in zip(self._inputs, inputs, strict=True):
            values[index] = tensor
        perform(steps, values)
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
                warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # by torch.binomial
                if key in self._batched:
                    return self._batched[key].replay(self._batched[key].prepare(), inputs)
                if calls < RECORDED_CALLS and not self.lasting:
                    return together(*inputs)
                self._batched[key], piece = record(together, inputs)
                return piece
        except Exception:
            return None


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[int]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (slot.memory for slot in (value if isinstance(value, list) else [value]) if isinstance(slot, Slot))


@functools.cache
def _traits(func: Any) -> tuple[bool, bool, bool]:
    """Whether an operation draws random numbers, makes Python numbers or shapes of values, and writes into arguments."""
    tags = func.tags
    reads_values = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return torch.Tag.nondeterministic_seeded in tags, reads_values, func._schema.is_mutable


def _gathers(func: Any, args: Sequence[Any]) -> bool:
    """Whether an indexing picks rows by number, so that the shape of its result does not depend on values; a mask's does."""
    return func is aten.index.Tensor and not any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
