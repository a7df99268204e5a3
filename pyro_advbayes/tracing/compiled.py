"""The executor for the longest use: a recording that PyTorch's Inductor compiles into machine code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.tracing.replay import trace_graph


def compile_graph(
    fn: Callable[..., Any], example_inputs: Sequence[Tensor], overwritten: Sequence[int], live: Sequence[Tensor] = ()
) -> Callable[..., Sequence[Tensor]]:
    """
    Records a function and compiles the recording. What ``torch.compile`` puts in front of such code at every call, guards of shapes and of
    Python values, takes longer than a small network; here shapes are those of the example, and nothing checks them.

    :param fn: function of tensors to a tuple: its results, and after them the values that are to be written over some of its inputs.
    :param example_inputs: one tensor per argument; not changed.
    :param overwritten: places of these inputs, in the order of their values.
    :param live: as for :func:`~pyro_advbayes.tracing.replay.trace_graph`.
    :return: a function of tensors to the results, without gradients.
    :raises Exception: whatever PyTorch's compiler raises, where there is no C++ compiler or it does not know an operation.
    """
    graph = trace_graph(fn, example_inputs, live)
    *nodes, output = graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    values = list(output.args[0])
    with graph.graph.inserting_before(output):
        for place, value in zip(overwritten, values[len(values) - len(overwritten) :], strict=True):
            graph.graph.call_function(torch.ops.aten.copy_.default, (inputs[place], value))
    output.args = (tuple(values[: len(values) - len(overwritten)]),)
    graph.recompile()
    # private, and without a public way: torch.compile() has none that leaves Dynamo out
    from torch._inductor import compile as compile_recording  # slow to import

    with torch.no_grad():
        return compile_recording(graph, [tensor.clone() for tensor in example_inputs])
