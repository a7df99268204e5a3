"""
Measures speed and memory, and compares with what is to be reached::

    python tests/benchmarks/run.py                          # everything; keeps results/cpu.json
    python tests/benchmarks/run.py --device cuda            # everything; keeps results/cuda.json
    python tests/benchmarks/run.py --only step_small        # a row or some; with --out they take their places among the file's others
    python tests/benchmarks/run.py --quick --out quick.json # two short rounds of each, to see that everything runs

Rivals take turns in one process, and their times are compared round by round. A number is a median with its quartiles.
A rival that is not installed is listed as missing. The exit code is 0 whether or not targets are met: a shared or small machine
decides about a missed target as much as the code does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `models` and `tests` are not installed

from tests.benchmarks import rows_attacks, rows_bal, rows_distill, rows_memory, rows_prediction, rows_sampling, rows_variational
from tests.benchmarks.measure import Result, Stopwatch, machine

ROWS: dict[str, Callable[[Stopwatch], list[Result]]] = {
    row.__name__: row
    for row in (
        rows_sampling.step_large,
        rows_sampling.step_small,
        rows_sampling.chains_small,
        rows_sampling.chains_large,
        rows_sampling.against_posteriors,
        rows_sampling.against_blackjax,
        rows_prediction.predict_small,
        rows_prediction.predict_large,
        rows_bal.bal_iteration,
        rows_sampling.data_growth,
        rows_memory.sampler_memory,
        rows_memory.classifier_memory,
        rows_attacks.attack_large,
        rows_attacks.attack_small,
        rows_attacks.attack_distribution,
        rows_memory.attack_memory,
        rows_variational.mean_field_step,
        rows_variational.adversarial_step,
        rows_variational.guide_prediction,
        rows_variational.exemplar_gradient,
        rows_distill.distill_small,
        rows_distill.distill_medium,
        rows_distill.distill_large,
        rows_distill.factored_draws,
        rows_sampling.side_by_side,
    )
}
MARKS = {True: "met", False: "MISSED", None: ""}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmarks that the command line names."""
    options = _parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device here")
    watch = Stopwatch(device, options.quick)
    report = {"machine": machine(device), "quick": options.quick, "rows": {}}
    out = options.out
    if out is None and not options.quick and set(options.only) == set(ROWS):
        out = Path(__file__).parent / "results" / f"{device.type}.json"
    if out is not None and out.exists() and set(options.only) != set(ROWS):
        report["rows"] = _others(out, report)
    results: dict[str, list[Result]] = {}
    for name in options.only:
        print(f"{name}: {' '.join(ROWS[name].__doc__.split())}", flush=True)
        begun, load, start = time.strftime("%Y-%m-%d %H:%M:%S"), _load(), time.perf_counter()
        results[name] = ROWS[name](watch)
        for result in results[name]:
            print(_text(result), flush=True)
        seconds = round(time.perf_counter() - start, 1)
        about = {"what": ROWS[name].__doc__, "started": begun, "seconds": seconds, "load": [load, _load()]}
        report["rows"][name] = {**about, "results": [r.as_json() for r in results[name]]}
        if out is not None:  # after every row: a run takes long, and may be stopped
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    print(_table(results))
    if options.quick:
        print("\nA quick run shows that everything runs; its numbers mean nothing.")
    if out is not None:
        print(f"\nwritten to {out}")


def _others(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The rows that a file has, if they are of this machine and of runs like this one."""
    found = json.loads(out.read_text())
    if differing := [name for name in ("machine", "quick") if found[name] != report[name]]:
        sys.exit(f"{out} has rows of another {' and '.join(differing)}: give another --out")
    return found["rows"]


def _load() -> float:
    """Processes that ran or waited in the last minute: before the start, more than 0.5 says that the machine is not ours alone."""
    return round(os.getloadavg()[0], 2)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="two short rounds, nothing compiled")
    parser.add_argument("--out", type=Path, help="where the JSON goes; by default only a full run keeps its own")
    return parser.parse_args(arguments)


def _text(result: Result) -> str:
    lines = [f"  {result.what}"]
    for name, spread in result.values.items():
        lines.append(f"    {name:<28}{spread.median:10.4g} {result.unit}  [{spread.low:.4g}, {spread.high:.4g}] in {spread.count}")
    lines += [f"    {name:<28}missing: {why}" for name, why in result.missing.items()]
    return "\n".join(lines)


def _table(results: dict[str, list[Result]]) -> str:
    lines = [("what", "measured", "quartiles", "target", "")]
    for name, parts in results.items():
        for result in parts:
            for comparison in result.comparisons:
                spread, target = comparison.spread, comparison.target
                lines.append(
                    (
                        f"{name}: {result.what}: {comparison.what}",
                        f"{spread.median:.3g}",
                        f"[{spread.low:.3g}, {spread.high:.3g}]",
                        "" if target is None else str(target),
                        MARKS[comparison.met],
                    )
                )
            lines += [(f"{name}: {result.what}: {rival}", "missing", why, "", "") for rival, why in result.missing.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*No CUDA runtime.*")
    main()
