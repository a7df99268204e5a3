"""Two executors of a recorded graph: an interpreter for short use, and generated code for hours of use."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_advbayes.tracing.calls import Step, calls_of, in_lanes, in_place, numbers_made, perform, plan, rows_last
from pyro_advbayes.tracing.passes import call_directly, is_random, live_nodes, memory_of, simplify
from pyro_advbayes.tracing.record import Recording, record

# Recording a batched call takes as long as the Python of so many calls of vmap: 3 ms against 0.4 ms.
RECORDED_CALLS = 8

# How many numbers the draws of one call make: with fewer, Python takes the time; more need memory without being faster, and
# convolutions become slower. One CPU core, ms a draw: 784-100-100-10 at 100 inputs one by one 0.93, together 0.38
# (2^19 numbers), 0.29 (2^21), 0.27 (2^23); two 3x3 convolutions of 64 channels at 100 16x16 images, which make 2^23 numbers a
# draw, one by one 25, sixteen together 65.
NUMBERS_TOGETHER = 2**21

# Largest number of weights for which chains side by side (one batched product) beat one after the other on a CPU; with
# convolutions they never do. Two cores, batch 100, time side by side / one by one: 2-20-20-2 0.33 (5 chains) and 0.13 (20), 3 x 100
# 0.50 and 0.39, 3 x 300 0.79 and 0.71, 784-400-400-10 0.85 and 0.98; see tests/benchmarks.
SIDE_BY_SIDE_WEIGHTS = 500_000


def trace_graph(fn: Callable[..., Any], example_inputs: Sequence[Tensor], live: Sequence[Tensor] = ()) -> fx.GraphModule:
    """
    Traces ``fn`` on example inputs into a graph of aten operations that computes the same numbers for other inputs of the same shapes,
    dtypes and device, without the Python of ``fn`` (Pyro's handlers, ``torch.func`` transforms) and without autograd.

    :param fn: function of tensors to a tensor, or to a tuple or dict of tensors; random operations stay random.
    :param example_inputs: one tensor per argument.
    :param live: tensors from elsewhere whose values change in place: results that depend on them are not constants.
    :raises NotRecordable: if ``fn`` takes a Python number (``.item()``, a branch), an array or a shape (``torch.unique``, a mask's rows)
        from the values of inputs, live tensors or random numbers, or writes into tensors that are older than the call.
    """
    with torch.no_grad():
        recording, _ = record(fn, [tensor.detach() for tensor in example_inputs], live)
        simplify(recording)
    return generate(recording)


def generate(recording: Recording) -> fx.GraphModule:
    """A recording as Python code, which takes as long to make as some hundred calls of the interpreter."""
    for node in recording.graph.nodes:
        if node.op == "call_function":
            node.target = call_directly(node.target)
    return fx.GraphModule(recording.attributes, recording.graph)


@contextlib.contextmanager
def quiet_batching() -> Iterator[None]:
    """Within it, ``vmap`` does not warn of operations that it computes in a loop: users cannot change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


class Interpreter:
    """
    Replays a recording without generated code, so that recording costs little more than the call itself.

    Operations that no output depends on are left out. Operations that depend on no input or random number run once, in :meth:`prepare`.

    :param recording: of a function of tensors to a sequence of tensors.

    :ivar elements: how many numbers a replay makes.
    :ivar random: for each output, whether it depends on random numbers.
    """

    def __init__(self, recording: Recording) -> None:
        graph = recording.graph
        *nodes, output = graph.nodes
        self._outputs = list(output.args[0])
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self.random = [not recording.random.isdisjoint(node.meta["memory"]) for node in self._outputs]
        self._moving, live = recording.moving, live_nodes(recording)
        self._calls = calls_of(nodes)
        calls = [call for call in self._calls if call.node in live]
        self._each = [call for call in calls if is_random(call.node) or not call.memory.isdisjoint(self._moving)]
        self._lane = fx.Graph().placeholder("lane")
        self._places = {node: place for place, node in enumerate((*nodes, self._lane))}
        self._held: list[Any] = [None] * len(self._places)
        for node in nodes:
            if node.op == "get_attr":
                self._held[self._places[node]] = recording.attributes[node.target]
        each = {call.node for call in self._each}
        once = [call for call in calls if call.node not in each]
        self._once = plan(once, {*self._outputs, *(node for call in self._each for node in call.reads)}, self._places)
        self._plans: dict[tuple[bool, bool], list[Step]] = {}
        self.elements = numbers_made(self._each)

    def prepare(self) -> list[Any]:
        """The values that are the same in every replay, computed from the tensors as they are now."""
        values = list(self._held)
        perform(self._once, values)
        return values

    def replay(self, values: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """
        :param values: from :meth:`prepare`; not changed.
        :param inputs: tensors of the shapes that were recorded.
        """
        return self._run(self._plan_for(together=False), list(values), inputs)

    def replay_together(
        self, values: Sequence[Any], inputs: Sequence[Tensor], count: int, shared: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """
        ``count`` replays side by side, each with its own random numbers.

        :param values: from :meth:`prepare`.
        :param inputs: the first inputs, ``[count, *input]``.
        :param shared: the other inputs, the same for all.
        :return: ``[count, *output]``.
        :raises RuntimeError: from PyTorch, for an operation that cannot be batched.
        """
        steps = self._plan_for(together=True)

        def one(lane: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self._run(steps, [*values[:-1], lane], (*inputs, *shared))

        # vmap needs something to map over, and the function may have no input
        with quiet_batching():
            return torch.func.vmap(one, randomness="different")(torch.empty(count, 0), *inputs)

    def replay_all(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Runs every recorded operation, so that from equal random states the result is the function's own."""
        return self._run(plan(self._calls, self._outputs, self._places), list(self._held), inputs)

    def _plan_for(self, together: bool) -> list[Step]:
        key = together, torch.is_grad_enabled()
        if key not in self._plans:
            calls = self._each
            if together:
                calls = rows_last(in_lanes(calls, self._moving, self._lane), self._moving, self._outputs)
            if not torch.is_grad_enabled():
                calls = in_place(calls, memory_of(self._outputs), together)
            self._plans[key] = plan(calls, self._outputs, self._places)
        return self._plans[key]

    def _run(self, steps: list[Step], values: list[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for node, tensor in zip(self._inputs, inputs, strict=True):
            values[self._places[node]] = tensor
        perform(steps, values)
        return tuple([values[self._places[node]] for node in self._outputs])


class Replays:
    """
    Replays a recording for many draws: ``chunk`` of them side by side, or one after the other.

    :param Interpreter recorded: its first inputs are what a draw consists of.
    :param int chunk: how many draws are computed together, >= 1; becomes 1 if an operation cannot be batched.
    :param bool lasting: whether there will be many more runs than one.
    """

    def __init__(self, recorded: Interpreter, chunk: int, lasting: bool = False) -> None:
        self.recorded, self.chunk, self.lasting = recorded, chunk, lasting
        self._batched: dict[tuple[int, bool], Interpreter] = {}

    def run(self, draws: Callable[[int, int], list[Tensor]], start: int, stop: int, shared: Sequence[Tensor] = ()) -> Iterator[Any]:
        """
        The outputs, in pieces ``[size, *output]``.

        :param draws: function of ``(start, size)`` to tensors ``[size, *input]``.
        :param start: the first draw.
        :param stop: the one after the last.
        :param shared: the recording's other inputs, the same for all draws.
        """
        constants = self.recorded.prepare()
        while start < stop:
            size = min(self.chunk, stop - start)
            piece = None
            if size > 1:
                piece = self._together(constants, draws(start, size), size, (stop - start) // size, shared)
                if piece is None:
                    self.chunk = size = 1
            if piece is None:
                draw = [tensor[0] for tensor in draws(start, 1)]
                piece = [value.unsqueeze(0) for value in self.recorded.replay(constants, (*draw, *shared))]
            yield piece
            start += size

    def _together(
        self, constants: list[Any], draws: list[Tensor], size: int, calls: int, shared: Sequence[Tensor]
    ) -> Sequence[Tensor] | None:
        """
        One chunk; None if it cannot be batched, or memory does not suffice.

        The Python of ``vmap`` costs as much as a small network: if many chunks follow, the batched call is recorded, too.
        """
        places = [i for i, value in enumerate(constants) if value is not None]
        inputs = (*draws, *shared, *(constants[i] for i in places))

        def together(*tensors: Tensor) -> Sequence[Tensor]:
            values, ends = list(constants), (len(draws), len(draws) + len(shared))
            for i, value in zip(places, tensors[ends[1] :], strict=True):
                values[i] = value
            return self.recorded.replay_together(values, tensors[: ends[0]], size, tensors[ends[0] : ends[1]])

        key = size, torch.is_grad_enabled()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # by torch.binomial
                if key in self._batched:
                    return self._batched[key].replay(self._batched[key].prepare(), inputs)
                if calls < RECORDED_CALLS and not self.lasting:
                    return together(*inputs)
                recording, piece = record(together, inputs)
                self._batched[key] = Interpreter(recording)
                return piece
        except Exception:
            return None


def draws_together(recorded: Interpreter, passes: int = 1) -> int:
    """
    How many draws are computed side by side: a fixed rule, so that results never depend on timings.

    :param passes: how often the numbers of a draw are in memory: twice if gradients are computed.
    """
    return max(1, NUMBERS_TOGETHER // (passes * max(1, recorded.elements)))


def chains_together(num_chains: int, weights: int, convolutional: bool, device: torch.device) -> int:
    """How many chains' gradients are computed side by side: a fixed rule."""
    return 1 if device.type == "cpu" and (convolutional or weights > SIDE_BY_SIDE_WEIGHTS) else num_chains
