"""Rows about the time of a sampling step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from tests.benchmarks.measure import Comparison, Contender, Missing, Result, Spread, Stopwatch, Target, ratio, total_memory
from tests.benchmarks.samplers import STEPS, blackjax_sgld, hand_written, ours, posteriors_sgld, posteriors_vmapped
from tests.benchmarks.workloads import CONVNET, LARGE, SMALL, Network, data, width

HAND = "hand-written loop"
Against = tuple[str, str, Target | None]


def compare(watch: Stopwatch, what: str, makers: Mapping[str, Callable[[], Contender]], wanted: Sequence[Against]) -> Result:
    """Races the contenders that are here, and compares ``(of, against, target)`` round by round."""
    result, here = Result(what, "ms"), {}
    for name, make in makers.items():
        try:
            if watch.quick and "compile" in name:
                raise Missing("a quick run compiles nothing")
            here[name] = make()
        except Missing as why:
            result.missing[name] = str(why)
    times = watch.race(what, here)
    result.values = {name: Spread.of(values) for name, values in times.items()}
    for of, against, target in wanted:
        if of in times and against in times:
            result.comparisons.append(Comparison(f"{of} / {against}", ratio(times, of, against), target))
    return result


def _own(watch: Stopwatch, network: Network, chains: int, steps: int = STEPS) -> dict[str, Callable[[], Contender]]:
    steps = 2 if watch.quick else steps
    return {backend: partial(ours, network, chains, backend, watch.device, steps=steps) for backend in ("graph", "compile")}


def _title(network: Network, chains: int) -> str:
    return f"{network.name}, {chains} chain{'s' if chains > 1 else ''}"


def _against_hand(watch: Stopwatch, network: Network, chains: int, graph: float, compiled: float, steps: int = STEPS) -> Result:
    makers = {HAND: partial(hand_written, network, chains, watch.device, 2 if watch.quick else steps)}
    makers |= _own(watch, network, chains, steps)
    wanted: list[Against] = [("graph", HAND, Target("<=", graph)), ("compile", HAND, Target("<=", compiled))]
    if chains == 1:
        makers["handlers"] = partial(ours, network, chains, "handlers", watch.device, steps=2)
        makers["graph, every step kept"] = partial(ours, network, chains, "graph", watch.device, steps=1)
        wanted += [(name, HAND, None) for name in ("handlers", "graph, every step kept")]
    return compare(watch, _title(network, chains), makers, wanted)


def step_large(watch: Stopwatch) -> list[Result]:
    """One chain of 784-400-400-10, batch 100 of 60 000, against a loop written by hand."""
    return [_against_hand(watch, LARGE, 1, graph=1.3, compiled=1.0)]


def step_small(watch: Stopwatch) -> list[Result]:
    """The same for 2-20-20-2."""
    return [_against_hand(watch, SMALL, 1, graph=1.6, compiled=0.7)]


def chains_small(watch: Stopwatch) -> list[Result]:
    """Twenty chains of 2-20-20-2 against twenty loops."""
    return [_against_hand(watch, SMALL, 20, graph=0.2, compiled=0.1)]


def chains_large(watch: Stopwatch) -> list[Result]:
    """Five chains of 784-400-400-10, and of BAL's ConvNet, against five loops."""
    return [_against_hand(watch, LARGE, 5, 1.3, 1.05, steps=10), _against_hand(watch, CONVNET, 5, 1.3, 1.05, steps=5)]


def against_posteriors(watch: Stopwatch) -> list[Result]:
    """Against the ``posteriors`` package: its update as documented, in place, and side by side under ``vmap``."""
    results = []
    for network, chains, steps in ((SMALL, 1, STEPS), (SMALL, 20, 10), (LARGE, 1, 20), (LARGE, 20, 2)):
        theirs = {"posteriors": partial(posteriors_sgld, network, chains, watch.device, steps=2 if watch.quick else steps)}
        if chains == 1:
            theirs["posteriors, in place"] = partial(theirs["posteriors"], inplace=True)
        else:
            theirs["posteriors, vmap"] = partial(posteriors_vmapped, network, chains, watch.device, steps=2 if watch.quick else steps)
        wanted = [(own, name, Target("<", 1.0)) for name in theirs for own in ("graph", "compile")]
        results.append(compare(watch, _title(network, chains), {**theirs, **_own(watch, network, chains, steps)}, wanted))
    return results


def against_blackjax(watch: Stopwatch) -> list[Result]:
    """
    Against BlackJAX's SGLD under ``jax.jit``, a step a call, and all steps in one call by ``jax.lax.scan``; chains by ``jax.vmap``, for
    large networks also one by one.
    """
    results = []
    for network, chains, steps in ((SMALL, 1, STEPS), (SMALL, 20, STEPS), (LARGE, 1, 20), (LARGE, 5, 10)):
        few = 2 if watch.quick else steps
        theirs = {"blackjax": partial(blackjax_sgld, network, chains, watch.device, steps=few)}
        theirs["blackjax, scan"] = partial(theirs["blackjax"], scanned=True)
        if (network, chains) == (LARGE, 5):
            theirs["blackjax, one by one"] = partial(theirs["blackjax"], vmapped=False)
        if network is LARGE:
            wanted = [(own, name, Target("<", 1.0)) for name in theirs for own in ("graph", "compile")]
        else:
            wanted = [("compile", "blackjax", Target("<=", 1.5 if chains == 1 else 0.8)), ("graph", "blackjax", None)]
            wanted += [("compile", "blackjax, scan", Target("<=", 1.3 if chains == 1 else 0.8)), ("graph", "blackjax, scan", None)]
        results.append(compare(watch, _title(network, chains), {**theirs, **_own(watch, network, chains, steps)}, wanted))
    return results


def data_growth(watch: Stopwatch) -> list[Result]:
    """A step on 784-400-400-10 at batch 100 as the data grow from 10³ rows to 10⁶: flat within 10 %."""
    largest = 10**4 if watch.quick else 10**6
    if largest * 784 * 4 > total_memory() / 4:
        result = Result("784-400-400-10, rows of data", "ms")
        result.missing["1e+06 rows"] = f"{largest} rows of 784 numbers take more than a quarter of the memory of this machine"
        return [result]
    sizes = [rows for rows in (10**3, 10**4, 10**5, 10**6) if rows <= largest]
    makers = {f"{rows:.0e} rows": partial(ours, LARGE, 1, "graph", watch.device, rows=rows, steps=20) for rows in sizes}
    first, *others = makers
    result = compare(watch, "784-400-400-10, rows of data", makers, [(name, first, Target("<=", 1.1)) for name in others])
    # an epoch's permutation is drawn at its start, in one step out of N / B
    epochs = {name: 1e3 * watch.seconds(partial(torch.randperm, rows)) for name, rows in zip(makers, sizes, strict=True)}
    result.notes["permutation of an epoch, ms"] = epochs
    data.cache_clear()
    return [result]


def side_by_side(watch: Stopwatch) -> list[Result]:
    """For information: from which size on chains one after the other (``chunk_size=1``) beat chains side by side, on graphs."""
    results = []
    for chains in (5, 20):
        for network in (SMALL, *map(width, (50, 100, 150, 200, 300))):
            makers = {
                "side by side": partial(ours, network, chains, "graph", watch.device, rows=1000, steps=5, chunk_size=chains),
                "one by one": partial(ours, network, chains, "graph", watch.device, rows=1000, steps=5, chunk_size=1),
            }
            results.append(compare(watch, _title(network, chains), makers, [("side by side", "one by one", None)]))
    return results
