"""The row about Bayesian Adversarial Learning: an iteration, inputs and weights, against the same arithmetic by hand."""

from __future__ import annotations

from functools import partial

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_advbayes import BAL, L2, SGLD, SGAdaLD
from tests.benchmarks.measure import Contender, Result, Stopwatch, Target
from tests.benchmarks.rows_sampling import HAND, compare
from tests.benchmarks.samplers import Minibatches
from tests.benchmarks.workloads import CONVNET, ROWS, data

Draws = dict[str, Tensor]

BATCH, CHAINS, STEPS = 256, 5, 15
ETA, WEIGHT, STEP_SIZE, COLD = 0.01, 1.0, 1e-4, 1e-5


def bal_iteration(watch: Stopwatch) -> list[Result]:
    """One iteration of BAL, 15 + 15 updates, 5 chains of the ConvNet, batch 256, against a version by hand."""
    steps = 2 if watch.quick else STEPS
    makers = {HAND: partial(_hand_written, steps, watch.device), "graph": partial(_ours, steps, watch.device)}
    return [compare(watch, f"BAL's ConvNet, {CHAINS} chains, {steps} + {steps} updates", makers, [("graph", HAND, Target("<=", 1.1))])]


def _ours(steps: int, device: torch.device, start: Draws | None = None) -> Contender:
    kernel = BAL(
        CONVNET.model().to(device),
        "x",
        BATCH,
        inputs=SGLD.rule(step_size=ETA, num_steps=steps),
        cost=L2(WEIGHT),
        weights=SGAdaLD.rule(step_size=STEP_SIZE, num_steps=steps, clamp=True),
        clip=(0.0, 1.0),
        temperature=COLD,
        input_temperature=COLD,
    )
    if start is not None:
        kernel.initial_params = start
    with poutine.block(), pyro.validation_enabled(False):
        kernel.setup_chains(CHAINS, 0, data(CONVNET.inputs, CONVNET.classes, ROWS, device), {})
        params = kernel.sample(kernel.initial_params)

    def iterate() -> Draws:
        nonlocal params
        with pyro.validation_enabled(False):
            params = kernel.sample(params)
        return params

    return Contender(iterate, 1)


def _hand_written(steps: int, device: torch.device) -> Contender:
    x, y = data(CONVNET.inputs, CONVNET.classes, ROWS, device)
    nets = [CONVNET.plain().to(device) for _ in range(CHAINS)]
    scales = [[torch.ones_like(p) for p in net.parameters()] for net in nets]  # V, frozen after warm-up
    batches = Minibatches(ROWS, BATCH)

    def iterate() -> list[nn.Module]:
        index = batches.next().to(device)
        clean, labels = x.index_select(0, index), y.index_select(0, index)
        moved = clean.clone()
        for _ in range(steps):
            gradient = torch.zeros_like(moved)
            for net in nets:
                leaf = moved.detach().requires_grad_()
                gradient += torch.autograd.grad(F.cross_entropy(net(leaf), labels, reduction="sum"), leaf)[0]
            gradient.div_(CHAINS).sub_(moved - clean, alpha=2.0 * WEIGHT)
            moved = moved.add_(gradient, alpha=ETA).add_(torch.randn_like(moved), alpha=(2.0 * ETA * COLD) ** 0.5).clamp_(0.0, 1.0)
        for net, variances in zip(nets, scales, strict=True):
            params = list(net.parameters())
            for _ in range(steps):
                gradients = torch.autograd.grad(F.cross_entropy(net(moved), labels), params)
                with torch.no_grad():
                    for p, g, v in zip(params, gradients, variances, strict=True):
                        rate = STEP_SIZE**2 * v.rsqrt()
                        noise = (2.0 * COLD * rate - STEP_SIZE**4).clamp_min(0.0).sqrt() * torch.randn_like(p)
                        p.sub_(rate * (ROWS * g + p)).add_(noise)
        return nets

    return Contender(iterate, 1)
