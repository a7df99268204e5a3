"""The recorder: one call of a Python function of tensors becomes an ``fx.Graph`` of aten operations."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Overload = type(aten.t.default)

_NOTHING: frozenset[int] = frozenset()
_NO_NODE: Any = (lambda: None, None)


class NotRecordable(RuntimeError):
    """The function's Python depends on values that change between replays, or writes into tensors that outlive the call."""


class Value(NamedTuple):
    """A node's tensor without its values, in ``node.meta["val"]``."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    whole: bool  # whether it has its own memory and is no view

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass
class Recording:
    """
    The operations of one call of a function of tensors, in their order.

    A tensor's memory has a number, the same for all its views. ``node.meta`` holds the memory of a node's results in ``"memory"``, and in
    ``"writes"`` the memory of its arguments that it writes to.

    :ivar graph: its placeholders are the inputs, its ``get_attr`` nodes the tensors that the function took from elsewhere.
    :ivar attributes: these tensors, by target.
    :ivar changing: memory whose values may differ from replay to replay: inputs, live tensors, random numbers, and what depends on them.
    :ivar moving: memory that is made in every replay: that in ``changing``, and memory that takes only its shape from there.
    :ivar random: memory whose values depend on random numbers.
    :ivar written: memory that operations write to after it was made.
    """

    graph: fx.Graph
    attributes: dict[str, Tensor]
    changing: set[int]
    moving: set[int]
    random: set[int]
    written: set[int]


def record(fn: Callable[..., Any], inputs: Sequence[Tensor], live: Sequence[Tensor] = ()) -> tuple[Recording, Any]:
    """
    Calls ``fn`` once and records every operation that it performs, below autograd and ``torch.func``. Nothing is simplified.

    :param fn: function of tensors to a tensor, or to a tuple, list or dict of tensors. Random operations stay random. Tensors from
        elsewhere (parameters, captured data) stay the same tensors.
    :param inputs: whose values, and no shapes, change from replay to replay.
    :param live: tensors from elsewhere whose values may change in place between replays.
    :return: the recording, and the result of this call.
    :raises NotRecordable: if a Python number, an array or a shape depends on the values of an input, a live tensor or a random number, if
        Python's or NumPy's random numbers are drawn, or a tensor is written to that is older than the call.
    """
    times = Counter(map(id, inputs))  # the recorder knows tensors by identity: one that is given twice must become two
    inputs = [tensor if times[id(tensor)] == 1 else tensor.view_as(tensor) for tensor in inputs]
    recorder, others = Recorder(inputs, live), _other_random_states()
    with _no_autocast_cache(), _NoArrays(recorder), recorder:
        outputs = fn(*inputs)
    if _other_random_states() != others:
        raise NotRecordable("random numbers are drawn that are not PyTorch's")
    recorder.graph.output(map_aggregate(outputs, lambda value: recorder.node(value) if isinstance(value, Tensor) else value))
    return recorder.recording(), outputs


def _other_random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), numpy["state"]["key"].tobytes(), numpy["state"]["pos"], numpy["gauss"]


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast caches its casts of parameters: a later change of the parameters would not reach these copies."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class _NoArrays(TorchFunctionMode):
    """Refuses arrays and lists of values that change, whose use no operation shows."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVING and self._recorder.changes(args[0]):
            raise NotRecordable(f"{func.__name__} makes an array or Python numbers of values that change")
        return func(*args, **(kwargs or {}))


_LEAVING = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}


