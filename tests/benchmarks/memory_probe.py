"""One measurement of peak memory, in a process of its own; prints it as JSON. ``rows_memory`` starts it."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pyro_advbayes import SGLD, SGMCMC, PosteriorClassifier
from pyro_advbayes.attacks import PGD
from tests.benchmarks.rows_prediction import draws_of
from tests.benchmarks.workloads import BATCH, LARGE, ROWS, SMALL, Network, data, mlp_of

CHAINS = 5
CHUNK = 5


class Peak:
    """The peak of this process's memory (of the device's, on CUDA) from here on, above what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
            self.before = _status("VmRSS")

    def bytes(self) -> int:
        """The peak, above ``before``."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status("VmHWM")
        return peak - self.before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def sampler(draws: int, device: torch.device) -> dict[str, Any]:
    """A run with its draws in a file. A small network goes first: what PyTorch imports to trace is no memory of the sampler's."""
    with tempfile.TemporaryDirectory() as folder:
        _run(SMALL, 2, device, Path(folder) / "small")
        data(LARGE.inputs, LARGE.classes, ROWS, device)
        peak = Peak(device)
        state = _run(LARGE, draws, device, Path(folder) / "large")
        return {"peak": peak.bytes(), "before": peak.before, "state": state}


def _run(network: Network, draws: int, device: torch.device, path: Path) -> int:
    x, y = data(network.inputs, network.classes, ROWS, device)
    kernel = SGLD(network.model().to(device), batch_size=BATCH)
    mcmc = SGMCMC(kernel, num_samples=draws, warmup_steps=10, num_chains=CHAINS, draws=path, disable_progbar=True)
    mcmc.run(x, y)
    return CHAINS * kernel.potential.size * kernel.potential.dtype.itemsize


def classifier(draws: int, device: torch.device) -> dict[str, Any]:
    """What an attack library does with a classifier, in the least: a loss of its logits, and the gradient for its inputs."""
    network = mlp_of(784, 100, 100, 10)
    x, y = (t[:2048] for t in data(network.inputs, network.classes, ROWS, device))
    small = PosteriorClassifier(network.model().to(device), draws_of(network, 2, device))
    _backward(small, x[:2].clone(), y[:2])
    large = PosteriorClassifier(network.model().to(device), draws_of(network, draws, device))
    peak = Peak(device)
    _backward(large, x.clone(), y)
    return {"peak": peak.bytes(), "before": peak.before}


def attack(draws: int, device: torch.device) -> dict[str, Any]:
    """PGD on a posterior, so many draws side by side."""
    network = mlp_of(784, 100, 100, 10)
    x, y = (t[:2048] for t in data(network.inputs, network.classes, ROWS, device))
    pgd = PGD(0.1, steps=2)
    small = PosteriorClassifier(network.model().to(device), draws_of(network, 2, device), chunk_size=CHUNK)
    pgd(small, x[:2].clone(), y[:2])
    large = PosteriorClassifier(network.model().to(device), draws_of(network, draws, device), chunk_size=CHUNK)
    peak = Peak(device)
    pgd(large, x, y)
    return {"peak": peak.bytes(), "before": peak.before}


def _backward(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


KINDS = {"sampler": sampler, "classifier": classifier, "attack": attack}


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("draws", type=int)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        found: dict[str, Any] = {"missing": "the peak memory of a process is read from /proc, which is Linux's"}
    else:
        found = KINDS[arguments.kind](arguments.draws, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
