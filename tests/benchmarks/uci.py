"""
What sampling adds to a deep ensemble: regression networks on UCI sets, every kernel from the same ensemble's members.

A heteroscedastic 16-16 ReLU network with Normal(0, 1) priors, targets standardised, on splits of Hernández-Lobato and Adams (2015)::

    python tests/benchmarks/uci.py --data DATA                                   # energy, yacht, concrete; three splits and seeds; hours
    python tests/benchmarks/uci.py --data DATA --sets energy --splits 1 --seeds 1
    python tests/benchmarks/uci.py --table                                       # only writes the table of the runs that there are

Runs are appended to ``--out``, a line of JSON each, and are not repeated; the table is written beside them. All kernels have default
arguments and the same number of gradients of all rows, half of them for warm-up. BlackJAX's microcanonical sampler, where it is installed,
starts from the same members: its integrator takes two gradients a step, and half the steps.

- LPPD: log density of the test rows under the mean predicted law, in nats of the standardised target, mean over rows.
- RMSE: of the mean prediction, of the standardised target.
- f-ESS: effective sample size of the predicted means at the test inputs within each chain, median over the inputs, per 1000 gradients.
- R-hat: of the same, between chains, median.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `models` and `tests` are not installed

import pyro_advbayes as ab
from models.heteroscedastic_regression import LARGEST_LOG_SCALE, HeteroscedasticRegression
from pyro_advbayes.infer.arviz import log_likelihoods
from tests.benchmarks.measure import Missing, machine
from tests.benchmarks.trust_table import markdown

KERNELS: dict[str, Callable[..., Any]] = {
    "SGHMC": ab.SGHMC,
    "SGHMC-adaptive": partial(ab.SGHMC, adaptive=True),
    "MCLMC": ab.MCLMC,
    "MCLMC, error 0.1": partial(ab.MCLMC, energy_error=0.1),
}
BLACKJAX = "BlackJAX mclmc"
SETS, CHAINS, KEPT, UPDATES = ("energy", "yacht", "concrete"), 8, 200, 4000
SCORES = ("lppd", "rmse", "f_ess", "r_hat")
RESULTS = Path(__file__).parent / "results" / "uci.jsonl"


def run_split(task: Mapping[str, Any], data: Path | None, kernels: Sequence[str], updates: int, epochs: int) -> Iterator[dict[str, Any]]:
    """
    The rows of one split and seed: the ensemble's, then each kernel's from its members.

    :param task: ``{"set", "split", "seed"}``.
    :param updates: of each chain in warm-up, and as many after it.
    :param epochs: of the ensemble, at most.
    """
    split = ab.datasets.uci(task["set"], task["split"], data)
    pyro.set_rng_seed(task["seed"])
    model, begun = HeteroscedasticRegression(split.x.shape[1]), time.process_time()
    start = ab.ensemble_start(model, split.x, split.y, num_chains=CHAINS, num_epochs=epochs)
    test = split.x_test, split.y_test
    yield {**task, "kernel": "ensemble", **scores(model, start.samples, *test), "seconds": round(time.process_time() - begun, 1)}
    for name in kernels:
        pyro.set_rng_seed(task["seed"])
        begun = time.process_time()
        try:
            found = _blackjax(start, split.x, split.y, updates, task["seed"]) if name == BLACKJAX else None
        except Missing as error:
            print(f"{name}: {error}", flush=True)
            continue
        found = found or _sample(KERNELS[name], model, start, split.x, split.y, updates)
        draws, more = found
        flat = {site: value.flatten(0, 1) for site, value in draws.items()}
        mixed = mixing(model, draws, split.x_test, updates)
        yield {**task, "kernel": name, **scores(model, flat, *test), **mixed, **more, "seconds": round(time.process_time() - begun, 1)}


def _sample(
    kernel_type: Callable[..., Any], model: Any, start: Mapping[str, Tensor], x: Tensor, y: Tensor, updates: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    kept = min(KEPT, updates)
    mcmc = ab.SGMCMC(
        kernel_type(model, num_steps_per_sample=updates // kept), kept, kept, CHAINS, initial_params=start, disable_progbar=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(x, y)
    told = sorted({str(w.message)[:200] for w in caught if issubclass(w.category, ab.SamplingWarning)})
    return mcmc.get_samples(group_by_chain=True), {"step": mcmc.diagnostics()["step size"], "warned": told}


def scores(model: Any, samples: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, float]:
    """LPPD and RMSE of draws ``[draws, *site]`` on test rows."""
    (rows,) = log_likelihoods(model, samples, (x, y), {}).values()
    mean = ab.Predictive(model, samples, return_sites=["_RETURN"])(x)["_RETURN"][..., 0].mean(0)
    lppd = rows.double().logsumexp(0) - math.log(len(rows))
    return {"lppd": round(float(lppd.mean()), 4), "rmse": round(float((mean - y).square().mean().sqrt()), 4)}


def mixing(model: Any, draws: Mapping[str, Tensor], x: Tensor, updates: int) -> dict[str, float]:
    """f-ESS and R-hat of predicted means, of draws ``[chains, draws, *site]``."""
    flat = {site: value.flatten(0, 1) for site, value in draws.items()}
    chains = len(next(iter(draws.values())))
    means = ab.Predictive(model, flat, return_sites=["_RETURN"])(x)["_RETURN"][..., 0].unflatten(0, (chains, -1)).double()
    within = torch.stack([effective_sample_size(chain[None], 0, 1) for chain in means]).mean(0)
    r_hat = split_gelman_rubin(means, 0, 1)
    return {"f_ess": round(1000 * float(within.median()) / updates, 3), "r_hat": round(float(r_hat.median()), 3)}


def _blackjax(start: Mapping[str, Tensor], x: Tensor, y: Tensor, updates: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    BlackJAX's sampler, step and length found by its own adaptation.

    :raises Missing: if it is not installed.
    """
    try:
        import blackjax
        import jax
        import jax.numpy as jnp
        from blackjax.adaptation.mclmc_adaptation import MCLMCAdaptationState
    except ImportError as error:
        raise Missing(f"blackjax is not installed ({error})") from None
    sites, size = list(start), sum(value[0].numel() for value in start.values())
    inputs, targets = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

    def log_density(weights: dict[str, Any]) -> Any:
        h = inputs
        layers = [site.rsplit(".", 1)[0] for site in sites if site.endswith(".weight")]
        for layer in layers:
            h = h @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
            h = h if layer == layers[-1] else jax.nn.relu(h)
        mean, log_scale = h[:, 0], jnp.clip(h[:, 1], -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
        likelihood = -0.5 * ((targets - mean) / jnp.exp(log_scale)) ** 2 - log_scale
        return likelihood.sum() - 0.5 * sum((value**2).sum() for value in weights.values())

    steps, kept = updates // 2, min(KEPT, updates // 2)

    def chain(weights: dict[str, Any], key: Any) -> tuple[Any, Any]:
        adapt_key, start_key, run_key = jax.random.split(key, 3)
        kernel = blackjax.mcmc.mclmc.build_kernel()
        state = blackjax.mcmc.mclmc.init(weights, log_density, start_key)
        # shares of warm-up, first step and energy error of Sommer et al. (2025): the default first step throws trained networks away
        first = MCLMCAdaptationState(math.sqrt(size), 1e-3, jnp.ones(()))
        adapted = blackjax.mclmc_find_L_and_step_size(
            kernel, steps, state, adapt_key, log_density, 0.8, 0.1, 0.1, 0.1, diagonal_preconditioning=False, params=first
        )
        state, parameters = adapted[0], adapted[1]

        def sample(state: Any, key: Any) -> tuple[Any, Any]:
            def step(state: Any, key: Any) -> tuple[Any, None]:
                return kernel(key, state, log_density, parameters.inverse_mass_matrix, parameters.L, parameters.step_size)[0], None

            state, _ = jax.lax.scan(step, state, jax.random.split(key, steps // kept))
            return state, state.position

        _, draws = jax.lax.scan(sample, state, jax.random.split(run_key, kept))
        return draws, parameters.step_size

    starts = {site: jnp.asarray(value.numpy()) for site, value in start.items()}
    draws, found = jax.jit(jax.vmap(chain))(starts, jax.random.split(jax.random.key(seed), CHAINS))
    return {site: torch.tensor(value.tolist()) for site, value in draws.items()}, {"step": float(jnp.exp(jnp.log(found).mean()))}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over splits and seeds, with standard errors, as Markdown."""
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        for kernel in dict.fromkeys(row["kernel"] for row in rows if row["set"] == name):
            of = [row for row in rows if (row["set"], row["kernel"]) == (name, kernel)]
            spread = [_spread([row[score] for row in of if row.get(score) is not None]) for score in SCORES]
            lines.append([name, kernel, *spread, f"{statistics.mean(row['seconds'] for row in of):.0f}", str(len(of))])
    return markdown([["set", "sampler", "LPPD", "RMSE", "f-ESS", "R-hat", "CPU s", "runs"], *lines])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    options = _parse(arguments)
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        header = {"machine": machine(torch.device("cpu")), "updates": 2 * options.updates, "chains": CHAINS, "epochs": options.epochs}
        out.write_text(json.dumps(header) + "\n")
    header, *rows = map(json.loads, out.read_text().splitlines())
    if header["updates"] != 2 * options.updates or header["epochs"] != options.epochs:
        sys.exit(f"{out} has runs of another length: delete it, or give another --out")
    done = {(row["set"], row["split"], row["seed"]) for row in rows}
    tasks = [(name, split, seed) for split in range(options.splits) for seed in range(options.seeds) for name in options.sets]
    for task in [] if options.table else [task for task in tasks if task not in done]:
        found = list(
            run_split(
                dict(zip(("set", "split", "seed"), task, strict=True)), options.data, options.kernels, options.updates, options.epochs
            )
        )
        rows += found
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        print(
            "\n".join(
                f"{row['set']} {row['split']}/{row['seed']} {row['kernel']}: LPPD {row['lppd']}, RMSE {row['rmse']}" for row in found
            ),
            flush=True,
        )
    text = f"{__doc__.strip()}\n\n{header['chains']} chains, {header['updates']} gradients each.\n\n{table(rows)}\n"
    out.with_suffix(".md").write_text(text)
    print(table(rows))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the data folder; PYRO_ADVBAYES_DATA by default")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, BLACKJAX], default=[*KERNELS, BLACKJAX])
    parser.add_argument("--splits", type=int, default=3, help="how many, from 0")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--updates", type=int, default=UPDATES, help="of each chain in warm-up, and as many after it")
    parser.add_argument("--epochs", type=int, default=500, help="of the ensemble, at most")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a .jsonl file; the table gets its name with .md")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
