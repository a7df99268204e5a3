"""Rows about the time of a step of variational inference, and of a prediction from a guide."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import pyro
import pyro.infer
import torch
from pyro.infer import ELBO, SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor
from torch.nn import functional as F

from pyro_advbayes import Predictive, init_to_fan_in, minibatch
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO
from pyro_advbayes.nn import ExemplarReparameterization
from tests.benchmarks.measure import Contender, Result, Stopwatch, Target
from tests.benchmarks.rows_sampling import compare
from tests.benchmarks.workloads import BATCH, CONVNET, LARGE, ROWS, SMALL, Network, data, mlp_of

OURS, HAND, PYROS = "TraceAdversarial_ELBO", "hand-written PyTorch", "TraceMeanField_ELBO and AutoNormal"
MIDDLE = mlp_of(784, 100, 100, 10)
STEPS, STEP_SIZE, MIX = 5, 0.02, 0.8  # the paper's


def _batches(network: Network, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data(network.inputs, network.classes, 10 * BATCH, device)
    while True:
        yield from zip(x.split(BATCH), y.split(BATCH), strict=True)


def _svi(network: Network, device: torch.device, guide: type, elbo: ELBO) -> Contender:
    model = network.model().to(device)
    guide = guide(model, init_loc_fn=init_to_fan_in)
    batches = _batches(network, device)
    svi = SVI(minibatch(model, size=ROWS), guide, Adam({"lr": 1e-3}), elbo)

    def step() -> None:
        with pyro.validation_enabled(False):
            svi.step(*next(batches))

    for _ in range(3):  # the graph is there from the third step on
        step()
    return Contender(step)


class HandWritten:
    """Adversarial Sampling as one writes it in PyTorch: weights N(0, 1), scales by softplus, one Adam for all."""

    def __init__(self, network: Network, device: torch.device, mix: float) -> None:
        self.net, self.mix = network.plain().to(device), mix
        self.names = [name for name, _ in self.net.named_parameters()]
        self.means = [p.detach().clone().requires_grad_() for p in self.net.parameters()]
        self.scales = [torch.full_like(p, 0.1).expm1().log().requires_grad_() for p in self.net.parameters()]  # of the softplus
        self.optimiser = torch.optim.Adam([*self.means, *self.scales], lr=1e-3)

    def loss(self, weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood of all rows, estimated."""
        logits = torch.func.functional_call(self.net, dict(zip(self.names, weights, strict=True)), x)
        return ROWS * F.cross_entropy(logits, y)

    def step(self, x: Tensor, y: Tensor) -> float:
        """One update."""
        self.optimiser.zero_grad()
        scales = [F.softplus(s) for s in self.scales]
        noise = [torch.randn_like(m) for m in self.means]
        loss = self.loss([m + s * e for m, s, e in zip(self.means, scales, noise, strict=True)], x, y)
        if self.mix > 0:
            noise = self._moved(scales, x, y)
            moved = self.loss([m + s * e for m, s, e in zip(self.means, scales, noise, strict=True)], x, y)
            loss = (1 - self.mix) * loss + self.mix * moved
        loss = loss + sum(((s**2 + m**2 - 1) / 2 - s.log()).sum() for m, s in zip(self.means, scales, strict=True))
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def _moved(self, scales: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        noise = [torch.randn_like(m) for m in self.means]
        means, scales = [m.detach() for m in self.means], [s.detach() for s in scales]
        for _ in range(STEPS):
            weights = [(m + s * e).requires_grad_() for m, s, e in zip(means, scales, noise, strict=True)]
            slopes = torch.autograd.grad(self.loss(weights, x, y), weights)
            noise = [e.add_(g.sign(), alpha=STEP_SIZE) for e, g in zip(noise, slopes, strict=True)]
        return noise


def _hand(network: Network, device: torch.device, mix: float) -> Contender:
    trainer, batches = HandWritten(network, device, mix), _batches(network, device)
    return Contender(lambda: trainer.step(*next(batches)))


def adversarial_step(watch: Stopwatch) -> list[Result]:
    """A step of Adversarial Sampling with five inner steps on 784-400-400-10, Adam included, against hand-written PyTorch."""
    pyro.clear_param_store()
    makers: dict[str, Callable[[], Contender]] = {
        OURS: partial(_svi, LARGE, watch.device, AutoAdversarialNormal, TraceAdversarial_ELBO(STEPS, STEP_SIZE, MIX)),
        HAND: partial(_hand, LARGE, watch.device, MIX),
    }
    what = f"a step on {LARGE.name}, batch {BATCH}, {STEPS} inner steps"
    return [compare(watch, what, makers, [(OURS, HAND, Target("<=", 1.3))])]


def mean_field_step(watch: Stopwatch) -> list[Result]:
    """A step of plain mean-field SVI, Adam included, against Pyro's, validation off in both."""
    results = []
    for network in (SMALL, MIDDLE, LARGE):
        pyro.clear_param_store()
        makers: dict[str, Callable[[], Contender]] = {
            OURS: partial(_svi, network, watch.device, AutoAdversarialNormal, TraceAdversarial_ELBO(mix=0)),
            PYROS: partial(_svi, network, watch.device, AutoNormal, TraceMeanField_ELBO()),
            HAND: partial(_hand, network, watch.device, 0.0),
        }
        what = f"a step on {network.name}, batch {BATCH}"
        results.append(compare(watch, what, makers, [(OURS, PYROS, Target("<=", 0.5)), (OURS, HAND, None)]))
    return results


def _predictive(kind: type, guide: type, network: Network, draws: int, device: torch.device) -> Contender:
    model = network.model().to(device)
    guide = guide(model, init_loc_fn=init_to_fan_in)
    x, y = data(network.inputs, network.classes, BATCH, device)
    guide(x, y)

    def call() -> None:
        with pyro.validation_enabled(False):
            kind(model, guide=guide, num_samples=draws, return_sites=["obs"])(x)

    return Contender(call)


def guide_prediction(watch: Stopwatch) -> list[Result]:
    """A prediction of 100 draws from a guide: times faster than Pyro's ``Predictive`` on a small network, never slower."""
    results, draws = [], 8 if watch.quick else 100
    for network, faster in ((SMALL, 5.0), (MIDDLE, 1.0), (LARGE, 1.0)):
        pyro.clear_param_store()
        makers: dict[str, Callable[[], Contender]] = {
            "Predictive": partial(_predictive, Predictive, AutoAdversarialNormal, network, draws, watch.device),
            "Pyro's Predictive": partial(_predictive, pyro.infer.Predictive, AutoNormal, network, draws, watch.device),
        }
        what = f"{draws} draws of {network.name}, {BATCH} inputs"
        results.append(compare(watch, what, makers, [("Pyro's Predictive", "Predictive", Target(">=", faster))]))
    return results


def _pyro_gradient(x: Tensor, y: Tensor, parts: Sequence[slice], handlers: Callable[[], AbstractContextManager]) -> Contender:
    """The ELBO's gradient, as the mean over parts of the rows."""
    model = minibatch(CONVNET.model().to(x.device), size=ROWS)
    guide = AutoAdversarialNormal(model, init_loc_fn=init_to_fan_in)
    guide(x, y)
    elbo, parameters = TraceMeanField_ELBO(), list(guide.parameters())

    def call() -> tuple[Tensor, ...]:
        with pyro.validation_enabled(False), handlers():
            loss = sum(elbo.differentiable_loss(model, guide, x[part], y[part]) for part in parts) / len(parts)
        return torch.autograd.grad(loss, parameters)

    return Contender(call)


def _example_by_example(x: Tensor, y: Tensor) -> Contender:
    trainer = HandWritten(CONVNET, x.device, 0.0)

    def call() -> tuple[Tensor, ...]:
        scales = [F.softplus(s) for s in trainer.scales]
        losses = []
        for i in range(len(x)):
            weights = [m + s * torch.randn_like(m) for m, s in zip(trainer.means, scales, strict=True)]
            losses.append(trainer.loss(weights, x[i : i + 1], y[i : i + 1]))
        divergence = sum(((s**2 + m**2 - 1) / 2 - s.log()).sum() for m, s in zip(trainer.means, scales, strict=True))
        return torch.autograd.grad(sum(losses) / len(x) + divergence, [*trainer.means, *trainer.scales])

    return Contender(call)


def exemplar_gradient(watch: Stopwatch) -> list[Result]:
    """
    A gradient with a draw of the ConvNet for each of 64 images: times faster than loops over the images. 91 % of the weights are those of
    linear layers, which are drawn as what they make of an image.
    """
    pyro.clear_param_store()
    rows = 4 if watch.quick else 64
    x, y = (t[:rows] for t in data(CONVNET.inputs, CONVNET.classes, ROWS, watch.device))
    ours = "ExemplarReparameterization"
    makers: dict[str, Callable[[], Contender]] = {
        ours: partial(_pyro_gradient, x, y, [slice(None)], ExemplarReparameterization),
        "loop over images": partial(_pyro_gradient, x, y, [slice(i, i + 1) for i in range(rows)], contextlib.nullcontext),
        "the same without Pyro": partial(_example_by_example, x, y),
    }
    wanted = [("loop over images", ours, Target(">=", 10.0)), ("the same without Pyro", ours, None)]
    return [compare(watch, f"a gradient of the ELBO of {CONVNET.name}, a draw for each of {rows} images", makers, wanted)]
