"""
Is a first run with the defaults right, or does it say that it is not?

Runs every kernel with default arguments (``step_size="auto"``, four chains, 1000 + 1000 samples of 10 updates) on posteriors with
known moments and judges each run::

    python tests/benchmarks/trust.py                                   # everything, 12 seeds; hours. `make trust`
    python tests/benchmarks/trust.py --only "N/B=1$" --seeds 3         # cases in whose name it is found
    python tests/benchmarks/trust.py --kernels SGHMC --processes 2
    python tests/benchmarks/trust.py --table                           # only writes the table of the runs that there are
    python tests/benchmarks/trust.py --references                      # runs NUTS where its moments are missing

Runs are appended to ``--out``, a line of JSON each, and are not repeated; the table is written beside them. A run is

- right: means within 0.1 posterior standard deviations and standard deviations within 10 %, each plus 4 Monte-Carlo standard errors;
- warned: wrong, or too short to tell (effective sample size under 25 a chain, R-hat above 1.05), and a Python warning said so;
- refused: ended by an error;
- false alarm: right, long enough, and yet warned;
- SILENT: wrong, or not mixed at all (under 3 a chain, R-hat above 1.2, chains lost), without a warning.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import math
import multiprocessing
import re
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `models` and `tests` are not installed

import pyro_advbayes as ab
from tests.benchmarks import course_cases, trust_cases
from tests.benchmarks.measure import machine
from tests.benchmarks.trust_cases import Case, Problem
from tests.benchmarks.trust_references import run_nuts
from tests.benchmarks.trust_table import write_table
from tests.benchmarks.trust_verdict import Findings, find, verdict

KERNELS: dict[str, Callable[..., Any]] = {
    "SGLD": ab.SGLD,
    "SGAdaLD": ab.SGAdaLD,
    "SGHMC": ab.SGHMC,
    "SGHMC-adaptive": partial(ab.SGHMC, adaptive=True),
    "MCLMC": ab.MCLMC,
}
CASES = {**trust_cases.CASES, **course_cases.CASES}
NUM_SAMPLES, WARMUP_STEPS, UPDATES = 1000, 1000, 10  # 20 000 updates
RESULTS = Path(__file__).parent / "results" / "trust.jsonl"


def run_once(task: tuple[str, str, int], num_samples: int = NUM_SAMPLES, warmup_steps: int = WARMUP_STEPS) -> dict[str, Any]:
    """
    One run and its verdict, as plain values.

    :param task: names of a case and a kernel, and a seed.
    """
    name, kernel_name, seed = task
    case, start = CASES[name], time.perf_counter()
    row: dict[str, Any] = {"case": name, "kernel": kernel_name, "seed": seed}
    findings, messages, problem = None, [], case.make(seed)
    try:
        own_seed = zlib.crc32(json.dumps(task).encode())  # with one seed for all, kernels would share their noise, and their luck
        findings, diagnostics, messages = _run(case, KERNELS[kernel_name], problem, own_seed, num_samples, warmup_steps)
        heat = diagnostics["T_eff"]
        row |= {part: _rounded(value) for part, value in findings._asdict().items()}
        row["T_eff"] = None if heat is None else _rounded(max(heat.values()))
    except (ValueError, RuntimeError) as error:
        row["refused"] = f"{type(error).__name__}: {error}"[:300]
    row["warned"] = messages
    row["verdict"] = verdict(findings, bool(messages))
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _run(
    case: Case, kernel_type: Callable[..., Any], problem: Problem, seed: int, num_samples: int, warmup_steps: int
) -> tuple[Findings, dict[str, Any], list[str]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    batch_size = None if case.loader else case.batch_size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc = ab.SGMCMC(
            kernel_type(problem.model, batch_size=batch_size, num_steps_per_sample=UPDATES),
            num_samples,
            warmup_steps,
            case.num_chains,
            disable_progbar=True,
        )
        mcmc.run(*case.run_arguments(problem))
        samples = mcmc.get_samples(group_by_chain=True)
        diagnostics = mcmc.diagnostics()
    told = [w for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    lost = sum(bool(rows) for rows in diagnostics["divergences"].values())
    messages = sorted({f"{w.category.__name__}: {w.message}"[:400] for w in told})
    return find(samples, problem.moments, case.num_chains, lost), diagnostics, messages


def _rounded(value: float) -> float | None:
    """Four digits; None for what is not finite, which JSON does not know."""
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    options = _parse(arguments)
    if options.references:
        for key, make in {**trust_cases.TARGETS, **course_cases.TARGETS}.items():
            run_nuts(key, make)
        return
    if not options.table:
        cases = [name for name in CASES if not options.only or any(re.search(pattern, name) for pattern in options.only)]
        tasks = [(name, kernel, seed) for seed in range(options.seeds) for name in cases for kernel in options.kernels]
        _run_all(tasks, options.out, options.processes)
    print(write_table(options.out))


def _run_all(tasks: Sequence[tuple[str, str, int]], out: Path, processes: int) -> None:
    header = {"machine": machine(torch.device("cpu")), "updates": (NUM_SAMPLES + WARMUP_STEPS) * UPDATES, "sources": _sources()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        out.write_text(json.dumps(header) + "\n")
    first, *lines = out.read_text().splitlines()
    if json.loads(first)["sources"] != header["sources"]:
        sys.exit(f"{out} has runs of other sources of the samplers: delete it, or give another --out")
    done = {(row["case"], row["kernel"], row["seed"]) for row in map(json.loads, lines)}
    left = [task for task in tasks if task not in done]
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(out.open("a"))
        results = map(run_once, left)
        if processes > 1:
            results = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,))).imap_unordered(
                run_once, left
            )
        for count, row in enumerate(results, 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            remaining = (time.perf_counter() - start) / count * (len(left) - count) / 60
            print(f"{count}/{len(left)}, {remaining:.0f} min left: {_line(row)}", flush=True)


def _line(row: dict[str, Any]) -> str:
    label = f"{row['case']}, {row['kernel']}, seed {row['seed']}: {row['verdict']}"
    if "refused" in row:
        return f"{label} ({row['refused'][:100]})"
    return f"{label} (mean {row['mean']} sd, sd x {row['sd_low']} to {row['sd_high']}, ESS {row['ess']} a chain, R-hat {row['r_hat']})"


def _sources() -> str:
    """Digest of the samplers' code, without comments and docstrings: runs of different code do not share a file."""
    digest = hashlib.sha256()
    for path in sorted(Path(ab.__file__).parent.glob("infer/mcmc/*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cases whose name one of these regular expressions is found in")
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--seeds", type=int, default=12, help="how many, from 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a .jsonl file; the table gets its name with .md")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--references", action="store_true", help="run NUTS where its moments are missing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
