"""Rows about the time of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pyro
import pyro.infer
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical

from pyro_advbayes import Predictive
from tests.benchmarks.measure import Contender, Result, Stopwatch, Target
from tests.benchmarks.rows_sampling import Against, compare
from tests.benchmarks.workloads import LARGE, SMALL, Network, data

OURS, PYROS, LOOP = "Predictive", "Pyro's Predictive", "bare loop"


def draws_of(network: Network, draws: int, device: torch.device) -> dict[str, Tensor]:
    """Random weights ``[draws, *site]`` by site."""
    trace = poutine.trace(network.model()).get_trace(torch.zeros(1, *network.inputs))
    shapes = {name: node["value"].shape for name, node in trace.nodes.items() if node["type"] == "sample" and name.startswith("net.")}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(draws, *shape, generator=generator).to(device) for name, shape in shapes.items()}


def _predictive(kind: type, network: Network, samples: Mapping[str, Tensor], sites: Sequence[str], x: Tensor, validate: bool) -> Contender:
    """Made anew for every call, as one does with new samples: what it prepares counts."""
    model = network.model().to(x.device)

    def call() -> None:
        with pyro.validation_enabled(validate):
            kind(model, samples, return_sites=sites)(x)

    return Contender(call)


def _bare_loop(network: Network, samples: Mapping[str, Tensor], sites: Sequence[str], x: Tensor) -> Contender:
    """A loop over draws, without Pyro, that gives the same: logits, and classes drawn from them."""
    net = network.plain().to(x.device)
    weights = {name: samples[f"net.{name}"] for name, _ in net.named_parameters()}
    draws = len(next(iter(samples.values())))

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        logits, classes = [], []
        for i in range(draws):
            output = torch.func.functional_call(net, {name: value[i] for name, value in weights.items()}, x)
            if "_RETURN" in sites:
                logits.append(output)
            if "obs" in sites:
                classes.append(Categorical(logits=output, validate_args=False).sample())
        return {"_RETURN": torch.stack(logits)} if logits else {"obs": torch.stack(classes)}

    return Contender(call)


def _race(watch: Stopwatch, network: Network, inputs: int, site: str, validate: bool, wanted: list[Against], loop: bool) -> Result:
    draws = 8 if watch.quick else 200
    samples = draws_of(network, draws, watch.device)
    x = data(network.inputs, network.classes, 60_000, watch.device)[0][:inputs]
    makers: dict[str, Callable[[], Contender]] = {
        OURS: partial(_predictive, Predictive, network, samples, [site], x, validate),
        PYROS: partial(_predictive, pyro.infer.Predictive, network, samples, [site], x, validate),
    }
    if loop:
        makers[LOOP] = partial(_bare_loop, network, samples, [site], x)
    validation = "validation on" if validate else "validation off"
    return compare(watch, f"{network.name}, {draws} draws, {inputs} inputs, {site}, {validation}", makers, wanted)


def predict_small(watch: Stopwatch) -> list[Result]:
    """``Predictive`` on 2-20-20-2 against Pyro's: times faster, validation alike."""
    results = []
    for inputs, site, faster in ((1000, "obs", 5.0), (1000, "_RETURN", 10.0), (32, "obs", 10.0), (32, "_RETURN", 10.0)):
        wanted: list[Against] = [(PYROS, OURS, Target(">=", faster))]
        results += [_race(watch, SMALL, inputs, site, validate, wanted, loop=False) for validate in (True, False)]
    return results


def predict_large(watch: Stopwatch) -> list[Result]:
    """``Predictive`` on 784-400-400-10: never slower than Pyro's, at most 1.1 times a bare loop over draws that also draws ``obs``."""
    results = []
    for inputs, site in ((32, "obs"), (32, "_RETURN"), (1000, "obs"), (1000, "_RETURN")):
        wanted: list[Against] = [(OURS, PYROS, Target("<=", 1.0)), (OURS, LOOP, Target("<=", 1.1) if site == "obs" else None)]
        results.append(_race(watch, LARGE, inputs, site, False, wanted, loop=True))
    return results
