"""The calls of an interpreter for the nodes of a graph, and rearrangements of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, ops

from pyro_advbayes.tracing.passes import call_directly, is_random, memory_of

aten = ops.aten


class Call(NamedTuple):
    """How a node is computed."""

    node: fx.Node
    function: Callable[..., Any]
    args: Sequence[Any]  # nodes in place of tensors
    kwargs: dict[str, Any]
    reads: list[fx.Node]
    made: set[int]  # memory that it writes
    memory: set[int]  # all memory that it reads or makes


class Step(NamedTuple):
    """A call in the form that runs fastest: its Python takes as long as a small network."""

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    places: list[tuple[int, int]]  # which of args is which of the values
    nested: list[int]  # which of args have such values inside
    keywords: list[str]  # and which of kwargs
    output: int
    items: list[tuple[int, int]] | None  # of a result with several tensors, which one goes where
    last: list[int]  # values that no later call reads


Places = dict[fx.Node, int]


def calls_of(nodes: Iterable[fx.Node]) -> list[Call]:
    """The calls for some nodes of a graph, in their order; an item of a result comes with the result."""
    calls = []
    for node in nodes:
        if callable(node.target) and node.target is not operator.getitem:
            reads, made = node.all_input_nodes, node.meta["memory"] | node.meta["writes"]
            calls.append(Call(node, node.target, node.args, node.kwargs, reads, made, made | memory_of(reads)))
    return calls


def _is_several(node: fx.Node) -> bool:
    return "val" not in node.meta


def _results(node: fx.Node) -> Collection[fx.Node]:
    """The nodes of the tensors that a call makes."""
    return node.users if _is_several(node) else (node,)


def plan(calls: Sequence[Call], keep: Iterable[fx.Node], places: Places) -> list[Step]:
    """
    The calls, with the values that each reads for the last time, so that memory is freed as early as in Python.

    :param keep: nodes whose values are needed afterwards.
    :param places: places of nodes' values in the list of :func:`perform`.
    """
    steps: list[Step] = []
    kept = {places[node] for node in keep}
    for call in reversed(calls):
        items = [(node.args[1], places[node]) for node in call.node.users] if _is_several(call.node) else None
        last = {places[node] for node in (*call.reads, *_results(call.node))} - kept
        kept |= last
        at = [(i, places[arg]) for i, arg in enumerate(call.args) if type(arg) is fx.Node]
        nested = [i for i, arg in enumerate(call.args) if type(arg) is not fx.Node and _has_node(arg)]
        args = [_numbered(arg, places) if i in nested else arg for i, arg in enumerate(call.args)]
        keywords = [name for name, arg in call.kwargs.items() if _has_node(arg)]
        kwargs = {name: _numbered(arg, places) if name in keywords else arg for name, arg in call.kwargs.items()}
        steps.append(Step(_fastest(call.function), args, kwargs, at, nested, keywords, places[call.node], items, list(last)))
    return steps[::-1]


@functools.cache
def _fastest(function: Any) -> Any:
    function = call_directly(function)
    return getattr(function, "_op", function)  # without the Python around an overload


def perform(steps: list[Step], values: list[Any]) -> None:
    """
    :param steps: from :func:`plan`.
    :param values: a tensor in the place of every node that is read before a step makes it; results are put into their places.
    """
    for function, args, kwargs, places, nested, keywords, output, items, last in steps:
        args = args.copy()
        for i, place in places:
            args[i] = values[place]
        for i in nested:
            args[i] = _fill(args[i], values)
        if keywords:
            kwargs = {name: _fill(arg, values) if name in keywords else arg for name, arg in kwargs.items()}
        result = function(*args, **kwargs)
        if items is None:
            values[output] = result
        else:
            for i, place in items:
                values[place] = result[i]
        for place in last:
            values[place] = None


class _Place(int):
    """The number of a value inside an argument."""


def _has_node(arg: Any) -> bool:
    return type(arg) is fx.Node or (isinstance(arg, (tuple, list)) and any(map(_has_node, arg)))


def _numbered(arg: Any, places: Places) -> Any:
    if type(arg) is fx.Node:
        return _Place(places[arg])
    return [_numbered(part, places) for part in arg] if isinstance(arg, (tuple, list)) else arg


def _fill(arg: Any, values: list[Any]) -> Any:
    if type(arg) is _Place:
        return values[arg]
    return [_fill(part, values) for part in arg] if type(arg) is list else arg


def _threshold_backward_(gradient: Tensor, result: Tensor, threshold: float) -> Tensor:
    if gradient.stride() != result.stride():  # later operations rely on the layout of new memory
        return aten.threshold_backward.default(gradient, result, threshold)
    return aten.threshold_backward.grad_input(gradient, result, threshold, grad_input=gradient)


_IN_PLACE = {  # the form of an operation that overwrites its first argument
    aten.relu.default: aten.relu_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.exp.default: aten.exp_.default,
}
_IN_PLACE_ALONE = {aten.threshold_backward.default: _threshold_backward_}  # vmap does not know this form

# Views that hold every number of their argument once: a write into them writes no number twice.
_REARRANGED = {aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten._unsafe_view.default, aten.detach.default}


def in_place(calls: Sequence[Call], kept: set[int], together: bool) -> list[Call]:
    """
    Lets an activation (or its derivative) overwrite its argument if that is not read again: new memory, which the system hands out page
    by page, costs more than the activation.
    """
    made: set[int] = set()
    entire: set[fx.Node] = set()  # nodes that hold every number of their memory once
    for call in calls:
        made |= call.made
        rearranged = call.function in _REARRANGED and call.reads[0] in entire
        entire.update(node for node in _results(call.node) if rearranged or _is_whole(node))
    functions = _IN_PLACE if together else _IN_PLACE | _IN_PLACE_ALONE
    result: list[Call] = []
    later = set(kept)
    for call in reversed(calls):
        if call.function in functions:
            argument, others = call.reads[0], call.args[1:]
            needed = later | memory_of(other for other in others if type(other) is fx.Node)
            same = argument.meta["val"].dtype == call.node.meta["val"].dtype
            if same and argument in entire and argument.meta["memory"] <= made - needed:
                call = call._replace(function=functions[call.function])
        later |= call.memory
        result.append(call)
    return result[::-1]


def _is_whole(node: fx.Node) -> bool:
    return "val" in node.meta and node.meta["val"].whole


def numbers_made(calls: Iterable[Call]) -> int:
    """How many numbers calls write into new memory."""
    return sum(node.meta["val"].numel for call in calls for node in _results(call.node) if _is_whole(node))


def in_lanes(calls: Sequence[Call], moving: set[int], lane: fx.Node) -> list[Call]:
    """
    Gives every replay its own memory for what differs between replays: noise that is written into an empty tensor, say.

    :param moving: memory that differs from replay to replay.
    :param lane: a node that differs between the replays that are computed together.
    """
    result = []
    for call in calls:
        fixed = not is_random(call.node) and moving.isdisjoint(memory_of(call.reads))
        if fixed and any(_is_whole(node) and not moving.isdisjoint(node.meta["memory"]) for node in _results(call.node)):
            args = (lane, call.function, call.args, call.kwargs)
            call = call._replace(function=_own, args=args, kwargs={}, reads=[*call.reads, lane])
        result.append(call)
    return result


def _own(lane: Tensor, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    value = function(*args, **kwargs)
    own = lane.new_empty(value.shape, dtype=value.dtype, device=value.device)
    return own if function is aten.empty.memory_format else own.copy_(value)


# Up to this number of weights a row of input, rows last are faster. One CPU core, time with rows last / without:
# 784-20-20-10 at 100 rows (157 weights a row) 0.82, 784-100-100-10 at 1000 rows (78) 0.84, at 100 rows (784) 1.17, 784-400-400-10 at
# 100 rows (3136) 1.18.
WEIGHTS_A_ROW = 256


def rows_last(calls: Sequence[Call], moving: set[int], ends: Collection[fx.Node]) -> list[Call]:
    """
    Rewrites small linear layers whose weights change as ``[out, in] @ [in, rows]``, which is faster side by side: one product for all
    replays if the rows are the same, with the many rows contiguous in memory.
    """
    layers = {call.node for call in calls if _is_layer(call, moving)}
    sizes = [[arg.meta["val"] for arg in layer.args[-2:] if isinstance(arg, fx.Node)] for layer in layers]
    if any(weight.numel > WEIGHTS_A_ROW * rows.shape[0] for rows, weight in sizes):
        return [call._replace(function=_addmm_rows_first) if call.node in layers and len(call.args) == 3 else call for call in calls]
    written = set().union(*[call.node.meta["writes"] for call in calls])
    result = []
    for call in calls:
        if call.function is aten.view.default and written.isdisjoint(call.args[0].meta["memory"]):
            call = call._replace(function=aten.reshape.default)  # what was in order one by one need not be so here
        if call.node in layers:
            *others, weight = call.args
            args = (*others, weight.args[0])
            call = call._replace(function=_addmm if len(others) == 2 else _mm, args=args, reads=list(args))
        result.append(call)
    read = {*ends, *(node for call in result for node in call.reads)}
    return [call for call in result if call.function is not aten.t.default or call.node in read]


def _is_layer(call: Call, moving: set[int]) -> bool:
    """Whether a call is a linear layer's, with weights that change, and a bias for each output if any."""
    if call.function not in (aten.addmm.default, aten.mm.default) or call.kwargs:
        return False
    *biases, _, weight = call.args
    changes = weight.target is aten.t.default and not moving.isdisjoint(weight.meta["memory"])
    return changes and all(len(bias.meta["val"].shape) == 1 for bias in biases)


def _addmm(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return weight.mm(rows.t()).add_(bias.unsqueeze(1)).t()


def _addmm_rows_first(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return rows.mm(weight).add_(bias)  # vmap's own rule for addmm multiplies the bias by 1, and adds into new memory


def _mm(rows: Tensor, weight: Tensor) -> Tensor:
    return weight.mm(rows.t()).t()
