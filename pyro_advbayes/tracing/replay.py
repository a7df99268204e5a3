"""What computes a recorded graph: generated code, for a function that runs for hours."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_advbayes.tracing.passes import call_directly, simplify
from pyro_advbayes.tracing.record import Recording, record


def trace_graph(fn: Callable[..., Any], example_inputs: Sequence[Tensor], live: Sequence[Tensor] = ()) -> fx.GraphModule:
    """
    Traces ``fn`` on example inputs into a graph of aten operations that computes the same numbers for other inputs of the same
    shapes, dtypes and device, without the Python that ``fn`` consists of (Pyro's handlers, ``torch.func`` transforms) and without autograd.

    :param fn: function of tensors to a tensor, or to a tuple or dict of tensors; random operations stay random.
    :param example_inputs: one tensor per argument.
    :param live: tensors that ``fn`` takes from elsewhere and whose values change in place: nothing that depends on them is kept.
    :raises NotRecordable: where ``fn`` takes a Python number (``.item()``, a branch), an array or a shape (``torch.unique``, a mask's rows)
        from the values of inputs, live tensors or random numbers, or writes into tensors that are older than the call.
    """
    with torch.no_grad():
        recording, _ = record(fn, [tensor.detach() for tensor in example_inputs], live)
        simplify(recording)
    return generate(recording)


def generate(recording: Recording) -> fx.GraphModule:
    """A recording as Python code. Writing and compiling it takes as long as some hundred calls of the interpreter."""
    for node in recording.graph.nodes:
        if node.op == "call_function":
            node.target = call_directly(node.target)
    return fx.GraphModule(recording.attributes, recording.graph)


@contextlib.contextmanager
def quiet_batching() -> Iterator[None]:
    """Within it, ``vmap`` does not warn of an operation that it computes in a loop: there is nothing that a user could do about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
