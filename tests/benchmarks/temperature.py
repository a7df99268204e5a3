"""
Is the temperature that minibatch noise is predicted to lead to, ``T_eff``, the one that is sampled?

Linear regression with known noise, 500 rows, 10 inputs, 64 chains that start at exact draws: every kernel, batches of 1/2 to 1/50 of
the data, at the step that ``"auto"`` finds and at 3 and 10 times it::

    python tests/benchmarks/temperature.py                        # everything; keeps results/temperature.json and .md
    python tests/benchmarks/temperature.py --kernels SGLD --out quick.json

The variance along each principal axis of the posterior is compared with the exact one. Beside it stands what is predicted: ``T_eff``
times the closed form of the variance at this step size with exact gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `models` and `tests` are not installed

import pyro_advbayes as ab
from models.linear_regression import LinearRegression
from tests.benchmarks.measure import machine
from tests.benchmarks.trust_table import markdown
from tests.infer.mcmc.harness import Case, closed_form

KERNELS = {
    "SGLD": Case(ab.SGLD),
    "SGAdaLD": Case(ab.SGAdaLD, scaled=True),
    "SGHMC": Case(ab.SGHMC, friction=0.05),
    "SGHMC-adaptive": Case(partial(ab.SGHMC, adaptive=True), friction=0.05, scaled=True),
}
NUM_DATA, FEATURES, CHAINS = 500, 10, 64
RATIOS, FACTORS = (2, 5, 10, 20, 50), (1, 3, 10)
UPDATES, WARMUP_STEPS, NUM_SAMPLES = 20, 150, 400
RESULTS = Path(__file__).parent / "results" / "temperature.json"


def measure(case: Case, ratio: int, report: Callable[[dict[str, Any]], None]) -> None:
    """One kernel on batches of 1/``ratio`` of the data: ``"auto"``, then multiples of the step that it found."""
    pyro.set_rng_seed(0)
    x = torch.randn(NUM_DATA, FEATURES) * torch.logspace(0, -0.5, FEATURES)  # precisions with a condition number of about 10
    y = x @ torch.randn(FEATURES) + 0.3 + 0.5 * torch.randn(NUM_DATA)
    model = LinearRegression(FEATURES, noise_scale=0.5)
    law = model.exact_posterior(x.double(), y.double())
    precisions, axes = torch.linalg.eigh(law.precision_matrix)  # soft first
    found: float | None = None
    for factor in FACTORS:
        row: dict[str, Any] = {"ratio": ratio, "factor": factor}
        step_size = "auto" if found is None else found * factor
        kernel = case.kernel(model, step_size, batch_size=NUM_DATA // ratio, num_steps_per_sample=UPDATES)
        exact = law.sample((CHAINS,)).float()
        start = {"net.weight": exact[:, None, :FEATURES], "net.bias": exact[:, FEATURES:]}
        mcmc = ab.SGMCMC(kernel, NUM_SAMPLES, WARMUP_STEPS, CHAINS, initial_params=start, disable_progbar=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a step above "auto" is meant to be too large
                mcmc.run(x, y)
        except (ValueError, RuntimeError) as error:
            report(row | {"refused": f"{type(error).__name__}: {error}"[:200]})
            if found is None:
                return
            continue
        diagnostics, samples = mcmc.diagnostics(), mcmc.get_samples(group_by_chain=True)
        found = found or diagnostics["step size"]
        draws = torch.cat([samples["net.weight"].flatten(2), samples["net.bias"]], -1).double()
        squares = ((draws - law.mean) @ axes).square().mean(1) * precisions  # [chains, axes]
        heat, rates = max(diagnostics["T_eff"].values()), case.rates(kernel, diagnostics["step size"])
        covariance = closed_form(case, law.precision_matrix, rates, heat, diagnostics["step size"]).mean(0)
        predicted = (axes.mT @ covariance @ axes).diagonal() * precisions
        numbers = {"measured": squares.mean(0), "error": squares.std(0) / len(squares) ** 0.5, "predicted": predicted}
        report(
            row
            | {"step": diagnostics["step size"], "T_eff": heat, "lost": CHAINS - len(draws), **{k: _digits(v) for k, v in numbers.items()}}
        )


def _digits(values: Tensor) -> list[float | None]:
    return [float(f"{value:.4g}") if abs(value) < 1e9 else None for value in values.tolist()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--ratios", nargs="+", type=int, choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="a .json file; the table gets its name with .md")
    options = parser.parse_args(arguments)
    report = {"machine": machine(torch.device("cpu")), "date": time.strftime("%Y-%m-%d"), "rows": []}

    def keep(kernel: str, row: dict[str, Any]) -> None:
        report["rows"].append({"kernel": kernel, **row})
        print(json.dumps(report["rows"][-1]), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    for kernel in options.kernels:
        for ratio in options.ratios:
            measure(KERNELS[kernel], ratio, partial(keep, kernel))
    text = table(report)
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)


def table(report: dict[str, Any]) -> str:
    """Markdown: variance over the exact one, measured with its standard error, and predicted, along three axes."""
    lines = [("kernel", "N/B", "step", "T_eff", "softest", "predicted", "middle", "predicted", "stiffest", "predicted", "lost")]
    for row in report["rows"]:
        label = (row["kernel"], row["ratio"], "auto" if row["factor"] == 1 else f"{row['factor']} x auto")
        if "refused" in row:
            lines.append((*label, *[""] * 7, f"refused: {row['refused'][:80]}"))
            continue
        cells = []
        for place in (0, len(row["measured"]) // 2, -1):
            cells += [_cell(row["measured"][place], row["error"][place]), _cell(row["predicted"][place])]
        lines.append((*label, f"{row['T_eff']:.3f}", *cells, row["lost"]))
    return f"""# Predicted and sampled temperature

Written by `python tests/benchmarks/temperature.py` ({report["date"]}, torch {report["machine"]["versions"]["torch"]}), which says what is
measured. Numbers are variances over the exact posterior's, along its softest, middle and stiffest principal axis.

{markdown(lines)}"""


def _cell(value: float | None, error: float | None = None) -> str:
    if value is None or not value > 0:  # no stationary law at this step
        return "none"
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()
