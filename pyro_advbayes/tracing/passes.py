"""Passes that simplify a recorded graph. None of them changes a bit of the result."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_advbayes.tracing.record import Overload, Recording, traits_of

aten = torch.ops.aten

# An aten overload costs about 2 microseconds more a call than the public function of the same name and arguments: half the time
# of a small network's step. Only operations whose two signatures agree are listed.
_FUNCTIONS = ("mm", "bmm", "addmm", "baddbmm", "dot", "addcmul", "addcdiv", "add", "sub", "mul", "div", "neg", "pow", "exp", "log",
              "log1p", "sqrt", "relu", "tanh", "sigmoid", "cat", "where", "logsumexp", "sum", "gather", "scatter_add", "index_select",
              "unsqueeze", "squeeze", "transpose", "permute", "t", "split_with_sizes")  # fmt: skip
_METHODS = ("view", "expand")

# Operations that change only a shape: without effect if the shape stays the same, as often under vmap.
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.alias.default, aten.detach.default)


def simplify(recording: Recording) -> None:
    """
    Makes the replay of a function without autograd cheap.

    The seed of a backward pass, ``ones_like(loss)``, becomes a constant, so that a forward value without a reader is dead. Dead nodes are
    removed. Nodes that depend on nothing that changes are computed once. Operations that change nothing (``x - 0``, ``x ** 1``, a
    transposition undone, a view of the same shape) are dropped: without them, the gradient of a Normal prior costs as much as weight decay
    written by hand.
    """
    passes = _Passes(recording)
    passes.cut_seeds()
    drop_dead(recording)
    passes.fold_constants()
    passes.drop_identities()
    drop_dead(recording)


def memory_of(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory of nodes' results."""
    return set().union(*[node.meta.get("memory", ()) for node in nodes])


