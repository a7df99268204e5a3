"""A tape does what its function does, on other inputs, or says that it cannot."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_advbayes.tracing.record import NotRecordable, Recorder, record
from pyro_advbayes.tracing.replay import Interpreter, Replays

TABLE = torch.arange(12.0).view(4, 3)


def views(a, b):
    c = a.t()[1:].detach() + b
    first, second = c.split(1)
    return [first.expand(2, 4), second.squeeze(0), c.data.sum()]


def in_place(a, b):
    total = torch.zeros(4, 3)
    total[1] = b.mean()
    total += a
    row = torch.tensor([1.0, 2.0, 3.0])
    row.mul_(a[0])
    return [total, total[1], row, a.clone().relu_()]


def several(a, b):
    values, indices = a.max(dim=1)
    norm, mean, _ = torch.native_layer_norm(a, (3,), None, None, 1e-5)
    return [values, indices, norm, mean, torch.stack([*a.unbind(0), *a.unbind(0)])]


def lookups(a, b):
    order = a[:, 0].argsort()
    return [TABLE[order], TABLE.gather(0, order.unsqueeze(1).expand(4, 3)), torch.where(a > 0, a, TABLE)]


def layers(a, b):
    hidden = F.linear(TABLE, a, b).tanh()
    return [F.softmax(F.linear(hidden, a.t()), -1), (hidden @ a).exp(), hidden.mm(a).sigmoid().relu()]


def passed_on(a, b):
    return [a, TABLE, a.relu(), a.exp()]


def read_again(a, b):
    hidden, wide = a * 2, (b.sum() * 0.1).expand(5)
    return [hidden.relu() + hidden, wide.exp() + wide.sum(), (a * 3).t().sigmoid(), b.sum().view(1).expand(2).tanh()]


def fixed_writes(a, b):
    total = torch.zeros(4, 3)
    total += TABLE
    total[0] = 7.0
    return [total * a, total]


def constant_work(a, b):
    return [a + (TABLE @ TABLE.t()).sum(), TABLE.exp()]


def derivatives(a, b):
    hidden, square = (a * b.unsqueeze(1)).t().relu(), b.unsqueeze(1) * a @ a.t()
    slope = torch.ops.aten.threshold_backward((hidden * 2).t(), hidden.t(), 0.0)
    read = a * 3
    part = (a * 2)[:1].expand(4, 3)  # as many numbers as a * 2, but none of most of them
    return [
        slope,
        torch.ops.aten.threshold_backward(square, square.t(), 0.1),
        torch.ops.aten.threshold_backward(read, a, 0.0) + read,
        torch.ops.aten.threshold_backward(part, a, 0.0) + part.relu(),
        torch.ops.aten.threshold_backward((a * 2).t().contiguous(), hidden, 0.0).t().view(12),  # in the layout of hidden
    ]


def read_before_it_is_written(a, b):
    total = torch.zeros(4, 3)
    doubled = total * 2 + 1
    total += a
    return [doubled + 1, total]


FUNCTIONS = [
    read_before_it_is_written,
    views,
    in_place,
    several,
    lookups,
    layers,
    passed_on,
    read_again,
    fixed_writes,
    constant_work,
    derivatives,
]


def draws(count):
    return [torch.randn(count, 4, 3), torch.randn(count, 4)]


def tape_of(fn):
    return Interpreter(record(fn, [torch.randn(4, 3), torch.randn(4)])[0])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_replays_equal_calls(fn, grad):
    with torch.set_grad_enabled(grad):
        tape = tape_of(fn)
        for a, b in zip(*draws(3), strict=True):
            expected = fn(a, b)
            for values in (tape.replay(tape.prepare(), (a, b)), tape.replay_all((a, b))):
                for ours, theirs in zip(values, expected, strict=True):
                    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_replays_side_by_side_equal_calls(fn, count, grad):
    with torch.set_grad_enabled(grad):
        tape = tape_of(fn)
        inputs = draws(count)
        together = tape.replay_together(tape.prepare(), inputs, count)
        for i, pair in enumerate(zip(*inputs, strict=True)):
            for ours, theirs in zip(together, fn(*pair), strict=True):
                assert torch.allclose(ours[i], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_replays_in_chunks_equal_calls(fn, chunk):
    inputs = draws(50)
    tape = tape_of(fn)
    replays = Replays(tape, chunk)
    for _ in range(2):  # the second time from what was kept
        pieces = replays.run(lambda start, size: [t[start : start + size] for t in inputs], 0, 50)
        results = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        assert replays.chunk == chunk
        for i in (0, 3, 49):
            for ours, theirs in zip(results, fn(inputs[0][i], inputs[1][i]), strict=True):
                assert torch.allclose(ours[i], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fn", [layers, constant_work, several])
@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_reach_inputs_and_captured_tensors(fn, chunk):
    inputs = [t.double().requires_grad_() for t in draws(40)]
    weight = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    shared = torch.randn(3, dtype=torch.double, requires_grad=True)

    def call(a, b, c):
        return [(out * c.sum()).sum() for out in fn((a * weight).float(), b.float())]

    tape = Interpreter(record(call, [inputs[0][0], inputs[1][0], shared])[0])
    replays = Replays(tape, chunk)
    pieces = replays.run(lambda start, size: [t[start : start + size] for t in inputs], 0, 40, (shared,))
    ours = sum(torch.cat(parts).sum() for parts in zip(*pieces, strict=True))
    theirs = sum(sum(call(a, b, shared)) for a, b in zip(*inputs, strict=True))
    leaves = [*inputs, weight, shared]
    for a, b in zip(*(torch.autograd.grad(v, leaves, allow_unused=True) for v in (ours, theirs)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_random_operations_stay_random_and_follow_the_seed():
    def noisy(a):
        z = torch.empty(3).normal_()
        return [a + z, torch.rand(2) * a.sum(), torch.multinomial(a.softmax(0), 50, replacement=True)]

    tape = Interpreter(record(noisy, [torch.zeros(3)])[0])
    inputs = torch.randn(6, 3)
    for a in inputs:
        torch.manual_seed(5)
        expected = noisy(a)
        torch.manual_seed(5)
        for ours, theirs in zip(tape.replay_all([a]), expected, strict=True):
            assert torch.equal(ours, theirs)
    together = tape.replay_together(tape.prepare(), [torch.zeros(200, 3)], 200)
    assert len(together[0].unique()) == 600
    assert tape.random == [True, True, True]
    assert Interpreter(record(lambda a: [a * 2], [torch.zeros(3)])[0]).random == [False]


class Watch(TorchDispatchMode):
    """Notes what is called, and the largest number of its results that were alive together."""

    def __init__(self):
        super().__init__()
        self.calls, self.alive, self.most = [], weakref.WeakValueDictionary(), 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # spares the import of the compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append(func)
        self.alive[id(result)] = result  # by id: a write in place gives a tensor again, and a set would compare numbers
        self.most = max(self.most, len(self.alive))
        return result


def test_what_no_input_reaches_is_computed_once():
    tape = Interpreter(record(constant_work, [torch.randn(4, 3), torch.randn(4)])[0])
    values, inputs = tape.prepare(), [torch.randn(4, 3), torch.randn(4)]
    with Watch() as watch:
        tape.replay(values, inputs)
    assert watch.calls == [torch.ops.aten.add.Tensor]


def test_captured_tensors_are_read_when_the_tape_is_replayed():
    weight = torch.ones(3)
    tape = Interpreter(record(lambda a: [a * weight.exp()], [torch.ones(3)])[0])
    weight.zero_()
    assert torch.equal(tape.replay(tape.prepare(), [torch.ones(3)])[0], torch.ones(3))


def test_activations_die_as_in_a_plain_call():
    def deep(a):
        for _ in range(50):
            a = (a * 1.5).sin()
        return [a]

    with Watch() as plain:
        deep(torch.zeros(3))
    with Watch() as recording:
        tape = Interpreter(record(deep, [torch.zeros(3)])[0])
    values = tape.prepare()
    with Watch() as replay:
        tape.replay(values, [torch.zeros(3)])
    assert max(recording.most, replay.most) <= plain.most + 1


@pytest.mark.parametrize(
    "fn",
    [
        lambda a: [a * a.sum().item()],
        lambda a: [a if a.sum() > 0 else -a],
        lambda a: [a[a > 0].sum()],
        lambda a: [torch.zeros(len(a.unique()))],
        lambda a: [a.nonzero()],
        lambda a: [a + torch.rand(()).item()],
        lambda a: [a + TABLE.add_(0.0).sum()],
        lambda a: [a.mul_(2.0)],
        lambda a: [a * float(np.abs(a.numpy()).max())],
        lambda a: [a * torch.as_tensor(np.asarray(a * 2))],
        lambda a: [a * sum(a.exp().tolist())],
        lambda a: [a * random.random()],
        lambda a: [a * float(np.random.rand())],  # noqa: NPY002
    ],
    ids=[
        *("item", "branch", "mask", "unique", "nonzero", "random number", "writes into a captured tensor", "writes into an input"),
        *("numpy", "array", "list", "Python's random numbers", "NumPy's random numbers"),
    ],
)
def test_what_cannot_be_replayed_is_refused(fn):
    with pytest.raises(NotRecordable):
        record(fn, [torch.randn(3)])


def test_python_numbers_may_come_from_tensors_that_stay_the_same():
    def fn(a):
        return [a * TABLE.sum().item() * float(TABLE.numpy()[0, 1]) + len(TABLE.unique()) + TABLE[TABLE > 3].sum()]

    tape = Interpreter(record(fn, [torch.randn(3)])[0])
    a = torch.randn(3)
    assert torch.equal(tape.replay(tape.prepare(), [a])[0], fn(a)[0])


def test_pytorch_does_not_load_its_compiler_to_keep_it_out_of_a_recording():
    assert not hasattr(Recorder.__torch_dispatch__, "__wrapped__")


def test_one_tensor_given_twice_is_two_inputs():
    a, b = torch.randn(3), torch.randn(3)
    tape = Interpreter(record(lambda a, b: [a - 2 * b], [a, a])[0])
    assert torch.equal(tape.replay(tape.prepare(), [a, b])[0], a - 2 * b)


def test_large_layers_stay_as_they_are_side_by_side(monkeypatch):
    tape, inputs = tape_of(layers), draws(5)
    rows_last = tape.replay_together(tape.prepare(), inputs, 5)
    monkeypatch.setattr("pyro_advbayes.tracing.calls.WEIGHTS_A_ROW", 0)
    tape = tape_of(layers)
    with Watch() as watch:
        plain = tape.replay_together(tape.prepare(), inputs, 5)
    for ours, theirs in zip(plain, rows_last, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.ops.aten.bmm.default in watch.calls
    # beside the product, a layer adds its bias in place: vmap's own rule for addmm multiplies the bias by 1, and adds into new memory
    assert not {torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor} & set(watch.calls)