class Recorder(TorchDispatchMode):
    """
    Writes operations into a graph, below autograd, where composite ones have fallen into their parts.

    :param inputs: the graph's placeholders.
    :param live: further tensors whose values may change.
    """

    def __init__(self, inputs: Sequence[Tensor], live: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        # by id, with a weak reference: activations are freed as early as without a recorder
        self._nodes: dict[int, tuple[weakref.ref, fx.Node]] = {}
        self._memories: dict[Any, int] = {}
        self._sparse: list[Tensor] = []  # held, so that no other tensor gets its id
        for i, tensor in enumerate(inputs):
            self._note(self.graph.placeholder(f"input{i}"), tensor)
        self.changing = {self._memory(tensor) for tensor in (*inputs, *live)}
        self.moving = set(self.changing)
        self.random: set[int] = set()
        self.written: set[int] = set()
        self._outer = set(self.changing)  # memory that was there before the call

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise PyTorch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        traits = traits_of(func)
        read: list[fx.Node] = []
        named_args = tuple([self._name(arg, read) if isinstance(arg, (Tensor, tuple, list)) else arg for arg in args])
        named_kwargs = {name: self._name(arg, read) for name, arg in kwargs.items()} if kwargs else {}
        memory = set().union(*[node.meta["memory"] for node in read])
        changes = traits.reads and not memory.isdisjoint(self.changing)
        if changes and traits.to_python and not self._picks_by_constants(func, args):
            raise NotRecordable(f"a Python number or a shape depends on values that change ({func})")
        writes = _written(func, named_args, named_kwargs) if traits.mutable else _NOTHING
        if not self._outer.isdisjoint(writes):
            raise NotRecordable(f"{func} writes into a tensor that is older than the call")

        if func is aten.lift_fresh.default:  # torch.tensor([...]) may be written to: every replay gets its own
            func = aten.clone.default
        result = func(*args, **kwargs) if kwargs else func(*args)
        node = self._call(func, traits.name, named_args, named_kwargs)
        self._note_results(node, result)
        node.meta["writes"] = writes
        self.written |= writes
        if traits.random or not memory.isdisjoint(self.moving):
            made = node.meta["memory"] | writes
            self.moving |= made
            if traits.random or changes:
                self.changing |= made
            if traits.random or not memory.isdisjoint(self.random):
                self.random |= made
        return result

    def recording(self) -> Recording:
        """What was recorded."""
        size = 0 if self.written else len(self.moving)
        while size < len(self.moving):  # memory may have been read before something that changes was written to it
            size = len(self.moving)
            for node in self.graph.nodes:
                if not self.moving.isdisjoint(set().union(*[n.meta.get("memory", ()) for n in (node, *node.all_input_nodes)])):
                    self.moving |= node.meta.get("memory", _NOTHING) | node.meta.get("writes", _NOTHING)
        return Recording(self.graph, self.attributes, self.changing, self.moving, self.random, self.written)

    def _call(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.create_node("call_function", func, name=name)
        node.args = args  # by themselves, since create_node looks through them for symbols, which takes as long as the rest of it
        if kwargs:
            node.kwargs = kwargs
        return node

    def _picks_by_constants(self, func: Any, args: Any) -> bool:
        """Whether an indexing has a shape that is known: its masks, if it has any, are constants."""
        return func is aten.index.Tensor and not any(self.changes(i) for i in args[1] if _is_mask(i))

    def _name(self, arg: Any, read: list[fx.Node]) -> Any:
        """An argument with nodes in place of tensors; these are added to ``read``."""
        if isinstance(arg, Tensor):
            node = self.node(arg)
            read.append(node)
            return node
        if isinstance(arg, (tuple, list)):
            return [self._name(part, read) for part in arg]
        return arg

    def changes(self, tensor: Tensor) -> bool:
        """Whether a tensor's values may differ from replay to replay."""
        try:
            return self._memories.get(_storage(tensor)) in self.changing
        except NotImplementedError:  # a tensor under a transform of torch.func has no storage to look at
            return False

    def node(self, tensor: Tensor) -> fx.Node:
        """A tensor's node; a tensor not seen before becomes an attribute."""
        reference, known = self._nodes.get(id(tensor), _NO_NODE)
        return known if reference() is tensor else self._unknown(tensor)

    def _unknown(self, tensor: Tensor) -> fx.Node:
        if _storage(tensor) not in self._memories:
            self._outer.add(self._memory(tensor))
        elif self._memory(tensor) not in self._outer:
            raise NotRecordable("a tensor was made from another's memory without an operation")
        target = f"held{len(self.attributes)}"
        self.attributes[target] = tensor
        return self._note(self.graph.create_node("get_attr", target, name=target), tensor)

    def _note_results(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            self._note(node, result)
            return
        memory: set[int] = set()
        for i, part in enumerate(result if isinstance(result, (tuple, list)) else ()):
            if isinstance(part, Tensor):
                item = self._note(self._call(operator.getitem, "item", (node, i)), part)
                memory |= item.meta["memory"]
        node.meta["memory"] = frozenset(memory)

    def _note(self, node: fx.Node, tensor: Tensor) -> fx.Node:
        count = len(self._memories)
        memory = self._memory(tensor)
        node.meta["val"] = Value(tensor.shape, tensor.dtype, tensor.device, memory == count)
        node.meta["memory"], node.meta["writes"] = frozenset((memory,)), _NOTHING
        if self._nodes.get(id(tensor), _NO_NODE)[0]() is not tensor:  # else it was written in place, and stays the node that it was
            self._nodes[id(tensor)] = weakref.ref(tensor), node
        return node

    def _memory(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        if tensor.layout is not torch.strided:
            self._sparse.append(tensor)
        return self._memories.setdefault(_storage(tensor), len(self._memories))


def _storage(tensor: Tensor) -> Any:
    """Key of a tensor's storage. The reference is weak, so that activations are freed; while it is held, no other storage gets the key."""
    return StorageWeakRef(tensor.untyped_storage()) if tensor.layout is torch.strided else id(tensor)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class Traits(NamedTuple):
    """Properties of an operation."""

    name: str
    random: bool
    to_python: bool  # makes Python numbers or shapes of values
    mutable: bool
    reads: bool  # more of its arguments than shape and dtype


@functools.cache
def traits_of(func: Any) -> Traits:
    """The traits of an overload of an operation."""
    name = func._schema.name.split("::")[1]
    to_python = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    reads = not (name.startswith("new_") or name.endswith("_like"))
    return Traits(name, torch.Tag.nondeterministic_seeded in func.tags, to_python, func._schema.is_mutable, reads)


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
    """The memory that an operation on nodes writes to."""
    written: set[int] = set()
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            parts = value if isinstance(value, (tuple, list)) else [value]
            written.update(*[part.meta["memory"] for part in parts if isinstance(part, fx.Node)])
    return written