def operand(node: fx.Node) -> fx.Node | None:
    """The first argument of a node, if that is a node."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return isinstance(node.target, Overload) and traits_of(node.target).random


def live_nodes(recording: Recording) -> set[fx.Node]:
    """The nodes that the outputs depend on, through operands or through writes to memory."""
    live: set[fx.Node] = set()
    memory: set[int] = set()
    for node in reversed(recording.graph.nodes):
        if node.op == "output" or node in live or not memory.isdisjoint(node.meta["writes"]):
            live.add(node)
            live.update(node.all_input_nodes)
            if recording.written:
                memory |= memory_of((node, *node.all_input_nodes))
    return live


def drop_dead(recording: Recording) -> None:
    """Removes what is not in :func:`live_nodes`, except for placeholders."""
    live = live_nodes(recording)
    for node in reversed(recording.graph.nodes):
        if node not in live and node.op != "placeholder":
            recording.graph.erase_node(node)


@functools.cache
def call_directly(target: Any) -> Any:
    """The public function that computes the same as an overload in less time, if there is one."""
    if isinstance(target, Overload) and target.namespace == "aten":
        name = traits_of(target).name
        if name in _FUNCTIONS:
            return getattr(torch, name)
        if name in _METHODS:
            return getattr(Tensor, name)
    return target


class _Passes:
    """The passes over one recording."""

    def __init__(self, recording: Recording) -> None:
        self.graph, self.attributes, self.changing = recording.graph, recording.attributes, recording.changing
        self.written = recording.written  # through views, too: a node in it does not keep its value

    def cut_seeds(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is aten.ones_like.default and self.written.isdisjoint(node.meta["memory"]):
                value = node.meta["val"]
                self._replace(node, torch.ones(value.shape, dtype=value.dtype, device=value.device))

    def fold_constants(self) -> None:
        """Computes the nodes that depend on no input, live tensor, random number or in-place write."""
        known: dict[fx.Node, Any] = {}
        for node in list(self.graph.nodes):
            if not self.written.isdisjoint(node.meta.get("memory", ())):
                continue
            if node.op == "get_attr" and self.changing.isdisjoint(node.meta["memory"]):
                known[node] = self.attributes[node.target]
            elif node.op == "call_function" and not (is_random(node) or node.meta["writes"]):
                if all(arg in known for arg in node.all_input_nodes):
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                    known[node] = node.target(*args, **kwargs)
        for node in list(known):
            read_on = any(user not in known for user in node.users)
            if node.op == "call_function" and isinstance(known[node], Tensor) and read_on:
                value = known[node].detach()
                # operations that are not elementwise may ignore strides (MKL-DNN's LSTM does)
                elementwise = all(torch.Tag.pointwise in getattr(user.target, "tags", ()) for user in node.users)
                self._replace(node, _shrink(value) if elementwise else value)

    def drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            reads = (node, *node.all_input_nodes, *(arg for read in node.all_input_nodes for arg in read.all_input_nodes))
            kept = self._identical(node) if not self.written or self.written.isdisjoint(memory_of(reads)) else None
            if kept is not None:
                node.replace_all_uses_with(kept)
                self.graph.erase_node(node)

    def _identical(self, node: fx.Node) -> fx.Node | None:
        """A node with the same value to the bit, made from fewer operations; None if there is none."""
        first = operand(node)
        if first is None:
            return self._scaled(node) if node.target is aten.mul.Tensor else None
        if node.target is aten.t.default and first.target is aten.t.default:
            return operand(first)  # the shape is that of the node, whichever it is
        if node.target is aten.transpose.int and first.target is aten.transpose.int:
            return operand(first) if _dims(node) == _dims(first) else None
        if node.target in _RESHAPES:
            return first if _alike(first, node) else None
        if node.target is aten.mul.Scalar:
            return first if node.args[1] == 1 and _alike(first, node) else None
        if node.target in (aten.sub.Tensor, aten.pow.Tensor_Scalar) and not node.kwargs:
            neutral = 0.0 if node.target is aten.sub.Tensor else 1.0
            return first if _alike(first, node) and self._number(node.args[1]) == neutral else None
        return self._scaled(node) if node.target is aten.mul.Tensor else None

    def _scaled(self, node: fx.Node) -> fx.Node | None:
        """A product with a constant number as a product with that number; None for other products."""
        first, factor = node.args
        number = self._number(first)
        if number is None:
            number, factor = self._number(factor), first
        if number is None or not isinstance(factor, fx.Node) or not _alike(factor, node):
            return None
        doubled = operand(factor) if factor.target is aten.mul.Scalar and factor.args[1] == 2.0 else None
        if doubled is not None:  # doubling is exact, so it can move into the constant
            number, factor = 2.0 * number, doubled
        if number == 1.0:
            return factor
        with self.graph.inserting_before(node):
            product = self.graph.call_function(aten.mul.Scalar, (factor, number))
        product.meta.update(node.meta)
        return product

    def _number(self, arg: Any) -> float | None:
        """The number of an argument that is a number, or a constant with one number everywhere."""
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return float(arg)
        if isinstance(arg, fx.Node) and arg.op == "get_attr" and self.changing.isdisjoint(arg.meta["memory"]):
            value = self.attributes[str(arg.target)]
            if value.is_floating_point() and value.numel() and not any(value.stride()):
                return value.flatten()[0].item()
        return None

    def _replace(self, node: fx.Node, value: Tensor) -> None:
        """Puts a constant in a node's place."""
        target = f"constant{len(self.attributes)}"
        self.attributes[target] = value
        with self.graph.inserting_before(node):
            constant = self.graph.create_node("get_attr", target, name=target)
        constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
        self.graph.erase_node(node)


def _shrink(value: Tensor) -> Tensor:
    """A constant with one number everywhere as a view of that number, which needs no memory and no pass over it."""
    if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
        return value.flatten()[0].clone().expand(value.shape)
    return value


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether one may replace the other: the operation between them neither broadcasts nor promotes."""
    ours, theirs = one.meta["val"], other.meta["val"]
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype


def _dims(transposition: fx.Node) -> set[int]:
    rank = len(transposition.meta["val"].shape)
    return {dim % rank for dim in transposition.args[1:] if isinstance(dim, int)}
