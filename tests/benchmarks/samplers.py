"""SGLD on minibatches, by this package, by hand, and by others."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn import functional as F

from pyro_advbayes import SGLD
from tests.benchmarks.measure import Contender, Missing
from tests.benchmarks.workloads import BATCH, ROWS, STEP_SIZE, Network, data

STEPS = 50  # updates between samples


def ours(
    network: Network,
    chains: int,
    backend: str,
    device: torch.device,
    *,
    rows: int = ROWS,
    steps: int = STEPS,
    chunk_size: int | None = None,
) -> Contender:
    """``kernel.sample`` as the runner calls it: ``steps`` updates, and the energy at the last one."""
    kernel = SGLD(
        network.model().to(device), STEP_SIZE, batch_size=BATCH, num_steps_per_sample=steps, backend=backend, chunk_size=chunk_size
    )
    with poutine.block(), pyro.validation_enabled(False):
        kernel.setup_chains(chains, 0, data(network.inputs, network.classes, rows, device), {})
        params = kernel.sample(kernel.initial_params)
    if kernel.potential.backend != backend:
        raise RuntimeError(f"{network.name}: backend {backend!r} fell back to {kernel.potential.backend!r}")

    def sample() -> None:
        nonlocal params
        with pyro.validation_enabled(False):
            params = kernel.sample(params)

    return Contender(sample, steps)


class Minibatches:
    """Shuffled epochs, as one writes them by hand."""

    def __init__(self, rows: int, batch_size: int = BATCH) -> None:
        self.rows, self.batch_size, self.cursor = rows, batch_size, rows

    def next(self) -> Tensor:
        """Row numbers ``[batch_size]``."""
        if self.cursor + self.batch_size > self.rows:
            self.order, self.cursor = torch.randperm(self.rows), 0
        self.cursor += self.batch_size
        return self.order[self.cursor - self.batch_size : self.cursor]


def hand_written(network: Network, chains: int, device: torch.device, steps: int = STEPS) -> Contender:
    """One loop per chain, one after the other: what somebody writes who wants nothing but this one sampler on this one network."""
    loops = [_hand_written_loop(network, device) for _ in range(chains)]

    def run() -> None:
        for loop in loops:
            loop(steps)

    return Contender(run, steps)


def _hand_written_loop(network: Network, device: torch.device) -> Callable[[int], None]:
    x, y = data(network.inputs, network.classes, ROWS, device)
    net = network.plain().to(device)
    params, batches = list(net.parameters()), Minibatches(ROWS)
    shrink, scale, noise = 1.0 - STEP_SIZE, -STEP_SIZE * ROWS, (2.0 * STEP_SIZE) ** 0.5

    def loop(steps: int) -> None:
        for _ in range(steps):
            index = batches.next().to(device)
            loss = F.cross_entropy(net(x.index_select(0, index)), y.index_select(0, index))
            gradients = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for p, g in zip(params, gradients, strict=True):
                    p.mul_(shrink).add_(g, alpha=scale).add_(torch.randn_like(p), alpha=noise)  # shrinking is the unit-normal prior

    return loop


def posteriors_sgld(network: Network, chains: int, device: torch.device, *, inplace: bool = False, steps: int = STEPS) -> Contender:
    """The ``posteriors`` package, used as its documentation shows it: one transform, and chains one after the other."""
    transform, (x, y) = _posteriors_transform(network, device)
    states = []
    for _ in range(chains):
        fresh = network.plain().to(device)
        states.append(transform.init({name: p.detach() for name, p in fresh.named_parameters()}))
    batches = Minibatches(ROWS)

    def run() -> None:
        for chain, state in enumerate(states):
            for _ in range(steps):
                index = batches.next().to(device)
                state, _ = transform.update(state, (x.index_select(0, index), y.index_select(0, index)), inplace=inplace)
            states[chain] = state

    return Contender(run, steps)


def posteriors_vmapped(network: Network, chains: int, device: torch.device, steps: int = STEPS) -> Contender:
    """The ``posteriors`` package with its chains side by side, by ``torch.func.vmap`` of its update."""
    transform, (x, y) = _posteriors_transform(network, device)
    drawn = [dict(network.plain().to(device).named_parameters()) for _ in range(chains)]
    state = torch.func.vmap(transform.init)({name: torch.stack([d[name].detach() for d in drawn]) for name in drawn[0]})
    update = torch.func.vmap(transform.update, randomness="different")
    batches = [Minibatches(ROWS) for _ in range(chains)]

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            index = torch.cat([b.next() for b in batches]).to(device)
            rows = x.index_select(0, index).view(chains, BATCH, *network.inputs), y.index_select(0, index).view(chains, BATCH)
            state, _ = update(state, rows)

    return Contender(run, steps)


@functools.lru_cache
def _posteriors_transform(network: Network, device: torch.device) -> tuple[Any, tuple[Tensor, Tensor]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, about the versions it was written for
            import posteriors
    except ImportError as error:
        raise Missing(f"posteriors is not installed ({error})") from None
    net = network.plain().to(device)

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        output = torch.func.functional_call(net, params, (images,))
        return posteriors.diag_normal_log_prob(params) / ROWS - F.cross_entropy(output, labels), output

    # a log-posterior per row at temperature 1 / N is its own convention for the same law
    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=STEP_SIZE * ROWS, temperature=1.0 / ROWS)
    return transform, data(network.inputs, network.classes, ROWS, device)


def blackjax_sgld(
    network: Network, chains: int, device: torch.device, *, vmapped: bool = True, scanned: bool = False, steps: int = STEPS
) -> Contender:
    """
    BlackJAX's SGLD, one jitted call a step: the minibatch is gathered and the key split inside it, and the state's memory is given
    back to it. The rows are drawn outside, like everyone's.

    :param scanned: whether one call makes all steps, by ``jax.lax.scan``.
    """
    try:
        import blackjax
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Missing(f"blackjax is not installed ({error})") from None
    if device.type != jax.devices()[0].platform.replace("gpu", "cuda"):
        raise Missing(f"JAX has no {device.type} here")
    x, y = (jnp.asarray(t.cpu().numpy()) for t in data(network.inputs, network.classes, ROWS, device))

    def log_prior(params: dict[str, Any]) -> Any:
        return -0.5 * sum(jnp.sum(p**2) for p in params.values())

    def log_likelihood(params: dict[str, Any], row: tuple[Any, Any]) -> Any:
        layers = sorted({int(name.split(".")[0]) for name in params})
        hidden = row[0]
        for layer in layers:
            hidden = params[f"{layer}.weight"] @ hidden + params[f"{layer}.bias"]
            hidden = hidden if layer == layers[-1] else jax.nn.relu(hidden)
        return jax.nn.log_softmax(hidden)[row[1]]

    sgld = blackjax.sgld(blackjax.sgmcmc.gradients.grad_estimator(log_prior, log_likelihood, ROWS))

    def step(key: Any, position: dict[str, Any], index: Any, x: Any, y: Any) -> tuple[Any, dict[str, Any]]:
        key, now = jax.random.split(key)
        return key, sgld.step(now, position, (x[index], y[index]), STEP_SIZE)

    def start() -> dict[str, Any]:
        return {name: jnp.asarray(p.detach().numpy().copy()) for name, p in network.plain().named_parameters()}

    side_by_side = vmapped and chains > 1
    batches = [Minibatches(ROWS) for _ in range(chains)]
    if side_by_side:
        step = jax.vmap(step, in_axes=(0, 0, 0, None, None))
        states = [(jax.random.split(jax.random.key(0), chains), jax.tree.map(lambda *p: jnp.stack(p), *(start() for _ in range(chains))))]
    else:
        states = [(jax.random.key(chain), start()) for chain in range(chains)]
    one = step

    def scan(key: Any, position: dict[str, Any], indices: Any, x: Any, y: Any) -> tuple[Any, dict[str, Any]]:
        return jax.lax.scan(lambda state, index: (one(*state, index, x, y), None), (key, position), indices)[0]

    step = jax.jit(scan if scanned else one, donate_argnums=(0, 1))

    def run() -> None:
        for place, (key, position) in enumerate(states):
            own = batches if side_by_side else [batches[place]]
            rows = (torch.stack([b.next() for b in own]).numpy().astype("int32") for _ in range(steps))
            indices = (index if side_by_side else index[0] for index in rows)
            for index in [np.stack(list(indices))] if scanned else indices:
                key, position = step(key, position, index, x, y)
            states[place] = key, position
        jax.block_until_ready(states)

    return Contender(run, steps)
