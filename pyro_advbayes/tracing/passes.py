"""Passes that simplify a recorded graph. None of them changes a bit of the result."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_advbayes.tracing.record import Recording, traits_of

aten = torch.ops.aten

# An aten overload costs about 2 microseconds more a call than the public function of the same name and arguments: half the time
# of a small network's step. Only operations whose two signatures agree are listed.
_FUNCTIONS = ("mm", "bmm", "addmm", "baddbmm", "dot", "addcmul", "addcdiv", "add", "sub", "mul", "div", "neg", "pow", "exp", "log",
              "log1p", "sqrt", "relu", "tanh", "sigmoid", "cat", "where", "logsumexp", "sum", "gather", "scatter_add", "index_select",
              "unsqueeze", "squeeze", "transpose", "permute", "t", "split_with_sizes")  # fmt: skip
_METHODS = ("view", "expand")

# Operations that change nothing but a shape: without effect where the shape stays the same, as vmap leaves many.
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.alias.default, aten.detach.default)


def simplify(recording: Recording) -> None:
    """
    Makes the replay of a function without autograd cheap.

    The seed of a backward pass, ``ones_like(loss)``, becomes a constant, so that a forward value which nobody reads is dead; dead nodes
    are removed; nodes that depend on nothing that changes are computed once and kept; operations that change nothing (``x - 0``,
    ``x ** 1``, a transposition undone, a view of the same shape) are dropped: with them the gradient of a Normal prior costs as much as
    weight decay written by hand.
    """
    passes = _Passes(recording)
    passes.cut_seeds()
    drop_dead(recording)
    passes.fold_constants()
    passes.drop_identities()
    drop_dead(recording)


def memory_of(nodes: Iterable[fx.Node]) -> set[int]:
    """The memory that nodes' results lie in."""
    return set().union(*[node.meta.get("memory", ()) for node in nodes])


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and traits_of(node.target).random


def live_nodes(recording: Recording) -> set[fx.Node]:
    """The nodes that the outputs need, as operands or because they write to memory that is read later."""
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
    """The public function that computes what an overload computes, in less time, where there is one."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
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
        self.written = recording.written  # also through a view: the value of a node in it is not its own

    def cut_seeds(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is aten.ones_like.default and self.written.isdisjoint(node.meta["memory"]):
                value = node.meta["val"]
                self._replace(node, torch.ones(value.shape, dtype=value.dtype, device=value.device))

    def fold_constants(self) -> None:
        """Computes the nodes that no input, live tensor, random draw or in-place write reaches, once."""
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
                # other operations than elementwise ones may read memory without a look at the strides (MKL-DNN's LSTM does)
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
        first = node.args[0] if node.args else None
        if node.target is aten.t.default and first.target is aten.t.default:
            return first.args[0]  # the shape is that of the node, whichever it is
        if node.target is aten.transpose.int and first.target is aten.transpose.int:
            return first.args[0] if _dims(node) == _dims(first) else None
        if node.target in _RESHAPES:
            return first if _alike(first, node) else None
        if node.target is aten.mul.Scalar:
            return first if node.args[1] == 1 and _alike(first, node) else None
        if node.target in (aten.sub.Tensor, aten.pow.Tensor_Scalar) and not node.kwargs:
            neutral = 0.0 if node.target is aten.sub.Tensor else 1.0
            same = isinstance(first, fx.Node) and _alike(first, node)
            return first if same and self._number(node.args[1]) == neutral else None
        if node.target is aten.mul.Tensor:
            number, factor = self._number(first), node.args[1]
            if number is None:
                number, factor = self._number(node.args[1]), first
            if number is None or not isinstance(factor, fx.Node) or not _alike(factor, node):
                return None
            if factor.target is aten.mul.Scalar and factor.args[1] == 2.0:  # doubling is exact, so it can move into the constant
                number, factor = 2.0 * number, factor.args[0]
            if number == 1.0:
                return factor
            with self.graph.inserting_before(node):
                product = self.graph.call_function(aten.mul.Scalar, (factor, number))
            product.meta.update(node.meta)
            return product
        return None

    def _number(self, arg: Any) -> float | None:
        """The one number that an argument holds, if it is a constant with one number."""
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return float(arg)
        if isinstance(arg, fx.Node) and arg.op == "get_attr" and self.changing.isdisjoint(arg.meta["memory"]):
            value = self.attributes[arg.target]
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
    """One number seen everywhere, where a constant holds one number only: it costs no memory and no pass over it."""
    if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
        return value.flatten()[0].clone().expand(value.shape)
    return value


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether one may stand for the other: no operation between them that broadcasts or promotes."""
    one, other = one.meta["val"], other.meta["val"]
    return one.shape == other.shape and one.dtype == other.dtype


def _dims(transposition: fx.Node) -> set[int]:
    rank = len(transposition.meta["val"].shape)
    return {dim % rank for dim in transposition.args[1:]}
