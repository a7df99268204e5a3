"""Python functions of tensors as flat graphs: traced once by ``make_fx``, simplified, replayed without their Python."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# An aten overload costs about 2 microseconds more a call than the public function of the same name and arguments: half the time
# of a small network's step. Only operations whose two signatures agree are listed.
_FUNCTIONS = ("mm", "bmm", "addmm", "baddbmm", "dot", "addcmul", "addcdiv", "add", "sub", "mul", "div", "neg", "pow", "exp", "log",
              "log1p", "sqrt", "relu", "tanh", "sigmoid", "cat", "where", "logsumexp", "sum", "gather", "scatter_add", "index_select",
              "unsqueeze", "squeeze", "transpose", "permute", "t", "split_with_sizes")  # fmt: skip
_METHODS = ("view", "expand")

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

# Operations that change nothing but a shape: without effect where the shape stays the same, as vmap leaves many.
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.alias.default, aten.detach.default)


def trace_graph(fn: Callable[..., Any], example_inputs: Sequence[Tensor], live: Sequence[Tensor] = ()) -> fx.GraphModule:
    """
    Traces ``fn`` on example inputs into a graph of aten operations that computes the same numbers for other inputs of the same
    shapes, dtypes and device, without the Python that ``fn`` consists of (Pyro's handlers, ``torch.func`` transforms).

    Four passes make the replay cheap, and none of them changes a bit of the result. The seed of a backward pass,
    ``ones_like(loss)``, becomes a constant, so that a forward value which nobody reads is dead; dead nodes are removed; nodes
    that depend on no input are computed once and kept; operations that change nothing (``x - 0``, ``x ** 1``, a transposition
    undone, a view of the same shape) are dropped: with them the gradient of a Normal prior costs as much as weight decay written by hand.

    :param fn: function of tensors to a tensor, or to a tuple or dict of tensors; random operations stay random.
    :param example_inputs: one tensor per argument.
    :param live: tensors that ``fn`` takes from elsewhere and whose values change in place: nothing that depends on them is kept.
    :raises RuntimeError: where ``fn`` takes a Python number (``.item()``, a branch) or a shape (``torch.unique``, a mask's rows) from
        the values of inputs, live tensors or random numbers.
    """
    # the tracer knows tensors by identity: the one given twice, or one that fn holds as well, would be one input everywhere
    example_inputs = [tensor.detach() for tensor in example_inputs]

    def followed(*inputs: Tensor) -> Any:
        with Followed([*inputs, *live]):
            return fn(*inputs)

    with torch.no_grad():
        module = make_fx(followed)(*example_inputs)
    written, changing = _written(module.graph), {_memory(tensor) for tensor in live}
    _cut_seeds(module, written)
    module.graph.eliminate_dead_code(_is_impure)
    _fold_constants(module, written, changing)
    _drop_identities(module, written, changing)
    module.graph.eliminate_dead_code(_is_impure)
    _call_directly(module.graph)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


@contextlib.contextmanager
def quiet_batching() -> Iterator[None]:
    """Within it, ``vmap`` does not warn of an operation that it computes in a loop: there is nothing that a user could do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


class Followed(TorchDispatchMode):
    """
    Notes which tensors follow the values of some others, or random numbers: ``tensor in followed``.

    :param sources: tensors that may have other values another time.
    :raises RuntimeError: within it, where a Python number or a shape is made of values that may differ.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        super().__init__()
        self._memories: set[Any] = set()
        self._kept: list[Tensor] = []
        self._note(sources)

    def __contains__(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._memories

    def _note(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._memories.add(_memory(tensor))
                if tensor.layout is not torch.strided:
                    self._kept.append(tensor)  # so that no other one gets its id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # of an indexing only masks make the shape
        shaping = (
            [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            if func is aten.index.Tensor
            else (args, kwargs)
        )
        if (torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags) and self._reach(shaping):
            raise RuntimeError(f"a Python number or a shape follows values that change ({func})")
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        reads = not (name.startswith("new_") or name.endswith("_like"))  # more than shape and dtype
        if torch.Tag.nondeterministic_seeded in func.tags or (reads and self._reach((args, kwargs))):
            self._note(tree_leaves(result))
        return result

    def _reach(self, arguments: Any) -> bool:
        return any(isinstance(value, Tensor) and value in self for value in tree_leaves(arguments))


def _memory(tensor: Tensor) -> Any:
    """
    The same for all views of one tensor, and of no other one as long as this is held; it does not hold the numbers, of which a trace makes
    several times the size of a state.
    """
    return StorageWeakRef(tensor.untyped_storage()) if tensor.layout is torch.strided else id(tensor)


def autocast_state() -> list[tuple[str, torch.dtype]]:
    """Where autocast casts, and to what: a graph has it as it was."""
    return [(device, torch.get_autocast_dtype(device)) for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]


def roots_of(model: Callable) -> list[nn.Module]:
    """The module that a model is, or is a method of, as far as that shows from outside: :func:`noting_modules` finds the others."""
    model = poutine.unwrap(model)
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


@contextlib.contextmanager
def noting_modules(roots: list[nn.Module]) -> Iterator[None]:
    """Within it, modules that run and are in none of ``roots`` are added to them: a function may use networks from elsewhere."""
    known = {module for root in roots for module in root.modules()}

    def note(module: nn.Module, _: Any) -> None:
        if module not in known:
            roots.append(module)
            known.update(module.modules())

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def held_by(roots: Sequence[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]


def _tags(node: fx.Node) -> Sequence[torch.Tag]:
    return node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in _tags(node)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or _mutates(node)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory an in-place operation writes to, also through a view: their values are not theirs alone."""
    memory: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = _source(node)
        memory[node] = node if source is None else memory[source]
    targets = {memory[arg] for node in graph.nodes if _mutates(node) for arg in node.all_input_nodes}
    return {node for node, owner in memory.items() if owner in targets}


def _source(node: fx.Node) -> fx.Node | None:
    """The node whose memory this node's output shares, if any."""
    if node.target is operator.getitem:
        return node.args[0]
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and isinstance(value, fx.Node):
                return value
    return None


def _cut_seeds(module: fx.GraphModule, written: set[fx.Node]) -> None:
    for node in list(module.graph.nodes):
        if node.target is aten.ones_like.default and node not in written:
            value = node.meta["val"]
            _make_constant(module, node, torch.ones(value.shape, dtype=value.dtype, device=value.device))


def _fold_constants(module: fx.GraphModule, written: set[fx.Node], changing: set[Any]) -> None:
    """Computes the nodes that no input, random draw or in-place write reaches, once."""
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and node not in written:
            value = _attribute(module, node.target)
            if not (isinstance(value, Tensor) and _memory(value) in changing):
                known[node] = value
        elif node.op == "call_function" and not (_is_random(node) or _mutates(node) or node in written):
            if all(arg in known for arg in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    for node in list(known):
        read_on = any(user not in known for user in node.users)
        if node.op == "call_function" and isinstance(known[node], Tensor) and read_on:
            value = known[node].detach()
            # other operations than elementwise ones may read memory without a look at the strides (MKL-DNN's LSTM does)
            elementwise = all(torch.Tag.pointwise in _tags(user) for user in node.users)
            _make_constant(module, node, _shrink(value) if elementwise else value)


def _shrink(value: Tensor) -> Tensor:
    """One number seen everywhere, where a constant holds one number only: it costs no memory and no pass over it."""
    if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
        return value.flatten()[0].clone().expand(value.shape)
    return value


def _number(module: fx.GraphModule, arg: Any, changing: set[Any]) -> float | None:
    """The one number that an argument holds, if it is a constant with one number."""
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    if isinstance(arg, fx.Node) and arg.op == "get_attr":
        value = _attribute(module, arg.target)
        if not isinstance(value, Tensor) or _memory(value) in changing:
            return None
        if value.is_floating_point() and value.numel() and not any(value.stride()):
            return value.flatten()[0].item()
    return None


def _drop_identities(module: fx.GraphModule, written: set[fx.Node], changing: set[Any]) -> None:
    for node in list(module.graph.nodes):
        reads = {node, *node.all_input_nodes, *(arg for read in node.all_input_nodes for arg in read.all_input_nodes)}
        kept = None if reads & written else _identical(module, node, changing)
        if kept is not None:
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether one may stand for the other: no operation between them that broadcasts or promotes."""
    one, other = one.meta["val"], other.meta["val"]
    return one.shape == other.shape and one.dtype == other.dtype


def _identical(module: fx.GraphModule, node: fx.Node, changing: set[Any]) -> fx.Node | None:
    """A node with the same value to the bit, made from fewer operations; None if there is none."""
    if node.target is aten.t.default and node.args[0].target is aten.t.default:
        return node.args[0].args[0]  # the shape is that of the node, whichever it is
    if node.target is aten.transpose.int and node.args[0].target is aten.transpose.int:
        same_dims = _dims(node) == _dims(node.args[0])
        return node.args[0].args[0] if same_dims else None
    if node.target in _RESHAPES:
        return node.args[0] if _alike(node.args[0], node) else None
    if node.target is aten.mul.Scalar:
        return node.args[0] if node.args[1] == 1 and _alike(node.args[0], node) else None
    if node.target in (aten.sub.Tensor, aten.pow.Tensor_Scalar) and not node.kwargs:
        neutral = 0.0 if node.target is aten.sub.Tensor else 1.0
        same = isinstance(node.args[0], fx.Node) and _alike(node.args[0], node)
        return node.args[0] if same and _number(module, node.args[1], changing) == neutral else None
    if node.target is aten.mul.Tensor:
        number, factor = _number(module, node.args[0], changing), node.args[1]
        if number is None:
            number, factor = _number(module, node.args[1], changing), node.args[0]
        if number is None or not isinstance(factor, fx.Node) or not _alike(factor, node):
            return None
        if factor.target is aten.mul.Scalar and factor.args[1] == 2.0:  # doubling is exact, so it can move into the constant
            number, factor = 2.0 * number, factor.args[0]
        if number == 1.0:
            return factor
        with module.graph.inserting_before(node):
            product = module.graph.call_function(aten.mul.Scalar, (factor, number))
        product.meta["val"] = node.meta["val"]
        return product
    return None


def _dims(transposition: fx.Node) -> set[int]:
    rank = transposition.meta["val"].dim()
    return {dim % rank for dim in transposition.args[1:]}


def _attribute(module: torch.nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _make_constant(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    index = sum(name.startswith("_folded") for name, _ in module.named_buffers())
    module.register_buffer(f"_folded{index}", value, persistent=False)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(f"_folded{index}")
    constant.meta["val"] = value
    node.replace_all_uses_with(constant)
    module.graph.erase_node(node)


def _call_directly(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            name = node.target._schema.name.removeprefix("aten::")
            if name in _FUNCTIONS:
                node.target = getattr(torch, name)
            elif name in _METHODS:
                node.target = getattr(Tensor, name)
